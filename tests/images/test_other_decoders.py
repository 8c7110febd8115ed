"""What Pillow makes of files against what tifffile, imagecodecs and OpenCV make of them."""

import io
import itertools
import struct

import numpy as np
import pytest
from PIL import Image

from hrvlm.images.intake import ImageError, load_image
from hrvlm.images.pillow_faults import _white_is_black

cv2 = pytest.importorskip("cv2")
imagecodecs = pytest.importorskip("imagecodecs")
tifffile = pytest.importorskip("tifffile")

H, W = 16, 24
DICE = np.random.default_rng(0)
ORDERS = pytest.mark.parametrize("order", "<>")


def noise(bits, *channels):
    """Of every value there is, both ends included."""
    values = DICE.integers(0, 1 << bits, (H, W, *channels))
    values[0, 0], values[0, 1] = 0, (1 << bits) - 1
    return values.astype(np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32)


def to_8_bits(values, bits):
    return np.floor(np.asarray(values, float) * 255 / ((1 << bits) - 1) + 0.5).astype(int)


def shows(data, expected, steps=0):
    expected = np.asarray(expected).astype(int)
    if expected.ndim == 2:
        expected = np.repeat(expected[..., None], 3, axis=2)
    for source in (data, Image.open(io.BytesIO(data))):
        got = np.asarray(load_image(source)).astype(int)
        np.testing.assert_allclose(got, expected, rtol=0, atol=steps)


def pillow_reads(data):
    """Whether this Pillow's libtiff has the compression."""
    try:
        Image.open(io.BytesIO(data)).load()
    except OSError:
        return False
    return True


def tiff(array, **options):
    """A file by tifffile, and what it reads of it, channels last."""
    stream = io.BytesIO()
    try:
        tifffile.imwrite(stream, array, metadata=None, **options)
    except NotImplementedError as error:  # the last imagecodecs for Python 3.10
        pytest.skip(f"this imagecodecs does not write it: {error}")
    read = tifffile.imread(io.BytesIO(stream.getvalue()))
    return stream.getvalue(), read


def tiff_of_tags(data, tags, order="<"):
    """One strip, for tags that tifffile does not write."""
    tags = {256: ("H", [W]), 257: ("H", [H]), 259: ("H", [1]), 273: ("I", [8])} | tags
    tags |= {278: ("H", [H]), 279: ("I", [len(data)])}
    data += bytes(len(data) % 2)
    start = 8 + len(data)
    entries, tail = b"", b""
    for tag, (kind, values) in sorted(tags.items()):
        raw = b"".join(struct.pack(order + kind, *np.ravel(value).tolist()) for value in values)
        if len(raw) > 4:
            tail, raw = tail + raw, struct.pack(order + "I", start + 6 + 12 * len(tags) + len(tail))
        code = {"H": 3, "I": 4, "II": 5}[kind]
        entries += struct.pack(order + "HHI", tag, code, len(values)) + raw.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    directory = struct.pack(order + "H", len(tags)) + entries + bytes(4) + tail
    return head + data + directory


@ORDERS
@pytest.mark.parametrize("zero", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16, "float"])
def test_grey_tiff(bits, zero, order):
    if bits == "float":
        values = DICE.random((H, W), np.float32)
        data, read = tiff(values, photometric=zero, byteorder=order)
        expected = np.floor(read.astype(float) * 255 + 0.5)
    else:
        if bits == 12 and order == ">":
            pytest.skip("Pillow does not read it, and says so")
        deep = {} if bits in (1, 8, 16) else {"bitspersample": bits}
        values = noise(bits).astype(bool) if bits == 1 else noise(bits)
        data, read = tiff(values, photometric=zero, byteorder=order, **deep)
        expected = to_8_bits(read, bits)
    np.testing.assert_array_equal(read, values)
    expected = 255 - expected if zero == "miniswhite" else expected
    if (bits, zero) == (12, "miniswhite") or (bits, zero, order) == (16, "miniswhite", ">"):
        got = np.asarray(load_image(data))[..., 0]  # Pillow alone does not open it
        np.testing.assert_array_equal(got, expected)
    else:
        shows(data, expected)


