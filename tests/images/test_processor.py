"""Sizes, numbers and layout of what the encoder is given, by all three ways that make it."""

import io
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from hrvlm.images import transformers_processor
from hrvlm.images.geometry import tile_grid, token_grid
from hrvlm.images.intake import ImageError
from hrvlm.images.patches import patchify, unpatchify
from hrvlm.images.pixels import load_pixels, resize_pixels
from hrvlm.images.processor import (
    CLIP,
    IMAGENET,
    SAT493M,
    SIGLIP,
    get_image_processor,
    normalization_for,
    normalize,
)
from hrvlm.images.transformers_processor import VLMImageProcessor, VLMImageProcessorPil
from hrvlm_kernels import normalize_patchify
from tests.kernels.helpers import interpreter_only

BACKENDS = [VLMImageProcessor, VLMImageProcessorPil]


def picture(height, width, kind="noise"):
    rng = np.random.default_rng(height * 1000 + width)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "black and white":
        return rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    down, across = np.linspace(0, 255, height)[:, None], np.linspace(255, 0, width)[None, :]
    return np.stack(np.broadcast_arrays(down, across, (down + across) / 2), 2).astype(np.uint8)


def normalized(image, mean, std):
    """The definition, in float64: [3, H, W] of a uint8 array [H, W, 3]."""
    return torch.from_numpy(((image / 255.0 - mean) / std).transpose(2, 0, 1))


def bicubic(size, target):
    """Weights [target, size] of Keys' cubic with a = -1/2, stretched where the size shrinks."""
    stretch = max(size / target, 1.0)
    centers = (np.arange(target) + 0.5) * size / target
    x = abs((np.arange(size)[None] + 0.5 - centers[:, None]) / stretch)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


def resized(image, height, width):
    """The definition, in float64: across, then down, each rounded to 8 bits."""
    h, w = image.shape[:2]
    if w != width:
        across = np.einsum("Ww,hwc->hWc", bicubic(w, width), image)
        image = np.clip(np.floor(across + 0.5), 0, 255)
    if h != height:
        down = np.einsum("Hh,hwc->Hwc", bicubic(h, height), image)
        image = np.clip(np.floor(down + 0.5), 0, 255)
    return image


def steps(a, b, std, of=torch.max):
    """The largest difference of two normalised images [..., 3, H, W] in steps of 1/255."""
    per_channel = (a.double() - b.double()).abs() * 255 * torch.tensor(std).view(3, 1, 1)
    return of(per_channel).item()


# The function


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("facebook/dinov3-vitl16-pretrain-sat493m", SAT493M),
        ("dinov3_vit7b16_pretrain_SAT493M-a6675841.pth", SAT493M),
        ("facebook/dinov3-vits16-pretrain-lvd1689m", IMAGENET),
        ("google/SigLIP2-base-patch16-512", SIGLIP),
        ("HuggingFaceTB/SmolVLM-256M-Instruct", SIGLIP),
        ("Qwen/Qwen2.5-VL-3B-Instruct", CLIP),
        ("", IMAGENET),
    ],
)
def test_presets(name, expected):
    assert normalization_for(name) == expected


def test_the_presets_are_the_published_numbers():
    assert IMAGENET == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert SAT493M == ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
    assert SIGLIP == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)) == CLIP


def test_white_and_black_by_hand():
    processor = get_image_processor(64)
    white, _ = processor(Image.new("RGB", (64, 64), (255, 255, 255)))
    black, _ = processor(Image.new("RGB", (64, 64)))
    torch.testing.assert_close(white[:, 5, 7], torch.tensor([2.2489083, 2.4285714, 2.64]))
    torch.testing.assert_close(black[:, 5, 7], torch.tensor([-2.1179039, -2.0357143, -1.8044444]))


