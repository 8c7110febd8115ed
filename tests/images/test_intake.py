"""Any image in, upright RGB out: exact pixels for every format, and errors that name the image."""

import base64
import io
import random
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from hrvlm.images.intake import MAX_PIXELS, ImageError, load_image

R, G, B = (255, 0, 0), (0, 255, 0), (0, 0, 255)
W, K, Y = (255, 255, 255), (0, 0, 0), (255, 255, 0)
# 2 rows, 3 columns, all different: any flip, turn or transposition shows.
CORNERS = np.array([[R, G, B], [W, K, Y]], dtype=np.uint8)


def encode(image, fmt="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def png(width, height, bit_depth, color_type, rows, chunks=()):
    """A PNG of raw rows (bytes), for the depths that Pillow does not write."""

    def chunk(tag, data):
        body = tag + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*p) for p in parts)


def pixels(source, **options):
    image = load_image(source, **options)
    assert isinstance(image, Image.Image) and image.mode == "RGB"
    return np.asarray(image)


def shows(source, expected, **options):
    expected = np.array(expected, dtype=np.uint8)
    np.testing.assert_array_equal(pixels(source, **options), expected)


def over(color, alpha, under=255):
    """The definition of compositing, in integers: round((c * a + bg * (255 - a)) / 255)."""
    under = (under,) * 3 if isinstance(under, int) else under
    mixed = [2 * (c * alpha + u * (255 - alpha)) + 255 for c, u in zip(color, under, strict=True)]
    return tuple(x // 510 for x in mixed)


# Sources


def test_every_kind_of_source(tmp_path):
    image = Image.fromarray(CORNERS)
    data = encode(image)
    path = tmp_path / "corners.png"
    path.write_bytes(data)
    stream = io.BytesIO(data)
    stream.seek(0, io.SEEK_END)  # as after writing it
    with open(path, "rb") as file:
        for source in (path, str(path), data, bytearray(data), memoryview(data), stream, file):
            shows(source, CORNERS)
        assert not file.closed and not stream.closed
    for source in (image, Image.open(path), CORNERS, torch.from_numpy(CORNERS)):
        shows(source, CORNERS, channels="last")
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (uri, {"bytes": data, "path": None}, {"path": str(path)}, {"url": uri}):
        shows(source, CORNERS)
    own = load_image({"bytes": image})
    assert own is not image and own.tobytes() == image.tobytes()


def test_a_stream_that_cannot_seek():
    class Pipe(io.RawIOBase):
        def __init__(self, data):
            self.left = data

        def readable(self):
            return True

        def read(self, size=-1):
            data, self.left = self.left, b""
            return data

    shows(Pipe(encode(Image.fromarray(CORNERS))), CORNERS)


def test_the_callers_image_is_left_as_it_was():
    palette = Image.fromarray(CORNERS).quantize(6)
    palette.info["transparency"] = bytes([0, 128, 255, 7, 8, 9])
    for image in (Image.fromarray(CORNERS), palette):
        before = (image.mode, image.tobytes(), image.getpalette("RGBA"), dict(image.info))
        result = load_image(image)
        result.paste((9, 9, 9), (0, 0, 3, 2))
        assert (image.mode, image.tobytes(), image.getpalette("RGBA"), image.info) == before
    array = CORNERS.copy()
    load_image(array, channels="last").paste((9, 9, 9), (0, 0, 3, 2))
    np.testing.assert_array_equal(array, CORNERS)


# Orientation

FIRST_ROW = {  # EXIF orientation -> what CORNERS, stored, shows: its rows from the top
    1: [[R, G, B], [W, K, Y]],
    2: [[B, G, R], [Y, K, W]],
    3: [[Y, K, W], [B, G, R]],
    4: [[W, K, Y], [R, G, B]],
    5: [[R, W], [G, K], [B, Y]],
    6: [[W, R], [K, G], [Y, B]],
    7: [[Y, B], [K, G], [W, R]],
    8: [[B, Y], [G, K], [R, W]],
}


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "WEBP", "memory"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, fmt):
    image, exif = Image.fromarray(CORNERS), Image.Exif()
    exif[0x0112] = orientation
    if fmt == "memory":
        image.info["exif"] = exif.tobytes()
        source = image
    else:
        source = encode(image, fmt, exif=exif, **({"lossless": True} if fmt == "WEBP" else {}))
    shows(source, FIRST_ROW[orientation])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_a_photograph(orientation):
    # 16 px per corner colour, so that JPEG keeps them apart.
    exif = Image.Exif()
    exif[0x0112] = orientation
    big = Image.fromarray(CORNERS).resize((48, 32), Image.Resampling.NEAREST)
    data = encode(big, "JPEG", quality=100, subsampling=0, exif=exif)
    got = pixels(data)[8::16, 8::16].astype(int)
    assert abs(got - np.array(FIRST_ROW[orientation])).max() <= 3


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "WEBP"])
def test_loading_twice_is_loading_once(fmt):
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = np.dstack([CORNERS, np.full((2, 3), 90, np.uint8)])
    for array in (CORNERS, rgba):
        options = {"lossless": True} if fmt == "WEBP" else {}
        once = load_image(encode(Image.fromarray(array), fmt, exif=exif, **options))
        assert once.size == (2, 3) and once.info == {}
        shows(once, np.asarray(once))


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_out_of_range_means_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    shows(encode(Image.fromarray(CORNERS), exif=exif), CORNERS)