@ORDERS
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("alpha", [None, "unassalpha", "assocalpha"])
@pytest.mark.parametrize("bits", [8, 16])
def test_colour_tiff(bits, alpha, planes, order):
    white = (1 << bits) - 1
    values = noise(bits, 3 + (alpha is not None)).astype(int)
    if alpha == "assocalpha":
        values[..., :3] = values[..., :3] * values[..., 3:] // white
    under = white - values[..., 3:] if alpha else 0
    share = values[..., 3:] / white if alpha == "unassalpha" else 1
    expected = to_8_bits(values[..., :3] * share + under, bits)
    array = values.astype(f"u{bits // 8}")
    array = np.ascontiguousarray(np.moveaxis(array, 2, 0)) if planes == "separate" else array
    for compression, tile in itertools.product((None, "zlib"), (None, (16, 16))):
        options = {"compression": compression, "tile": tile, "byteorder": order}
        options |= {"extrasamples": [alpha]} if alpha else {}
        data, read = tiff(array, photometric="rgb", planarconfig=planes, **options)
        np.testing.assert_array_equal(read, array)
        # Pillow cuts 16 bits in colour instead of rounding, and divides by alpha after that.
        shows(data, expected, steps={None: 1, "unassalpha": 2, "assocalpha": 3}[alpha])


@ORDERS
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("bits", [8, 16])
def test_cmyk_tiff(bits, planes, order):
    inks, white = noise(bits, 4), (1 << bits) - 1
    array = np.ascontiguousarray(np.moveaxis(inks, 2, 0)) if planes == "separate" else inks
    data, _ = tiff(array, photometric="separated", planarconfig=planes, byteorder=order)
    left = white - inks.astype(float)
    shows(data, to_8_bits(left[..., :3] * left[..., 3:] / white, bits), steps=2)


@ORDERS
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("compression", ["zlib", "lzw", "zstd", "packbits"])
def test_compressed_tiff(compression, dtype, order):
    kind = np.dtype(dtype)
    values = DICE.random((H, W), dtype) if kind.kind == "f" else noise(8 * kind.itemsize)
    scale = 255 if kind.kind == "f" else 255 / np.iinfo(dtype).max
    for predictor in (False, True) if compression != "packbits" else (False,):
        options = {"compression": compression, "predictor": predictor, "byteorder": order}
        data, read = tiff(values, photometric="minisblack", **options)
        np.testing.assert_array_equal(read, values)
        if compression == "zstd" and not pillow_reads(data):
            with pytest.raises(ImageError):
                load_image(data)
            continue
        shows(data, np.floor(read.astype(float) * scale + 0.5))


def rgb_of_ycbcr(y, cb, cr, red=0.299, green=0.587, blue=0.114):
    r, b = y + (2 - 2 * red) * (cr - 128), y + (2 - 2 * blue) * (cb - 128)
    return np.clip(np.floor(np.stack([r, (y - red * r - blue * b) / green, b], -1) + 0.5), 0, 255)