@pytest.mark.parametrize("preset", [IMAGENET, SAT493M, SIGLIP])
@pytest.mark.parametrize("single", [True, False])
def test_mean_and_std_are_applied(preset, single):
    image = picture(128, 192)
    processor = get_image_processor(
        192,
        64,
        single_image_mode=single,
        image_mean=list(preset.mean),
        image_std=np.array(preset.std),
    )
    got, _ = processor(image)
    if not single:
        got = got[1:].view(2, 3, 3, 64, 64).permute(2, 0, 3, 1, 4).reshape(3, 128, 192)
    expected = normalized(image, *preset)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)
    # A processor that forgot mean, std or both would be off by far more than that.
    for other in (((0, 0, 0), preset.std), (preset.mean, (1, 1, 1)), (preset.mean[::-1], (1,) * 3)):
        assert (got - normalized(image, *other)).abs().max() > 0.1


@pytest.mark.parametrize("allow_upscale", [True, False])
@pytest.mark.parametrize("size", [(100, 150), (150, 100), (1, 1), (1, 900), (700, 33), (256, 192)])
def test_the_size_is_that_of_token_grid(size, allow_upscale):
    image = picture(*size)
    options = dict(max_img_size=320, allow_upscale=allow_upscale)
    g = token_grid(*size, patch_size=14, factor=2, **options)
    expected = normalized(resized(image, g.height, g.width), *IMAGENET)
    for exact in (True, False):
        processor = get_image_processor(
            vit_patch_size=14, pixel_shuffle_factor=2, exact=exact, **options
        )
        pixels, grid = processor(image, channels="last")
        assert grid == g.token_grid and processor.geometry(*size) == g
        assert pixels.shape == (3, g.height, g.width) and pixels.dtype == torch.float32
        assert steps(pixels, expected, IMAGENET.std) <= (1 if exact else 2) + 1e-4
        assert ((pixels - expected).abs() > 1e-5).double().mean() < (1e-3 if exact else 0.1)


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 512, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # by taking every fourth pixel, all white
    pixels, _ = get_image_processor(128)(stripes)
    interior = pixels[:, :, 8:-8] * torch.tensor(IMAGENET.std).view(3, 1, 1)
    assert (interior + torch.tensor(IMAGENET.mean).view(3, 1, 1) - 0.5).abs().max() < 0.01


def test_every_source_and_the_intakes_options():
    rgba = np.dstack([picture(64, 128), np.zeros((64, 128), np.uint8)])
    processor = get_image_processor(128, background=(9, 99, 199))
    stream = io.BytesIO()
    Image.fromarray(rgba).save(stream, "PNG")
    expected = normalized(np.full((64, 128, 3), (9, 99, 199), np.uint8), *IMAGENET).float()
    for source in (rgba, torch.from_numpy(rgba), Image.fromarray(rgba), stream, stream.getvalue()):
        torch.testing.assert_close(processor(source)[0], expected, rtol=0, atol=1e-6)
    with pytest.raises(ImageError, match=r"^page 4: shape 3x5x3"):
        processor(np.zeros((3, 5, 3), np.uint8), name="page 4")
    with pytest.raises(ImageError, match=r"image 2 is over the pixel limit"):
        get_image_processor(128, max_pixels=99)(rgba, name=2)


def test_a_photograph_is_turned_before_it_is_measured():
    image, exif = Image.fromarray(picture(64, 128)), Image.Exif()
    exif[0x0112] = 6
    image.info["exif"] = exif.tobytes()
    pixels, grid = get_image_processor(128)(image)
    assert grid == (2, 1) and pixels.shape == (3, 128, 64)


