"""From a file to bytes at a size, the fast way: what Pillow gives, within limits that are said."""

import contextlib
import io
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from hrvlm.images import intake
from hrvlm.images import pixels as module
from hrvlm.images.formats import ImageError
from hrvlm.images.intake import load_image
from hrvlm.images.pixels import (
    load_pixels,
    resize_pixels,
    torchvision_survives_damaged_png,
)
from hrvlm.images.processor import get_image_processor
from hrvlm.images.stills import PiecesFile
from hrvlm.images.transformers_processor import VLMImageProcessor, VLMImageProcessorPil

PLAIN = {
    "jpeg": dict(format="JPEG", quality=90),
    "jpeg 4:4:4": dict(format="JPEG", quality=95, subsampling=0),
    "jpeg 4:2:2": dict(format="JPEG", quality=30, subsampling=1),
    "jpeg 4:1:1": dict(format="JPEG", subsampling="4:1:1"),
    "progressive jpeg": dict(format="JPEG", progressive=True),
    "jpeg of RGB": dict(format="JPEG", keep_rgb=True),
    "jpeg with restarts": dict(format="JPEG", restart_marker_blocks=2),
    "png": dict(format="PNG"),
    "png of a gamma": dict(format="PNG", icc_profile=b"some profile"),
}


def noise(height, width, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(shape).integers(0, 256, shape, dtype=np.uint8)


def smooth(height, width):
    small = Image.fromarray(noise(height // 8 + 2, width // 8 + 2))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


def file_of(image, **options):
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(stream, **options)
    return stream.getvalue()


def by_pillow(data):
    return torch.from_numpy(np.array(load_image(data))).permute(2, 0, 1)


def difference(a, b):
    return (a.int() - b.int()).abs()


@pytest.fixture
def decoded(monkeypatch):
    """How often torchvision decoded a file."""
    counts, decode = [], module._decoded_by_torchvision

    def count(*arguments):
        result = decode(*arguments)
        counts.append(result is not None)
        return result

    monkeypatch.setattr(module, "_decoded_by_torchvision", count)
    return counts


def by_torchvision(data):
    """Whether it may decode this."""
    return data[:4] != b"\x89PNG" or torchvision_survives_damaged_png()


def test_torchvision_decodes_png_where_it_survives_a_damaged_one():
    """Ours to notice: a release that raises again may be used again."""
    data = bytearray(file_of(noise(29, 37), format="PNG"))
    data[-20] ^= 1
    code = (
        "import sys, torch; from torchvision.io import decode_png\n"
        "data = torch.frombuffer(bytearray(sys.stdin.buffer.read()), dtype=torch.uint8)\n"
        "try: decode_png(data)\nexcept RuntimeError: pass"
    )
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, input=bytes(data), capture_output=True)
    assert (child.returncode == 0) == torchvision_survives_damaged_png()


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_files_are_decoded_by_torchvision_to_the_same_pixels(kind, decoded):
    for i, (height, width) in enumerate([(1, 1), (7, 5), (33, 47), (120, 200)]):
        data = file_of((smooth if i % 2 else noise)(height, width), **PLAIN[kind])
        assert difference(load_pixels(data), by_pillow(data)).max() <= 2
    assert decoded == [by_torchvision(data)] * 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_plain_files_are_turned(orientation, format, decoded):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(smooth(24, 40), format=format, exif=exif)
    got, expected = load_pixels(data), by_pillow(data)
    assert got.shape == expected.shape == ((3, 24, 40) if orientation < 5 else (3, 40, 24))
    assert difference(got, expected).max() <= 2 and decoded == [by_torchvision(data)]
    if orientation > 4:  # as strided as it is, it is resized like any other
        small = resize_pixels(got, 20, 12)
        assert difference(small, resize_pixels(expected, 20, 12, exact=True)).max() <= 2


OTHERS = {
    "grey png": (noise(9, 7, 1), dict(format="PNG")),
    "png with alpha": (noise(9, 7, 4), dict(format="PNG")),
    "png with a colour key": (noise(9, 7) & 1, dict(format="PNG", transparency=(0, 0, 0))),
    "png of a palette": (Image.fromarray(noise(9, 7)).quantize(8), dict(format="PNG")),
    "png of 16 bits": (noise(9, 7, 1).astype(np.uint16) * 257, dict(format="PNG")),
    "grey jpeg": (noise(9, 7, 1), dict(format="JPEG")),
    "cmyk jpeg": (Image.fromarray(noise(9, 7, 4), "CMYK"), dict(format="JPEG")),
    "webp": (noise(9, 7), dict(format="WEBP", lossless=True)),
    "bmp": (noise(9, 7), dict(format="BMP")),
    "tiff": (noise(9, 7), dict(format="TIFF")),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_all_other_files_are_pillows(kind, decoded):
    image, options = OTHERS[kind]
    data = file_of(image, **options)
    assert torch.equal(load_pixels(data), by_pillow(data)) and not decoded
    assert torch.equal(load_pixels(data, exact=True), by_pillow(data))


@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg", "jpeg with restarts", "png"])
def test_damaged_files_are_accepted_and_refused_as_by_pillow(kind, capfd):
    whole, dice = file_of(smooth(40, 56), **PLAIN[kind]), np.random.default_rng(1)

    def outcome(exact):
        try:
            return tuple(load_pixels(data, exact=exact, name=3, max_pixels=10**6).shape)
        except ImageError as error:
            return str(error)

    refused = 0
    for i in range(60):
        at = int(dice.integers(2, len(whole)))
        if i % 2:
            data = whole[:at]
        else:
            data = whole[:at] + bytes(dice.integers(0, 256, 2, dtype=np.uint8)) + whole[at + 2 :]
        assert outcome(False) == outcome(True)
        refused += isinstance(outcome(True), str)
    assert refused > 20
    capfd.readouterr()  # what libjpeg and libpng print


def test_a_plain_file_with_much_behind_its_pixels_is_read_piece_by_piece(decoded, monkeypatch):
    monkeypatch.setattr(module, "SPARE_BYTES", 100_000)
    data = file_of(noise(16, 16), format="JPEG")
    assert torch.equal(load_pixels(data + bytes(200_000)), by_pillow(data))
    assert difference(load_pixels(data), by_pillow(data)).max() <= 2
    assert decoded == [False, True]


SIZES = [
    ((100, 150), (448, 448)), ((700, 500), (192, 128)), ((1000, 37), (64, 64)),
    ((1, 300), (64, 512)), ((2000, 3), (512, 64)), ((301, 299), (288, 288)),
    ((64, 64), (128, 64)), ((1500, 1000), (32, 64)), ((96, 96), (96, 96)),
]  # fmt: skip


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("kind", ["noise", "black and white", "smooth"])
def test_resized_pixels_are_pillows_to_two_steps(kind, resample):
    for before, after in SIZES:
        image = smooth(*before) if kind == "smooth" else noise(*before)
        if kind == "black and white":
            image = image // 128 * 255
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        got = resize_pixels(pixels, *after, resample)
        assert got.dtype == torch.uint8 and got.shape == (3, *after)
        off = difference(got, resize_pixels(pixels, *after, resample, exact=True)).float()
        assert off.max() <= 2 and off.mean() < 0.1, (before, after)


def test_resizing_on_floats_as_on_a_gpu_is_pillows_to_one_step():
    for before, after in SIZES:
        pixels = torch.from_numpy(noise(*before)).permute(2, 0, 1)
        got = module._resized_on_floats(pixels, *after, Image.Resampling.BICUBIC)
        off = difference(got, resize_pixels(pixels, *after, exact=True)).float()
        assert off.max() <= 1 and off.mean() < 0.01
    assert resize_pixels(torch.empty(3, 9, 9, dtype=torch.uint8, device="meta"), 4, 5).is_meta


@pytest.mark.parametrize("make", [VLMImageProcessor, get_image_processor])
def test_exact_is_what_pillow_gives(make):
    data = file_of(noise(90, 130), format="JPEG")

    def numbers(exact):
        result = make(max_img_size=256, exact=exact)(data)
        return result["pixel_values"] if make is VLMImageProcessor else result[0]

    exact, fast = numbers(True), numbers(False)
    step = 1 / (255 * 0.224)
    assert not torch.equal(exact, fast) and (exact - fast).abs().max() <= 2.01 * step
    if make is VLMImageProcessor:
        pillow = VLMImageProcessorPil(max_img_size=256)
        assert torch.equal(pillow(data)["pixel_values"], exact)
        assert torch.equal(pillow(data, exact=False)["pixel_values"], fast)
        assert pillow.to_dict()["exact"] and not make().to_dict()["exact"]
    with pytest.raises(ValueError, match="exact='yes': expected True or False"):
        make(max_img_size=256, exact="yes")


def test_a_batch_by_threads_is_the_same_and_names_its_images():
    files = [file_of(smooth(40 + i, 90 - i), format="JPEG") for i in range(9)]
    processor = VLMImageProcessor(max_img_size=128)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = processor(files)
        torch.set_num_threads(3)
        together = processor(files)
        with pytest.raises(ImageError, match=r"^image 4 .*truncated or corrupt"):
            processor([*files[:4], files[4][:-300], *files[5:], b"no image"])
    finally:
        torch.set_num_threads(threads)
    for key in ("pixel_values", "image_grid_hw"):
        assert torch.equal(alone[key], together[key])


def test_a_length_that_a_file_claims_is_not_allocated():
    data = bytearray(file_of(noise(29, 37), format="PNG"))
    data[-12:-8] = (2**31 - 1).to_bytes(4, "big")  # of the last block, which has no bytes
    tracemalloc.start()
    try:
        with contextlib.suppress(ImageError):
            load_image(bytes(data), max_pixels=10**6)
        assert PiecesFile(None, [bytes(data)]).read(2**31) == data
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_pixels_that_pillow_decodes_are_held_once_beside_its_image():
    data = file_of(noise(2000, 1500, 1), format="PNG")
    load_pixels(data)  # what it imports is no part of it
    tracemalloc.start()
    try:
        pixels = load_pixels(data)
        peak = tracemalloc.get_traced_memory()[1]  # Pillow's own are not counted
    finally:
        tracemalloc.stop()
    assert torch.equal(pixels, by_pillow(data))
    assert peak < 3 * 2000 * 1500 + 2 * 3 * intake._STRIPE_PIXELS + 10**6


def test_a_cut_png_is_refused_alike_where_its_pixels_are_all_there():
    data = file_of(noise(29, 37), format="PNG")
    pixels = data[33:-12]
    cut = data[:33] + pixels + pixels[:-1000]
    for read in (load_image, load_pixels):
        with pytest.raises(ImageError, match="truncated or corrupt"):
            read(cut)
    no_end = data[:33] + pixels
    assert torch.equal(load_pixels(no_end), by_pillow(no_end))