@ORDERS
@pytest.mark.parametrize("across, down", [(1, 1), (2, 1), (2, 2)])
def test_uncompressed_ycbcr_tiff(across, down, order):
    y = DICE.integers(60, 200, (H, W))
    cb, cr = DICE.integers(100, 156, (2, H // down, W // across))
    data = b"".join(
        bytes(y[i * down : (i + 1) * down, j * across : (j + 1) * across].ravel().tolist())
        + bytes([cb[i, j], cr[i, j]])
        for i, j in np.ndindex(cb.shape)
    )
    cb, cr = (np.repeat(np.repeat(c, down, 0), across, 1) for c in (cb, cr))
    full = [(0, 1), (255, 1), (128, 1), (255, 1), (128, 1), (255, 1)]
    tags = {258: ("H", [8, 8, 8]), 262: ("H", [6]), 277: ("H", [3]), 530: ("H", [across, down])}
    jfif = tags | {532: ("II", full)}
    shows(tiff_of_tags(data, jfif, order), rgb_of_ycbcr(y, cb, cr), steps=2)
    bt709 = (0.2125, 0.7154, 0.0721)
    coefficients = {529: ("II", [(round(c * 10000), 10000) for c in bt709])}
    shows(tiff_of_tags(data, jfif | coefficients, order), rgb_of_ycbcr(y, cb, cr, *bt709), steps=2)
    studio = tags | {532: ("II", [(16, 1), (235, 1), (128, 1), (240, 1), (128, 1), (240, 1)])}
    y, cb, cr = (y - 16) * 255 / 219, 128 + (cb - 128) * 127 / 112, 128 + (cr - 128) * 127 / 112
    shows(tiff_of_tags(data, studio, order), rgb_of_ycbcr(y, cb, cr), steps=3)


@ORDERS
def test_cielab_tiff(order):
    lightness = DICE.integers(80, 180, (H, W))
    a, b = DICE.integers(-10, 10, (2, H, W))
    data = np.stack([lightness, a % 256, b % 256], -1).astype(np.uint8).tobytes()
    fy = (lightness * 100 / 255 + 16) / 116
    xyz = np.stack([0.9642 * (fy + a / 500) ** 3, fy**3, 0.8249 * (fy - b / 200) ** 3], -1)
    bradford = [[3.1339, -1.6169, -0.4906], [-0.9788, 1.9161, 0.0335], [0.0719, -0.2290, 1.4052]]
    linear = np.clip(xyz @ np.transpose(bradford), 0.0031308, 1)
    tags = {258: ("H", [8, 8, 8]), 262: ("H", [8]), 277: ("H", [3])}
    expected = (1.055 * linear ** (1 / 2.4) - 0.055) * 255
    shows(tiff_of_tags(data, tags, order), expected.round(), steps=3)


@ORDERS
def test_a_palette_of_8_bits_in_the_place_of_16(order):
    colors, index = noise(8, 3).reshape(-1, 3)[:256], noise(8)
    tags = {258: ("H", [8]), 262: ("H", [3]), 277: ("H", [1])}
    for factor in (1, 257):
        palette = {320: ("H", (colors.T.astype(int) * factor).ravel().tolist())}
        data = tiff_of_tags(index.tobytes(), tags | palette, order)
        np.testing.assert_array_equal(np.asarray(load_image(data)), colors[index])


def test_without_photometric_interpretation_zero_is_black():
    data = tiff_of_tags(noise(8).tobytes(), {258: ("H", [8]), 277: ("H", [1])})
    read = tifffile.imread(io.BytesIO(data))
    np.testing.assert_array_equal(np.asarray(load_image(data))[..., 0], read)
    rgb = tiff_of_tags(noise(8, 3).tobytes(), {258: ("H", [8, 8, 8]), 277: ("H", [3])})
    np.testing.assert_array_equal(load_image(rgb), tifffile.imread(io.BytesIO(rgb)))


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (noise(10), {"bitspersample": 10}, "grey in unsigned samples of 10 bits, 1 for a pixel"),
        (noise(14), {"bitspersample": 14}, "grey in unsigned samples of 14 bits, 1 for a pixel"),
        (
            noise(10),
            {"bitspersample": 10, "photometric": "miniswhite"},
            "grey, white is zero in unsigned samples of 10 bits",
        ),
        (noise(10, 3), {"bitspersample": 10, "photometric": "rgb"}, "RGB in .* of 10 bits, 3"),
        (noise(14, 3), {"bitspersample": 14, "photometric": "rgb"}, "RGB in .* of 14 bits, 3"),
        (noise(16, 2), {"extrasamples": ["unassalpha"]}, "grey in .* 16 bits, 2 for a pixel"),
        (np.zeros((H, W), np.float64), {}, "float samples of 64 bits"),
        (np.zeros((H, W), np.int8), {}, "signed samples of 8 bits.*no agreed range"),
        (np.zeros((H, W), np.int16), {}, "signed samples of 16 bits.*no agreed range"),
        (
            noise(8, 4),
            {"photometric": "separated", "extratags": [(332, 3, 1, 2, True)]},
            "its inks are not cyan",
        ),
    ],
    ids=[
        "10 bits",
        "14 bits",
        "10, negative",
        "10 in RGB",
        "14 in RGB",
        "grey and alpha",
        "float64",
        "int8",
        "int16",
        "inks",
    ],
)
def test_what_is_not_read_is_described(array, options, message):
    options = {"photometric": "minisblack"} | options
    planes = {"planarconfig": "contig"} if array.ndim == 3 else {}
    with pytest.raises(ImageError, match=rf"image 3 .*{message}"):
        load_image(tiff(array, **planes, **options)[0], name=3)


# JPEG 2000