def test_the_processor_as_an_object():
    processor = get_image_processor(512, image_mean=[0.5, 0.5, 0.5], background=[0, 0, 0])
    assert repr(processor).startswith("ImageProcessor(max_img_size=512, splitted_image_size=None")
    assert "image_mean=(0.5, 0.5, 0.5)" in repr(processor)
    assert pickle.loads(pickle.dumps(processor)) == processor
    assert processor != get_image_processor(512)
    with pytest.raises(AttributeError):
        processor.max_img_size = 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_img_size=63), r"max_img_size=63"),
        (dict(max_img_size=512.0), r"max_img_size=512\.0"),
        (dict(vit_patch_size=0), r"^vit_patch_size=0"),
        (dict(pixel_shuffle_factor=0), r"^pixel_shuffle_factor=0"),
        (dict(image_mean=(0.5, 0.5)), r"image_mean=\(0\.5, 0\.5\)"),
        (dict(image_mean=0.5), r"image_mean=0\.5"),
        (dict(image_std=(0.5, 0, 0.5)), r"image_std=.* greater than 0"),
        (dict(image_std=(0.5, float("nan"), 0.5)), r"image_std="),
        (dict(background=(1, 2, 300)), r"background="),
        (dict(max_pixels=0), r"max_pixels=0"),
        (dict(single_image_mode=False), r"splitted_image_size=None"),
        (
            dict(splitted_image_size=100, single_image_mode=False),
            r"splitted_image_size=100: expected a multiple .* 16 \* 4",
        ),
        (dict(single_image_mode=16), r"single_image_mode=16: expected True or False"),
        (dict(allow_upscale=None), r"allow_upscale=None: expected True or False"),
        (dict(splitted_image_size=1024, single_image_mode=False), r"max_img_size=512 .* one tile"),
    ],
)
def test_bad_options_are_named_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        get_image_processor(**(dict(max_img_size=512) | options))


@pytest.mark.parametrize("tile", [224, 512, 100, 0, None])
def test_six_options_by_position_and_a_tile_size_that_nothing_looks_at(tile):
    processor = get_image_processor(448, tile, True, 14, 2, False)
    pixels, grid = processor(picture(300, 200))
    assert grid == (11, 7) and pixels.shape == (3, 11 * 28, 7 * 28)
    assert processor == get_image_processor(
        max_img_size=448,
        splitted_image_size=tile,
        single_image_mode=True,
        vit_patch_size=14,
        pixel_shuffle_factor=2,
        allow_upscale=False,
    )


# Split mode


@pytest.mark.parametrize("allow_upscale", [True, False])
@pytest.mark.parametrize("size", [(100, 150), (300, 80), (384, 256), (31, 1000), (90, 100)])
def test_split_mode(size, allow_upscale):
    image, side = picture(*size), 128
    processor = get_image_processor(
        400, side, single_image_mode=False, allow_upscale=allow_upscale, exact=True
    )
    tiles = tile_grid(
        *size, max_img_size=400, splitted_image_size=side, allow_upscale=allow_upscale
    )
    images, (n_h, n_w) = processor(image)
    assert (n_h, n_w) == tiles.tiles == processor.tiles(*size).tiles
    assert images.shape == (tiles.num_images, 3, side, side) and images.dtype == torch.float32
    whole = normalized(resized(image, tiles.height, tiles.width), *IMAGENET).float()
    parts = list(images)
    if n_h * n_w > 1:
        squeezed = normalized(resized(image, side, side), *IMAGENET).float()
        assert steps(parts.pop(0), squeezed, IMAGENET.std) <= 1 + 1e-4
    for i, part in enumerate(parts):
        y, x = i // n_w * side, i % n_w * side
        expected = whole[:, y : y + side, x : x + side]
        assert steps(part, expected, IMAGENET.std) <= 1 + 1e-4


def test_a_lone_tile_has_no_global_image():
    processor = get_image_processor(512, 128, single_image_mode=False, allow_upscale=False)
    images, grid = processor(picture(100, 120))
    assert grid == (1, 1) and images.shape == (1, 3, 128, 128)


# The processors for transformers