def test_unreadable_exif_is_reported_and_the_pixels_kept():
    image = Image.fromarray(CORNERS)
    image.info["exif"] = b"neither little nor big endian"
    with pytest.warns(UserWarning, match=r"image 4: taken as upright, its EXIF is unreadable"):
        shows(image, CORNERS, name=4)


def test_orientation_comes_with_transparency_and_16_bits():
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = np.dstack([CORNERS, np.full((2, 3), 0, np.uint8)])
    rgba[0, 0, 3] = 255  # only the red corner is opaque
    shows(encode(Image.fromarray(rgba), exif=exif), [[W, R], [W, W], [W, W]])
    deep = Image.fromarray(np.array([[0, 257], [514, 65535], [771, 1028]], dtype=np.uint16))
    expected = np.repeat(np.array([[3, 2, 0], [4, 255, 1]], np.uint8)[..., None], 3, axis=2)
    shows(encode(deep, exif=exif), expected)


# Alpha


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 77)])
def test_rgba_is_composited_on_the_background(background):
    colors = [(200, 100, 0), (1, 2, 3), (255, 0, 128)]
    alphas = [*range(0, 256, 5), 254, 255]
    rgba = np.array([[(*c, a) for a in alphas] for c in colors], dtype=np.uint8)
    expected = [[over(c, a, background) for a in alphas] for c in colors]
    image = Image.fromarray(rgba)
    for source in (image, encode(image), rgba):
        shows(source, expected, background=background, channels="last")
    shows(rgba.transpose(2, 0, 1), expected, background=background, channels="first")


def test_white_is_the_default_background():
    clear = Image.new("RGBA", (1, 1), (12, 34, 56, 0))
    shows(clear, [[W]])


def test_grey_with_alpha():
    grey, alpha = bytes([0, 0, 100, 255]), bytes([255, 0, 128, 3])
    image = Image.merge("LA", [Image.frombytes("L", (4, 1), v) for v in (grey, alpha)])
    under = (9, 99, 199)
    expected = [[over((g,) * 3, a, under) for g, a in zip(grey, alpha, strict=True)]]
    for source in (image, encode(image)):
        shows(source, expected, background=under)


def test_premultiplied_alpha():
    rgba = Image.new("RGBA", (1, 1), (255, 0, 255, 51))
    shows(rgba.convert("RGBa"), [[over((255, 0, 255), 51)]])
    la = Image.merge("LA", [Image.new("L", (1, 1), 255), Image.new("L", (1, 1), 51)])
    shows(la.convert("La"), [[over((255, 255, 255), 51, 0)]], background=(0, 0, 0))


def indexed(indices, colors):
    image = Image.new("P", (len(indices), 1))
    image.putpalette([v for c in colors for v in c])
    image.putdata(indices)
    return image


