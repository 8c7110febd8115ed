"""Small image files of all formats, and what a case of a number and a seed makes of one."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL
from PIL import Image

WIDTH, HEIGHT = 37, 29  # found again in the files, to be changed
_UNREAD = ("TGA", "PCX", "SGI", "ICO", "DDS", "DIB", "QOI", "ICNS", "EPS", "IM", "SPIDER")
_NUMBERS = (0, 1, 2, 7, 8, 15, 16, 127, 128, 255, 256, 999, 4096, 16383, 32767, 65500, 65535)
_LONG_NUMBERS = (65536, 100_000, 1 << 20, 4_000_000, 1 << 24, 1 << 28, (1 << 31) - 1, (1 << 32) - 1)
# What the parts of a file begin with, and the bytes of their length before it: JPEG and JPEG 2000,
# GIF, WebP; PNG, AVIF.
_BLOCKS = {
    **dict.fromkeys((b"\xff\xda", b"\xff\xc4", b"\xff\xdb", b"\xff\xe1", b"\xff\xfe"), 0),
    **dict.fromkeys((b"\xff\x90", b"\xff\x52", b"\x21\xf9", b"\x21\xfe", b"\x2c\0\0\0\0"), 0),
    **dict.fromkeys((b"ANMF", b"VP8 ", b"ALPH", b"EXIF"), 0),
    **dict.fromkeys((b"IDAT", b"fdAT", b"tEXt", b"iCCP", b"IEND"), 4),
    **dict.fromkeys((b"moov", b"trak", b"ipma", b"iloc", b"iinf", b"mdat"), 4),
}


def seeds() -> dict[str, bytes]:
    """A small file of every format and kind that Pillow writes, and of some formats not read.

    HEIC is among them where pillow-heif is installed.
    """
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    smooth = np.indices((HEIGHT, WIDTH, 4)).sum(0).astype(np.uint8) * 3
    rgba = Image.fromarray(np.where(noise > 128, noise, smooth))
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    deep = Image.fromarray(rng.integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16))
    other = rgb.transpose(Image.Transpose.ROTATE_180)
    exif = Image.Exif()
    exif[0x0112] = 6
    found: dict[str, bytes] = {}

    def add(name: str, image: Image.Image, frames: int = 1, **options: Any) -> None:
        stream = io.BytesIO()
        if frames > 1:
            options |= {"save_all": True, "append_images": [other.copy(), rgb.copy()][: frames - 1]}
        image.copy().save(stream, name.split()[0], **options)
        found[name] = stream.getvalue()

    add("JPEG", rgb, exif=exif, icc_profile=b"p" * 400, comment=b"c" * 60)
    add("JPEG progressive", rgb, progressive=True, subsampling=0)
    add("JPEG grey", grey, restart_marker_blocks=2)
    add("JPEG cmyk", rgb.convert("CMYK"), progressive=True)
    add("MPO", rgb, frames=3)
    add("PNG", rgb, exif=exif, icc_profile=b"p" * 400)
    add("PNG rgba", rgba, compress_level=0)
    add("PNG palette", rgb.quantize(20), transparency=3)
    add("PNG grey16", deep)
    add("PNG bits", grey.convert("1"))
    add("PNG animated", rgb, frames=3)
    add("GIF", rgb.quantize(30), comment=b"c" * 300, interlace=1)
    add("GIF animated", rgb, transparency=2, frames=3)
    add("WEBP", rgb, exif=exif)
    add("WEBP lossless", rgba, lossless=True)
    add("WEBP alpha", rgba, quality=30)
    add("WEBP animated", rgb, frames=3)
    add("AVIF", rgb, exif=exif, speed=10)
    add("AVIF alpha", rgba, subsampling="4:4:4", speed=10)
    add("AVIF animated", rgb, speed=10, frames=3)
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        add(f"TIFF {compression}", rgb, compression=compression)
    if int(PIL.__version__.split(".")[0]) >= 12:  # 11 crashes without zstd
        with contextlib.suppress(OSError):  # not every libtiff has it
            add("TIFF zstd", rgb, compression="zstd")
    for compression in ("group3", "group4", "tiff_ccitt"):
        add(f"TIFF {compression}", grey.convert("1"), compression=compression)
    add("TIFF rgba", rgba, compression="tiff_lzw", exif=exif)
    add("TIFF grey16", deep)
    add("TIFF float", Image.fromarray(np.float32(noise[..., 0]) / 255))
    add("TIFF pages", rgb, frames=3)
    add("TIFF big", rgb, big_tiff=True)
    add("TIFF tiled", rgb, tiffinfo={322: 16, 323: 16}, compression="tiff_deflate")
    add("BMP", rgb)
    add("BMP palette", rgb.quantize(20))
    found["BMP rle"] = _run_length_bmp()
    add("PPM", rgb)
    add("PPM grey16", deep.convert("I"))
    found["PPM plain"] = b"P3\n# c\n37 29 255\n" + b" ".join(b"%d" % v for v in noise[..., :3].flat)
    found["PPM steps"] = b"P6 37 29 100\n" + noise[..., :3].tobytes()
    add("JPEG2000", rgb)
    add("JPEG2000 tiled", rgba, tile_size=(16, 16), quality_layers=[20, 4], irreversible=True)
    found["JPEG2000 stream"] = found["JPEG2000"][found["JPEG2000"].index(b"\xff\x4f\xff\x51") :]
    with contextlib.suppress(ImportError):
        found |= _heif_files(rgb, rgba, exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # IM goes from Pillow: less to refuse
        for name in _UNREAD:
            add(name, grey if name in ("SPIDER", "IM") else rgb)
    return found


def _heif_files(rgb: Image.Image, rgba: Image.Image, exif: Image.Exif) -> dict[str, bytes]:
    from pillow_heif import from_pillow

    found: dict[str, bytes] = {}
    for name, images, options in (
        ("HEIF", [rgb], {"exif": exif.tobytes()}),
        ("HEIF alpha", [rgba], {"chroma": 444}),
        ("HEIF images", [rgb, rgba, rgb], {}),
    ):
        file, stream = from_pillow(images[0]), io.BytesIO()
        for image in images[1:]:
            file.add_from_pillow(image)
        file.save(stream, quality=60, format="HEIF", **options)
        found[name] = stream.getvalue()
    return found


def _run_length_bmp() -> bytes:
    rows = b"".join(b"\x05\x01\x20\x02\0\x04\1\2\3\4\0\0" for _ in range(HEIGHT)) + b"\0\2\3\1\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 8, 1, len(rows), 0, 0, 4, 0)
    start = 14 + len(header) + 16
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + bytes(16) + rows


def case(files: dict[str, bytes], seed: int, number: int) -> tuple[str, bytes]:
    """The name of its seed file, and the mutated file."""
    dice = random.Random(seed << 32 | number)
    is_read = dice.random() > 0.04
    of_kind = [name for name in files if (name.split()[0] not in _UNREAD) == is_read]
    name = dice.choice(of_kind or list(files))
    data = bytearray(files[name])
    for _ in range(dice.choice((0, 1, 1, 1, 2, 2, 3, 5, 8))):
        dice.choice(_MUTATIONS)(data, dice, files)
    if name.startswith("PNG") and dice.random() < 0.9:
        data = _with_right_checksums(data)
    return name, bytes(data)


def _bytes_changed(data: bytearray, dice: random.Random, files: dict[str, bytes]) -> None:
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        if data:
            data[_position(data, dice)] = dice.choice((0, 1, 255, dice.randrange(256)))


def _number_changed(data: bytearray, dice: random.Random, files: dict[str, bytes]) -> None:
    size, order = dice.choice((2, 4)), dice.choice(("big", "little"))
    start = _position(data, dice)
    value = dice.choice(_NUMBERS + _LONG_NUMBERS * (size == 4))
    data[start : start + size] = value.to_bytes(size, order)  # type: ignore[arg-type]


def _size_changed(data: bytearray, dice: random.Random, files: dict[str, bytes]) -> None:
    old, new = dice.choice((WIDTH, HEIGHT)), dice.choice(_NUMBERS + _LONG_NUMBERS)
    layout = dice.choice((">H", "<H", ">I", "<I"))
    if dice.random() < 0.3:  # stored less one, as in WebP
        old, new = old - 1, new - 1
    most = (1 << 8 * struct.calcsize(layout)) - 1
    was, becomes = struct.pack(layout, old), struct.pack(layout, min(max(new, 0), most))
    data[:] = data.replace(was, becomes, dice.choice((1, -1)))


def _enlarged(data: bytearray, dice: random.Random, files: dict[str, bytes]) -> None:
    """Both sides, wherever they stand in the file's byte order, up to the limits."""
    order, less = dice.choice("<>"), dice.choice((0, 0, 1))
    height = int(10 ** dice.uniform(2, 4.8))
    width = int(10 ** dice.uniform(2, min(4.8, 8.3 - np.log10(height))))
    for layout, most in (("H", 65535), ("I", 1 << 31)):
        for old, new in ((WIDTH, width), (HEIGHT, height)):
            was, becomes = (struct.pack(order + layout, v - less) for v in (old, min(new, most)))
            data[:] = data.replace(was, becomes)