SIZES = {  # name -> (options, image sizes): enlarged, shrunk, as they are, extreme
    "up": (dict(max_img_size=448), [(100, 150), (33, 47), (150, 100)]),
    "down": (dict(max_img_size=192, allow_upscale=False), [(700, 500), (301, 299), (192, 1000)]),
    "same": (dict(max_img_size=256, allow_upscale=False), [(128, 256), (64, 64)]),
    "thin": (dict(max_img_size=512, allow_upscale=False), [(1, 300), (2000, 3)]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["noise", "gradient", "black and white"])
@pytest.mark.parametrize("case", SIZES)
def test_same_geometry_and_numbers_as_the_function(backend, kind, case):
    options, sizes = SIZES[case]
    function = get_image_processor(**options, exact=True)
    pictures = [picture(h, w, kind) for h, w in sizes]
    batch = backend(**options)(pictures, return_tensors="pt", input_data_format="channels_last")
    values, grids = batch["pixel_values"], batch["image_grid_hw"]
    assert values.dtype == torch.float32 and values.shape[1] == 3 * 16 * 16
    assert grids.dtype == torch.int64 and grids.shape == (len(sizes), 2)
    assert values.shape[0] == grids.prod(1).sum()
    for image, packed, (hp, wp) in zip(
        pictures, values.split(grids.prod(1).tolist()), grids.tolist(), strict=True
    ):
        expected, (gh, gw) = function(image, channels="last")
        assert (hp // 4, wp // 4) == (gh, gw) and not hp % 4 and not wp % 4
        got = unpatchify(packed, (hp, wp), 16)
        assert got.shape == expected.shape
        same = backend is VLMImageProcessorPil or case == "same"
        assert steps(got, expected, IMAGENET.std) <= (1e-4 if same else 2 + 1e-4)
        assert steps(got, expected, IMAGENET.std, torch.mean) < 0.1


@pytest.mark.parametrize("kind", ["noise", "black and white"])
def test_bilinear_is_the_same_on_both_backends(kind):
    image = picture(170, 110, kind)
    a, b = (backend(max_img_size=320, resample=2)(image)["pixel_values"] for backend in BACKENDS)
    grid = BACKENDS[0](max_img_size=320).get_patch_grid(170, 110)
    a, b = (unpatchify(x, grid, 16) for x in (a, b))
    assert steps(a, b, IMAGENET.std) <= 2 + 1e-4
    cubic = unpatchify(VLMImageProcessorPil(max_img_size=320)(image)["pixel_values"], grid, 16)
    assert steps(b, cubic, IMAGENET.std) > 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_are_packed_alone_and_in_order(backend):
    processor = backend(max_img_size=192, patch_size=8, pixel_shuffle_factor=2)
    pictures = [picture(100, 150), picture(64, 40), picture(33, 90)]
    alone = [processor(p, return_tensors="pt") for p in pictures]
    together = processor(pictures, return_tensors="pt")
    for key in ("pixel_values", "image_grid_hw"):
        assert torch.equal(together[key], torch.cat([a[key] for a in alone]))
    swapped = processor(pictures[::-1], return_tensors="pt")
    expected = torch.cat([a["pixel_values"] for a in alone[::-1]])
    assert torch.equal(swapped["pixel_values"], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nested_lists_and_every_kind_of_source(backend, tmp_path):
    processor = backend(max_img_size=128)
    array = picture(64, 128)
    image = Image.fromarray(array)
    path = tmp_path / "a.png"
    image.save(path)
    flat = processor([array] * 9, return_tensors="pt")
    nested = [[image, str(path)], [], [[path.read_bytes()], (torch.from_numpy(array),)], path]
    nested.append({"bytes": path.read_bytes(), "path": None})
    with open(path, "rb") as file:
        mixed = processor([*nested, np.stack([array, array])[:1], file, array])
    assert torch.equal(mixed["pixel_values"], flat["pixel_values"])
    batch = torch.from_numpy(np.stack([array] * 9)).permute(0, 3, 1, 2)
    assert torch.equal(processor(batch)["pixel_values"], flat["pixel_values"])
    for single in (image, path, array):
        assert processor(single)["image_grid_hw"].tolist() == [[4, 8]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_processor_that_fetches_first_changes_nothing(backend, tmp_path):
    image, exif = Image.fromarray(picture(64, 128)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    processor, nested = backend(max_img_size=128), [[str(tmp_path / "turned.png")], []]
    fetched = processor(processor.fetch_images(nested))
    assert fetched["image_grid_hw"].tolist() == [[8, 4]]
    assert torch.equal(fetched["pixel_values"], processor(nested)["pixel_values"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_return_tensors(backend):
    processor = backend(max_img_size=64)
    image = picture(64, 64)
    pt, np_ = (processor(image, return_tensors=kind) for kind in ("pt", "np"))
    assert isinstance(np_["pixel_values"], np.ndarray) and np_["pixel_values"].dtype == np.float32
    assert np_["image_grid_hw"].dtype == np.int64
    np.testing.assert_array_equal(np_["pixel_values"], pt["pixel_values"].numpy())


@pytest.mark.parametrize("backend", BACKENDS)
def test_options_of_a_call_are_for_that_call(backend):
    processor = backend(max_img_size=128)
    image = picture(100, 200)
    before = processor.to_dict()
    other = processor(image, max_img_size=512, patch_size=8, image_mean=0.5, image_std=[0.5] * 3)
    assert other["image_grid_hw"].tolist() == [[32, 64]]
    assert other["pixel_values"].shape == (32 * 64, 192)
    assert other["pixel_values"].min() >= -1 and other["pixel_values"].max() <= 1
    assert processor.to_dict() == before
    assert processor(image, max_img_size=None)["image_grid_hw"].tolist() == [[4, 8]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_switches(backend):
    processor = backend(max_img_size=128)
    image = picture(64, 128)

    def values(**options):
        return unpatchify(processor(image, **options)["pixel_values"], (4, 8), 16)

    raw = torch.from_numpy(image).permute(2, 0, 1).float()
    assert torch.equal(values(do_rescale=False, do_normalize=False), raw)
    torch.testing.assert_close(values(do_normalize=False), raw / 255)
    torch.testing.assert_close(values(do_normalize=False, rescale_factor=0.5), raw / 2)
    shifted = values(do_rescale=False, image_mean=[1.0, 2.0, 3.0], image_std=[4.0, 5.0, 6.0])
    expected = (raw - torch.tensor([1.0, 2, 3]).view(3, 1, 1)) / torch.tensor([4.0, 5, 6]).view(
        3, 1, 1
    )
    torch.testing.assert_close(shifted, expected)
    assert torch.equal(values(do_resize=False, max_img_size=64), values())
    with pytest.raises(ImageError, match=r"image 1: height 64, width 100; do_resize=False"):
        processor([image, image[:, :100]], do_resize=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_patch_grid_without_an_image(backend):
    processor = backend(max_img_size=960)
    assert processor.get_patch_grid(640, 960) == (40, 60)
    assert processor.get_number_of_image_patches(640, 960) == 2400
    assert processor.get_patch_grid(640, 960, {"max_img_size": 480}) == (20, 28)
    assert processor.get_patch_grid(640, 960, {"max_img_size": 480, "patch_size": 8}) == (40, 60)
    small = processor(picture(320, 480), max_img_size=480, pixel_shuffle_factor=2)
    options = {"max_img_size": 480, "pixel_shuffle_factor": 2}
    assert [list(processor.get_patch_grid(320, 480, options))] == small["image_grid_hw"].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_name_the_image(backend, tmp_path):
    processor, good = backend(max_img_size=64), picture(64, 64)
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ImageError, match=r"^image 2 \('.*cut\.png'\)"):
        processor([[good], [good, tmp_path / "cut.png"]])
    with pytest.raises(ImageError, match=r"^image 1: shape 3x5x3"):
        processor([good, good[:3, :5]])
    for url in ("https://a.org/b.png", {"url": "https://a.org/b.png"}):
        with pytest.raises(ImageError, match=r"^image 1 .*is a URL"):
            processor([good, url])
    with pytest.raises(ValueError, match=r"^device='x': .*device type"):
        processor(good, device="x")
    with pytest.raises(ImageError, match=r"^image 0 is over the pixel limit"):
        processor(good, max_pixels=99)
    with pytest.raises(TypeError, match=r"^image 1: expected a path.*got float"):
        processor([good, 0.5])
    for empty in ([], [[], []], np.zeros((0, 3, 8, 8), np.uint8)):
        with pytest.raises(ValueError, match=r"at least one image"):
            processor(empty)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(max_img_size=63), ValueError, r"max_img_size=63"),
        (dict(max_img_size="512"), ValueError, r"max_img_size='512'"),
        (dict(patch_size=0), ValueError, r"patch_size=0"),
        (dict(pixel_shuffle_factor=1.5), ValueError, r"pixel_shuffle_factor=1\.5"),
        (dict(image_std=[0.1, 0.1]), ValueError, r"image_std=\[0\.1, 0\.1\]"),
        (dict(image_std=0.0), ValueError, r"image_std"),
        (dict(background="white"), ValueError, r"background='white'"),
        (dict(max_pixels=-1), ValueError, r"max_pixels=-1"),
        (dict(resample=Image.Resampling.NEAREST), ValueError, r"resample="),
        (dict(rescale_factor=0), ValueError, r"rescale_factor=0"),
        (dict(do_normalize="no"), ValueError, r"do_normalize='no'"),
        (dict(input_data_format="sideways"), ValueError, r"input_data_format='sideways'"),
        (dict(size={"height": 224, "width": 224}), ValueError, r"size=.*not supported"),
        (dict(do_center_crop=True), ValueError, r"do_center_crop=True: not supported"),
        (dict(do_pad=True), ValueError, r"do_pad=True: not supported"),
        (dict(do_convert_rgb=False), ValueError, r"do_convert_rgb=False: not supported"),
        (dict(max_image_size=512), TypeError, r"unknown options max_image_size"),
    ],
)
def test_bad_options_of_both_ways(backend, options, error, message):
    with pytest.raises(error, match=message):
        backend(**options)
    with pytest.raises(error, match=message):
        backend()(picture(8, 8), **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_and_loaded(backend, tmp_path, caplog):
    processor = backend(
        patch_size=14,
        pixel_shuffle_factor=2,
        max_img_size=280,
        allow_upscale=False,
        image_mean=list(SAT493M.mean),
        image_std=SAT493M.std,
        background=[1, 2, 3],
        max_pixels=10**6,
    )
    processor.save_pretrained(tmp_path)
    loaded = backend.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.backend == processor.backend
    image = np.dstack([picture(90, 130), np.full((90, 130), 77, np.uint8)])
    assert torch.equal(loaded(image)["pixel_values"], processor(image)["pixel_values"])
    changed = backend.from_pretrained(tmp_path, max_img_size=140)
    assert (changed.max_img_size, changed.patch_size) == (140, 14)
    # One file serves both backends.
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "VLMImageProcessor"
    saved["surprise"] = 1
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved))
    with caplog.at_level("WARNING"):
        kept = backend.from_pretrained(tmp_path, max_img_size=140)
    assert "change nothing: surprise" in caplog.text
    assert (kept.surprise, kept.max_img_size, kept.to_dict()["surprise"]) == (1, 140, 1)
    with pytest.raises(TypeError, match="unknown options surprise"):
        backend(surprise=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pickled_for_the_workers_of_a_loader(backend):
    processor = backend(max_img_size=128)
    again = pickle.loads(pickle.dumps(processor))
    image = picture(50, 60)
    assert torch.equal(again(image)["pixel_values"], processor(image)["pixel_values"])


WITHOUT_TORCHVISION = """if True:
    import sys, tempfile
    sys.modules["torchvision"] = None  # importing it raises, and finding it finds nothing
    import numpy as np
    import hrvlm, hrvlm.images.geometry, hrvlm.images.intake
    from hrvlm.images.processor import get_image_processor

    assert "transformers" not in sys.modules, "the function does not need transformers"
    image = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    expected, (gh, gw) = get_image_processor(128, exact=True)(image)

    # `from transformers import AutoImageProcessor` asks for torchvision, the class itself does not.
    from transformers import PreTrainedConfig
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from hrvlm.images.transformers_processor import VLMImageProcessor, VLMImageProcessorPil
    from hrvlm.images.patches import patchify

    class Config(PreTrainedConfig):
        model_type = "has_no_torchvision"

    classes = {"torchvision": VLMImageProcessor, "pil": VLMImageProcessorPil}
    AutoImageProcessor.register(Config, image_processor_classes=classes, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        VLMImageProcessorPil(max_img_size=128).save_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder)
    assert type(processor) is VLMImageProcessorPil
    batch = processor(image, return_tensors="pt")
    assert batch["image_grid_hw"].tolist() == [[gh * 4, gw * 4]]
    assert (batch["pixel_values"] - patchify(expected, 16)).abs().max() < 1e-6
    try:
        VLMImageProcessor()
    except ImportError as error:
        assert "VLMImageProcessorPil" in str(error)
    else:
        raise AssertionError("VLMImageProcessor pretends to work")
"""


def test_without_torchvision():
    subprocess.run([sys.executable, "-c", WITHOUT_TORCHVISION], check=True)


def test_the_auto_class_finds_both_backends(tmp_path):
    from transformers import AutoImageProcessor, PreTrainedConfig

    class Config(PreTrainedConfig):
        model_type = "test_image_processing"

    classes = {"torchvision": VLMImageProcessor, "pil": VLMImageProcessorPil}
    AutoImageProcessor.register(Config, image_processor_classes=classes, exist_ok=True)
    VLMImageProcessor(max_img_size=128).save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is VLMImageProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path, backend="pil")) is VLMImageProcessorPil


@pytest.mark.gpu
def test_resized_on_a_gpu():
    image = picture(300, 500, "black and white")
    processor = VLMImageProcessor(max_img_size=448)
    here, there = (processor(image, device=d)["pixel_values"] for d in ("cpu", "cuda"))
    assert there.is_cuda
    grid = processor.get_patch_grid(300, 500)
    here, there = (unpatchify(x.cpu(), grid, 16) for x in (here, there))
    assert steps(here, there, IMAGENET.std) <= 2 + 1e-4


@pytest.mark.parametrize("backend", [VLMImageProcessor, VLMImageProcessorPil])
def test_patches_are_the_normalised_bytes_to_the_bit(backend):
    image = Image.fromarray(picture(100, 160, "black and white"))
    processor = backend(max_img_size=128, image_mean=SAT493M.mean, image_std=SAT493M.std)
    given = processor(image)
    size = token_grid(100, 160, max_img_size=128)
    pixels = load_pixels(image)
    pixels = resize_pixels(pixels, size.height, size.width, exact=processor.exact)
    assert pixels.dtype == torch.uint8
    expected = patchify(normalize(pixels, *SAT493M), 16)
    assert torch.equal(given["pixel_values"], expected)


@interpreter_only
@pytest.mark.parametrize("backend", [VLMImageProcessor, VLMImageProcessorPil])
def test_the_kernel_of_a_gpu_gives_the_same_patches(backend, monkeypatch):
    launched = []

    def on_a_gpu(images, *numbers):
        launched.append(tuple(images.shape))
        return normalize_patchify(images, *numbers, backend="triton")

    images = [picture(64, 128), picture(128, 64)]
    processor = backend(max_img_size=128)
    expected = processor(images)["pixel_values"]
    monkeypatch.setattr(transformers_processor, "normalize_patchify", on_a_gpu)
    torch.testing.assert_close(processor(images)["pixel_values"], expected)
    assert launched == [(1, 3, 64, 128), (1, 3, 128, 64)]
    processor(images, rescale_factor=1 / 256)
    assert len(launched) == 2