@pytest.mark.parametrize("fmt", ["PNG", "GIF", "memory"])
def test_a_palette_with_one_transparent_index(fmt):
    image = indexed([0, 1, 2, 1], [R, G, B])
    image.info["transparency"] = 1
    source = image if fmt == "memory" else encode(image, fmt, transparency=1)
    if fmt != "memory":
        assert Image.open(io.BytesIO(source)).info["transparency"] == 1
    shows(source, [[R, Y, B, Y]], background=Y)


@pytest.mark.parametrize("fmt", ["PNG", "memory"])
def test_a_palette_with_an_alpha_for_each_index(fmt):
    image, alphas = indexed([0, 1, 2, 1], [R, G, B]), bytes([255, 40, 130])
    image.info["transparency"] = alphas
    source = image if fmt == "memory" else encode(image, fmt, transparency=alphas)
    if fmt != "memory":
        assert Image.open(io.BytesIO(source)).info["transparency"] == alphas
    shows(source, [[R, over(G, 40), over(B, 130), over(G, 40)]])


def test_a_palette_with_alpha_in_it():
    image = Image.new("P", (2, 1))
    image.putpalette([*R, 255, *G, 64], "RGBA")
    image.putdata([0, 1])
    shows(image, [[R, over(G, 64)]])
    pa = Image.merge("PA", [indexed([1, 0], [R, G]), Image.frombytes("L", (2, 1), b"\x40\xff")])
    shows(
        pa,
        [
            [
                over(pa.convert("RGBA").getpixel((0, 0))[:3], 64),
                pa.convert("RGBA").getpixel((1, 0))[:3],
            ]
        ],
    )


def test_a_palette_without_transparency():
    shows(encode(indexed([2, 0, 1], [R, G, B])), [[B, R, G]])


@pytest.mark.parametrize("mode", ["L", "1"])
def test_a_colour_key_on_grey(mode):
    image = Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode)
    shows(encode(image, transparency=255), [[K, B]], background=B)


def test_a_colour_key_on_rgb():
    shows(encode(Image.fromarray(CORNERS), transparency=K), [[R, G, B], [W, G, Y]], background=G)


@pytest.mark.parametrize(("depth", "row", "scale"), [(2, 0b00011011, 85), (4, 0x12, 17), (8, 7, 1)])
def test_a_colour_key_below_8_bits(depth, row, scale):
    # Samples of 2 and 4 bits are widened to 0..255; the key in the file is not.
    samples = {2: [0, 1, 2, 3], 4: [1, 2], 8: [7]}[depth]
    data = png(
        len(samples), 1, depth, 0, [bytes([row])], [(b"tRNS", struct.pack(">H", samples[-1]))]
    )
    shows(data, [[(s * scale,) * 3 for s in samples[:-1]] + [B]], background=B)


def test_a_colour_key_on_16_bits():
    grey = png(
        3, 1, 16, 0, [struct.pack(">3H", 0, 771, 65535)], [(b"tRNS", struct.pack(">H", 771))]
    )
    shows(grey, [[K, B, W]], background=B)
    row = struct.pack(">6H", 0, 771, 65535, 257, 514, 771)
    rgb = png(2, 1, 16, 2, [row], [(b"tRNS", struct.pack(">3H", 257, 514, 771))])
    shows(rgb, [[(0, 3, 255), B]], background=B)


# Other colour spaces and depths


def test_black_and_white_and_grey():
    grey = np.array([[0, 1, 128, 255]], dtype=np.uint8)
    expected = [[(v, v, v) for v in grey[0].tolist()]]
    for source in (Image.fromarray(grey), encode(Image.fromarray(grey)), grey):
        shows(source, expected)
    bits = Image.fromarray(np.array([[True, False, True]]))
    assert bits.mode == "1"
    for source in (bits, encode(bits), encode(bits, "TIFF"), np.array([[True, False, True]])):
        shows(source, [[W, K, W]])