def jpeg2000(array, bits, **options):
    data = bytes(
        imagecodecs.jpeg2k_encode(
            array, level=0, bitspersample=bits, reversible=True, codecformat="jp2", **options
        )
    )
    np.testing.assert_array_equal(imagecodecs.jpeg2k_decode(data), array)
    return data


@pytest.mark.parametrize("bits", [1, 4, 8, 10, 12, 16])
def test_grey_jpeg_2000(bits):
    data = jpeg2000(noise(bits), bits)
    got = np.asarray(load_image(data))[..., 0].astype(int)
    assert abs(got - to_8_bits(noise_read := imagecodecs.jpeg2k_decode(data), bits)).max() <= 1
    assert noise_read.max() == (1 << bits) - 1 and got.max() == 255 and got.min() == 0


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_colour_jpeg_2000_is_right_or_refused(bits):
    white = (1 << bits) - 1
    middle = np.clip(noise(bits, 3), white // 8, white * 7 // 8)
    got = np.asarray(load_image(jpeg2000(middle, bits))).astype(int)
    assert abs(got - to_8_bits(middle, bits)).max() <= 1
    data = jpeg2000(noise(bits, 3), bits)
    if bits > 8 and _white_is_black():
        with pytest.raises(ImageError, match=rf"image 2 .* {bits} bits in colour, and zeros"):
            load_image(data, name=2)
    else:
        got = np.asarray(load_image(data)).astype(int)
        assert abs(got - to_8_bits(imagecodecs.jpeg2k_decode(data), bits)).max() <= 1


# Others


@pytest.mark.parametrize("kind", ["cmyk", "ycck"])
def test_jpeg_of_inks(kind):
    ramp = np.linspace(0, 255, W)[None].repeat(H, 0)
    inks = np.stack([ramp, ramp[:, ::-1], ramp // 2, ramp // 4], -1).astype(np.uint8)
    data = bytes(imagecodecs.jpeg8_encode(inks, level=100, colorspace="cmyk", outcolorspace=kind))
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    shows(data, expected, steps=2)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_what_pillow_writes_as_opencv_reads_it(mode, kind):
    image, stream = Image.fromarray(noise(8, 3)).convert(mode), io.BytesIO()
    if mode == "P" and kind in ("PPM", "WEBP", "JPEG"):
        pytest.skip("has no palette")
    image.save(stream, kind, **({"lossless": True} if kind == "WEBP" else {}))
    data = stream.getvalue()
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    shows(data, expected, steps=3 if kind == "JPEG" else 0)


@pytest.mark.parametrize("bits", [10, 12])
def test_deep_avif(bits):
    ramp = (np.linspace(0, 1, W)[None, :, None] * np.ones((H, W, 3)) * ((1 << bits) - 1)).round()
    options = {"level": 100, "bitspersample": bits, "pixelformat": "444"}
    data = bytes(imagecodecs.avif_encode(ramp.astype(np.uint16), **options))
    shows(data, to_8_bits(imagecodecs.avif_decode(data), bits), steps=2)


def heic(image, **options):
    pillow_heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    pillow_heif.from_pillow(image).save(stream, format="HEIF", quality=-1, chroma=444, **options)
    return stream.getvalue()


def test_heic():
    block = np.kron(DICE.integers(40, 215, (4, 6, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    shows_image = np.asarray(load_image(heic(Image.fromarray(block)))).astype(int)
    assert shows_image.shape == (64, 96, 3) and abs(shows_image - block).max() <= 4
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.asarray(load_image(heic(Image.fromarray(block), exif=exif.tobytes()))).astype(int)
    assert abs(turned - np.rot90(block, 3)).max() <= 4
    clear = np.dstack([block, np.full(block.shape[:2], 0, np.uint8)])
    assert np.asarray(load_image(heic(Image.fromarray(clear)))).min() >= 253  # white


def test_a_damaged_heic_is_named():
    data = heic(Image.new("RGB", (64, 64)))
    for bad in (data[:-20], data[:40]):
        with pytest.raises(ImageError, match="image 5 "):
            load_image(bad, name=5)


def test_heic_without_a_decoder_says_what_to_install(monkeypatch):
    data = heic(Image.new("RGB", (64, 64)))
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"image 1 is a HEIF image .* pillow-heif"):
        load_image(data, name=1)
    with pytest.raises(ImageError, match=r"image 1 .*HEIF"):  # too short to have a size
        load_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 200, name=1)