def _cut(data: bytearray, dice: random.Random, files: dict[str, bytes]) -> None:
    del data[dice.randrange(len(data) + 1) :]


def _removed(data: bytearray, dice: random.Random, files: dict[str, bytes]) -> None:
    start = _position(data, dice)
    del data[start : start + dice.choice((1, 2, 4, 20, 100))]


def _repeated(data: bytearray, dice: random.Random, files: dict[str, bytes]) -> None:
    start = _position(data, dice)
    piece = bytes(data[start : start + dice.choice((1, 4, 12, 40, 400))])
    times = dice.choice((1, 2, 10, 100, 1000, 10_000 if dice.random() < 0.05 else 3))
    data[start:start] = piece * min(times, 1_000_000 // max(len(piece), 1))


def _block_repeated(data: bytearray, dice: random.Random, files: dict[str, bytes]) -> None:
    """A scan, chunk, frame or box over and over: what a decoder does once for each."""
    starts = sorted({data.find(mark) - before for mark, before in _BLOCKS.items() if mark in data})
    starts = [*(start for start in starts if start >= 0), len(data)]
    if len(starts) == 1:
        return
    which = dice.randrange(len(starts) - 1)
    start, end = starts[which : which + 2]
    times = dice.choice((2, 10, 100, 1000))
    data[end:end] = bytes(data[start:end]) * min(times, 1_000_000 // (end - start))


def _spliced(data: bytearray, dice: random.Random, files: dict[str, bytes]) -> None:
    other = files[dice.choice(list(files))]
    start, length = dice.randrange(len(other)), dice.choice((4, 20, 200))
    at = _position(data, dice)
    data[at : at + dice.choice((0, length))] = other[start : start + length]


def _position(data: bytearray, dice: random.Random) -> int:
    """Half of them in the first 200 bytes, where headers are."""
    return dice.randrange(max(1, len(data) if dice.random() < 0.5 else min(len(data), 200)))


_MUTATIONS: tuple[Callable[[bytearray, random.Random, dict[str, bytes]], None], ...] = (
    *(_bytes_changed, _bytes_changed, _number_changed, _number_changed, _size_changed),
    *(_size_changed, _enlarged, _cut, _removed, _repeated, _block_repeated, _spliced),
)


def _with_right_checksums(data: bytearray) -> bytearray:
    """A PNG whose chunks are taken as they now are: their checksums say so."""
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[position + 4 : end]))
        position = end + 4
    return data