@pytest.mark.parametrize("fmt", ["TIFF", "JPEG", "memory"])
def test_cmyk(fmt):
    # 16 px per colour for JPEG; its CMYK is stored inverted with an Adobe marker.
    inks = {
        (0, 0, 0, 0): W,
        (0, 255, 255, 0): R,
        (255, 0, 255, 0): G,
        (0, 0, 0, 255): K,
        (51, 0, 0, 51): (163, 204, 204),
    }
    cmyk = Image.new("CMYK", (16 * len(inks), 16))
    for i, ink in enumerate(inks):
        cmyk.paste(ink, (16 * i, 0, 16 * i + 16, 16))
    source = (
        cmyk
        if fmt == "memory"
        else encode(cmyk, fmt, **({"quality": 100} if fmt == "JPEG" else {}))
    )
    if fmt == "JPEG":
        assert b"Adobe" in source
    got = pixels(source)[8, 8::16].astype(int)
    assert abs(got - np.array(list(inks.values()))).max() <= (2 if fmt == "JPEG" else 0)


def test_ycbcr_hsv_and_lab():
    ycbcr = Image.merge("YCbCr", [Image.new("L", (1, 1), v) for v in (76, 85, 255)])
    shows(ycbcr, [[(254, 0, 0)]])
    hsv = Image.merge("HSV", [Image.new("L", (1, 1), v) for v in (0, 255, 200)])
    shows(hsv, [[(200, 0, 0)]])
    for lab, color in {(255, 128, 128): W, (0, 128, 128): K, (138, 209, 198): R}.items():
        image = Image.merge("LAB", [Image.new("L", (1, 1), v) for v in lab])
        assert (
            abs(pixels(image)[0, 0].astype(int) - color).max() <= 6
        )  # 8-bit Lab is coarser than RGB


DEEP = np.array([[0, 128, 129, 257, 1000, 32768, 65406, 65407, 65535]], dtype=np.uint16)
DEEP_8 = [[(v, v, v) for v in (0, 0, 1, 1, 4, 128, 254, 255, 255)]]


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N", "I"])
def test_16_bit_modes(mode):
    order = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "I;16N": "=u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, DEEP.shape[::-1], DEEP.astype(order).tobytes())
    shows(image, DEEP_8)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_files(order):
    image = Image.fromarray(DEEP.astype(order))
    shows(encode(image, "TIFF"), DEEP_8)
    shows(encode(Image.fromarray(DEEP)), DEEP_8)
    shows(encode(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), DEEP_8)
    pgm = b"P5 9 1 65535\n" + DEEP.astype(">u2").tobytes()
    shows(pgm, DEEP_8)


def test_16_bit_arrays():
    shows(DEEP, DEEP_8)
    shows(DEEP.astype(">u2"), DEEP_8)
    shows(torch.from_numpy(DEEP), DEEP_8)
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    exact = (2 * every.astype(np.int64) + 257) // 514
    np.testing.assert_array_equal(pixels(every), np.repeat(exact[..., None], 3, axis=2))


def test_16_bit_colour_and_alpha_files():
    row = struct.pack(">3H", 257 * 10, 257 * 20, 257 * 30)
    shows(png(1, 1, 16, 2, [row]), [[(10, 20, 30)]])
    row = struct.pack(">4H", 257 * 10, 257 * 20, 257 * 30, 257 * 40)
    shows(png(1, 1, 16, 6, [row]), [[over((10, 20, 30), 40)]])
    row = struct.pack(">2H", 257 * 10, 257 * 40)
    shows(png(1, 1, 16, 4, [row]), [[over((10,) * 3, 40)]])


@pytest.mark.parametrize("bad", [-1, 65536, 2**31 - 1])
def test_integers_beyond_16_bits_are_refused(bad):
    image = Image.fromarray(np.array([[0, bad]], dtype=np.int32))
    with pytest.raises(ImageError, match=r"image 2: expected 16-bit pixels, 0 to 65535"):
        load_image(image, name=2)


def test_32_bits_without_a_sign_have_none_in_the_error():
    stream = io.BytesIO()
    tifffile.imwrite(stream, np.full((2, 2), 4_000_000_000, np.uint32))
    for source in (stream, Image.open(stream)):
        with pytest.raises(ImageError, match=r"0 to 65535, got 4000000000 to 4000000000"):
            load_image(source, name=2)


FLOATS = [0.0, 0.1, 1 / 255, 0.5, 254.4 / 255, 1.0, -0.4 / 255, 255.4 / 255]
FLOATS_8 = [[(v, v, v) for v in (0, 26, 1, 128, 254, 255, 0, 255)]]


def test_float_images_and_arrays():
    array = np.array([FLOATS])
    for dtype in (np.float32, np.float64, ">f4"):
        shows(array.astype(dtype), FLOATS_8)
    shows(Image.fromarray(array.astype(np.float32)), FLOATS_8)
    shows(encode(Image.fromarray(array.astype(np.float32)), "TIFF"), FLOATS_8)
    shows(torch.tensor([FLOATS], dtype=torch.float32, requires_grad=True), FLOATS_8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_uint8_survives_the_way_through_floats(dtype):
    exact = torch.arange(256, dtype=torch.float64).div(255).reshape(16, 16)
    got = pixels(exact.to(dtype))[..., 0].reshape(-1).astype(int)
    # bfloat16 has 8 bits of mantissa: half a unit in the last place of 1.0 is half a step here.
    assert abs(got - np.arange(256)).max() <= (1 if dtype == torch.bfloat16 else 0)


def test_the_largest_float_that_still_rounds_to_255():
    edge = np.float32(255.5 / 255)  # just below it, yet 255.5 once multiplied by 255
    assert float(edge) < 255.5 / 255
    shows(np.full((1, 1), edge), [[W]])
    with pytest.raises(ImageError, match=r"\[0, 1\]"):
        load_image(np.full((1, 1), 255.5 / 255))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 255.0, -0.01, 1.01, 2.5, -2.1])
def test_floats_out_of_range_are_refused(bad):
    array = np.array([[0.5, bad]])
    message = (
        r"image 7: float pixels contain NaN" if not np.isfinite(bad) else r"image 7: .*\[0, 1\]"
    )
    sources = [array, array.astype(np.float16), torch.from_numpy(array)]
    sources.append(Image.fromarray(array.astype(np.float32)))
    for source in sources:
        with pytest.raises(ImageError, match=message):
            load_image(source, name=7)


@pytest.mark.parametrize("fmt", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_of_several_frames(fmt):
    frames = [Image.new("RGB", (2, 1), c) for c in (R, G, B)]
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = encode(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    shows(data, [[R, R]])


def test_of_a_pillow_image_the_frame_it_stands_at():
    frames = [Image.new("RGB", (1, 1), c) for c in (R, G, B)]
    image = Image.open(
        io.BytesIO(encode(frames[0], "TIFF", save_all=True, append_images=frames[1:]))
    )
    image.seek(1)
    shows(image, [[G]])
    assert image.tell() == 1


# Arrays


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_array_layouts(make):
    grey = np.arange(10, dtype=np.uint8).reshape(2, 5)
    rgb = np.arange(30, dtype=np.uint8).reshape(2, 5, 3)
    rgba = np.dstack([rgb, np.full((2, 5), 255, np.uint8)])
    spread = np.repeat(grey[..., None], 3, axis=2)
    for array, expected in ((grey, spread), (grey[..., None], spread), (rgb, rgb), (rgba, rgb)):
        shows(make(array), expected)
        if array.ndim == 3:
            shows(make(array.transpose(2, 0, 1).copy()), expected)
    assert load_image(make(rgb)).size == (5, 2)


def test_strided_arrays():
    base = np.arange(4 * 10 * 3, dtype=np.uint8).reshape(4, 10, 3)
    shows(base[::-2, ::2], base[::-2, ::2].copy())
    shows(torch.from_numpy(base)[::2, 1::2], base[::2, 1::2].copy())


@pytest.mark.parametrize(
    "shape", [(3, 5, 3), (4, 9, 3), (3, 9, 4), (1, 9, 3), (3, 9, 1), (1, 1, 1)]
)
def test_an_ambiguous_layout_has_to_be_named(shape):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    for source in (array, torch.from_numpy(array)):
        with pytest.raises(
            ImageError, match=rf"image 5: shape {'x'.join(map(str, shape))} .*channels="
        ):
            load_image(source, name=5)
        assert load_image(source, channels="last").size == (shape[1], shape[0])
        assert load_image(source, channels="first").size == (shape[2], shape[1])
    if shape == (3, 5, 3):
        shows(array, array, channels="last")
        shows(array, array.transpose(1, 2, 0), channels="first")


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((), {}, r"got 0 axes"),
        ((5,), {}, r"got 1 axes \(5\)"),
        ((1, 3, 8, 8), {}, r"got 4 axes \(1x3x8x8\)"),
        ((8, 8, 2), {}, r"shape 8x8x2 has no axis of 1, 3 or 4 channels as its first or last"),
        ((3, 8, 8), {"channels": "last"}, r"shape 3x8x8 .* as its last"),
        ((8, 8, 3), {"channels": "first"}, r"shape 8x8x3 .* as its first"),
        ((0, 8), {}, r"no pixels"),
        ((8, 0, 3), {}, r"no pixels: shape 8x0x3"),
        ((3, 0, 8), {}, r"no pixels"),
        ((8, 8, 0), {}, r"no pixels"),
    ],
)
def test_shapes_that_are_no_image(shape, options, message):
    for source in (np.zeros(shape, np.uint8), torch.zeros(shape, dtype=torch.uint8)):
        with pytest.raises(ImageError, match=rf"^image 3\b.*{message}"):
            load_image(source, name=3, **options)


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "uint32", "complex64", "object"]
)
def test_dtypes_without_an_agreed_range(dtype):
    with pytest.raises(ImageError, match=rf"image 0: dtype {dtype}"):
        load_image(np.zeros((2, 2), dtype), name=0)


# What is no image

NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
GOOD = encode(Image.fromarray(NOISE))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"<!DOCTYPE html><html></html>", r"is not an image .*<!DOCTYPE"),
        (b"\0" * 100, r"is not an image|header"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", r"is not an image"),
        (GOOD[:20], r"is not an image|header|truncated"),
        (GOOD[:-200], r"truncated or corrupt"),
        (GOOD[:200] + bytes(50) + GOOD[250:], r"truncated or corrupt|header"),
        (encode(Image.open(io.BytesIO(GOOD)), "JPEG")[:-300], r"truncated or corrupt"),
        (
            encode(Image.open(io.BytesIO(GOOD)), "WEBP")[:-300],
            r"truncated or corrupt|header|not an image",
        ),
        (encode(Image.open(io.BytesIO(GOOD)), "TIFF")[:-300], r"truncated or corrupt|header"),
        (encode(Image.open(io.BytesIO(GOOD)), "GIF")[:-300], r"truncated or corrupt"),
        (encode(Image.open(io.BytesIO(GOOD)), "BMP")[:-300], r"truncated or corrupt"),
    ],
    ids=[
        "empty",
        "html",
        "zeros",
        "postscript",
        "stub",
        "cut",
        "corrupt",
        "jpeg",
        "webp",
        "tiff",
        "gif",
        "bmp",
    ],
)
def test_bad_files_are_named(data, message, tmp_path):
    path = tmp_path / "holiday photo.bin"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=rf"^'.*holiday photo\.bin'.*({message})"):
        load_image(path)
    with pytest.raises(ImageError, match=rf"^image 11 .*({message})"):
        load_image(data, name=11)
    with open(path, "rb") as file, pytest.raises(ImageError, match=r"^image 11 \('.*holiday photo"):
        load_image(file, name=11)


def test_a_truncated_file_that_pillow_has_already_opened(tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(GOOD[:-200])
    with pytest.raises(ImageError, match=r"image 1 \('.*cut\.png'\) is truncated"):
        load_image(Image.open(path), name=1)


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damaged_bytes_give_an_image_or_an_error_of_ours(fmt):
    dice = random.Random(7)
    data = encode(Image.fromarray(NOISE[:16, :24]), fmt)
    refused = 0
    for _ in range(40):
        broken = bytearray(data)
        for _ in range(dice.randint(1, 6)):
            broken[dice.randrange(len(broken))] = dice.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert (
                    load_image(broken[: dice.randint(1, len(broken))], max_pixels=10**6).mode
                    == "RGB"
                )
            except ImageError:
                refused += 1
    assert refused


def test_urls_are_not_fetched():
    for url in (
        "http://a.org/b.png",
        "https://a.org/b.png",
        "s3://a/b",
    ):
        with pytest.raises(ImageError, match=r"image 2 .* is a URL: download it first"):
            load_image(url, name=2)


def test_missing_files_and_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(OSError, match=tmp_path.name):
        load_image(tmp_path)


@pytest.mark.parametrize(
    "source",
    [None, 3, 3.5, [1, 2], {"pathe": "x"}, object()],
    ids=lambda value: type(value).__name__,
)
def test_other_types(source):
    with pytest.raises(TypeError, match=rf"image 6: expected a path.*got {type(source).__name__}"):
        load_image(source, name=6)


@pytest.mark.parametrize("source", ["a" * 5000, "a\0b.png"])
def test_a_text_that_is_no_path(source):
    with pytest.raises(ImageError, match=r"image 6 \('.*can't be a path.* base64") as raised:
        load_image(source, name=6)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 8, 8, device="meta"),
        torch.zeros(8, 8).to_sparse(),
        torch.zeros(3, 8, 8).to(torch.float8_e4m3fn),
    ],
    ids=["meta", "sparse", "float8"],
)
def test_a_tensor_without_pixels_to_read(tensor):
    with pytest.raises(ImageError, match=r"image 6: a torch\.\w+ tensor of torch\.float\w+ on"):
        load_image(tensor, name=6)


def test_a_text_stream():
    with pytest.raises(TypeError, match=r"binary mode.*str"):
        load_image(io.StringIO("P1 1 1 0"))


def test_an_image_without_pixels():
    with pytest.raises(ImageError, match=r"image 0 has no pixels: height 5, width 0"):
        load_image(Image.new("RGB", (0, 5)), name=0)


# The pixel limit


def test_the_limit_counts_for_every_source():
    image = Image.new("RGB", (6, 4))
    array = np.array(image)
    for source in (image, encode(image), array, torch.from_numpy(array)):
        assert load_image(source, max_pixels=24, channels="last").size == (6, 4)
        with pytest.raises(ImageError, match=r"image 8 is over the pixel limit: .* = 24, .*=23"):
            load_image(source, max_pixels=23, name=8, channels="last")


@pytest.mark.parametrize("side", [20_000, 2**31 - 1])
def test_the_limit_is_read_from_the_header(side):
    # No pixel data at all: to decode anything would fail in another way.
    with pytest.raises(ImageError, match=r"over the pixel limit"):
        load_image(png(side, side, 8, 2, []))
    assert MAX_PIXELS < 20_000**2


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "GIF", "BMP"])
@pytest.mark.parametrize("global_limit", [3000, 100])
def test_pillows_own_limit_does_not_interfere(fmt, global_limit, monkeypatch):
    # 64 * 48 pixels: Image.open warns at the first limit, and raises at the other.
    data = encode(Image.open(io.BytesIO(GOOD)), fmt)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", global_limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(data).size == (64, 48)
    assert global_limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("fmt", ["TIFF", "WEBP"])
def test_decoders_with_a_limit_of_their_own_say_so(fmt, monkeypatch):
    data = encode(Image.open(io.BytesIO(GOOD)), fmt)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    try:
        Image.OPEN[fmt][0](io.BytesIO(data), "").load()  # past the check of Image.open
    except Image.DecompressionBombError:
        pass
    else:
        pytest.skip(f"this Pillow has no limit of its own for {fmt}")
    with pytest.raises(ImageError, match=r"image 3: .*MAX_IMAGE_PIXELS, whatever max_pixels"):
        load_image(data, name=3)


@pytest.mark.parametrize("bad", [0, -1, 1.5, None, True, "9"], ids=repr)
def test_max_pixels_is_checked(bad):
    with pytest.raises(ValueError, match=r"max_pixels="):
        load_image(CORNERS, channels="last", max_pixels=bad)


@pytest.mark.parametrize(
    "bad", [None, 255, (1, 2), (1, 2, 3, 4), (0, 0, 256), (0, 0, 0.5), "white"], ids=repr
)
def test_background_is_checked(bad):
    with pytest.raises(ValueError, match=r"background="):
        load_image(CORNERS, channels="last", background=bad)


def test_channels_is_checked():
    with pytest.raises(ValueError, match=r"channels='middle'"):
        load_image(CORNERS, channels="middle")


def test_importing_changes_nothing_of_pillow():
    code = """if True:
        import sys
        from PIL import Image, ImageFile
        before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
        import hrvlm.images.intake
        assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
        assert not {"torchvision", "triton", "transformers"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)
