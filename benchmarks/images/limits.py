"""The largest image files that are read, and what they cost: memory and CPU time at the limits.

For each kind of file below, the largest square one that `hrvlm/images/formats.py` accepts is made
(sides go down by a tenth from the pixel limit), and read in a process of its own. The files are
made to be slow or large: noise, many scans, many samples, interlacing.
"""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from benchmarks.images.fuzz import ROOT, broken_rule, environment, measure, warm_up
from hrvlm.images.formats import ImageError, read_header
from hrvlm.images.intake import MAX_PIXELS


def noise(side: int, channels: int, bits: int = 8) -> np.ndarray:
    """Random bytes [side, side, channels], a tile of 1024 x 1024 over and over."""
    high = 1 << bits
    tile = np.random.default_rng(0).integers(0, high, (1024, 1024, channels), dtype=np.uint8)
    repeats = -(-side // 1024)
    return np.tile(tile, (repeats, repeats, 1))[:side, :side]


def picture(side: int, mode: str, bits: int = 8) -> Image.Image:
    """Noise as an image."""
    channels = len(mode)
    values = noise(side, channels, bits)
    return Image.fromarray(values[..., 0] if channels == 1 else values)


def saved(image: Image.Image, name: str, **options: Any) -> bytes:
    """The bytes of a file."""
    ImageFile.MAXBLOCK = max(ImageFile.MAXBLOCK, 8 * image.width * image.height)
    stream = io.BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


def png(side: int, depth: int, color: int, channels: int, interlace: int, values: bytes) -> bytes:
    """A PNG whose rows hold `values` over and over, with the costliest filter."""
    length = side * channels * depth // 8
    row = b"\4" + (values * (length // len(values) + 1))[:length]
    packer = zlib.compressobj(1)
    rows = side if not interlace else side * 15 // 8 + 16  # rows of all passes: more than enough
    body = b"".join(packer.compress(row) for _ in range(rows)) + packer.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", side, side, depth, color, 0, 0, interlace)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan is there over and over."""
    data = saved(picture(side, "RGB", 4), "JPEG", progressive=True, subsampling=0, quality=30)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * scans + data[-2:]


def heic(image: Image.Image, quality: int, chroma: int) -> bytes:
    """By pillow-heif, which has to be installed."""
    from pillow_heif import from_pillow

    stream = io.BytesIO()
    options = {"chroma": chroma, "enc_params": {"preset": "ultrafast"}}
    from_pillow(image).save(stream, format="HEIF", quality=quality, **options)
    return stream.getvalue()


RANDOM = np.random.default_rng(1).bytes(1 << 16)
KINDS: dict[str, Callable[[int], bytes]] = {
    "JPEG 4:4:4": lambda n: saved(picture(n, "RGB"), "JPEG", quality=95, subsampling=0),
    "JPEG 4:2:0": lambda n: saved(picture(n, "RGB", 5), "JPEG", quality=80),
    "JPEG progressive": lambda n: saved(
        picture(n, "RGB", 7), "JPEG", quality=90, subsampling=0, progressive=True
    ),
    "JPEG cmyk progressive": lambda n: saved(
        Image.fromarray(noise(n, 4, 5), mode="CMYK"), "JPEG", quality=75, progressive=True
    ),
    "JPEG 30 scans": lambda n: many_scans(n, 20),
    "JPEG 200 scans": lambda n: many_scans(n, 190),
    "PNG rgb": lambda n: png(n, 8, 2, 3, 0, RANDOM),
    "PNG rgba": lambda n: png(n, 8, 6, 4, 0, RANDOM),
    "PNG rgba16": lambda n: png(n, 16, 6, 4, 0, bytes(range(50)) * 3),
    "PNG grey16": lambda n: png(n, 16, 0, 1, 0, RANDOM),
    "PNG rgba interlaced": lambda n: png(n, 8, 6, 4, 1, b"\1\2\3"),
    "PNG grey+alpha": lambda n: png(n, 8, 4, 2, 0, RANDOM),
    "GIF": lambda n: saved(picture(n, "L"), "GIF"),
    "GIF transparent": lambda n: saved(picture(n, "L", 6), "GIF", transparency=3, interlace=1),
    "WebP lossy": lambda n: saved(picture(n, "RGB", 7), "WEBP", method=0, quality=80),
    "WebP lossy alpha": lambda n: saved(picture(n, "RGBA", 6), "WEBP", method=0, quality=60),
    "WebP lossless": lambda n: saved(
        picture(n, "RGBA", 7), "WEBP", method=0, quality=0, lossless=True
    ),
    "AVIF 4:2:0": lambda n: saved(picture(n, "RGB", 6), "AVIF", speed=10, quality=60),
    "AVIF 4:4:4 alpha": lambda n: saved(
        picture(n, "RGBA", 6), "AVIF", speed=10, quality=80, subsampling="4:4:4"
    ),
    "HEIC 4:2:0": lambda n: heic(picture(n, "RGB", 6), 60, 420),
    "HEIC 4:4:4 alpha": lambda n: heic(picture(n, "RGBA", 6), 80, 444),
    "JPEG2000": lambda n: saved(picture(n, "RGB", 4), "JPEG2000"),
    "JPEG2000 lossy": lambda n: saved(
        picture(n, "RGB", 6), "JPEG2000", irreversible=True, quality_layers=[30]
    ),
    "JPEG2000 tiles": lambda n: saved(
        picture(n, "RGBA", 6),
        "JPEG2000",
        irreversible=True,
        quality_layers=[30],
        tile_size=(512, 512),
    ),
    "TIFF": lambda n: saved(picture(n, "RGB"), "TIFF"),
    "TIFF lzw": lambda n: saved(picture(n, "RGBA", 6), "TIFF", compression="tiff_lzw"),
    "TIFF deflate": lambda n: saved(
        picture(n, "RGB", 6), "TIFF", compression="tiff_adobe_deflate", tiffinfo={317: 2}
    ),
    "TIFF jpeg": lambda n: saved(picture(n, "RGB", 6), "TIFF", compression="jpeg", quality=90),
    "TIFF grey16 lzw": lambda n: saved(
        Image.fromarray(noise(n, 2, 6).view(np.uint16)[..., 0]), "TIFF", compression="tiff_lzw"
    ),
    "TIFF fax": lambda n: saved(
        Image.fromarray(noise(n, 1, 1)[..., 0] > 0), "TIFF", compression="group4"
    ),
    "TIFF float": lambda n: saved(Image.fromarray(np.float32(noise(n, 1)[..., 0]) / 255), "TIFF"),
    "BMP": lambda n: saved(picture(n, "RGB"), "BMP"),
    "BMP run-length": lambda n: (
        b"BM"
        + struct.pack("<IHHI", 0, 0, 0, 58)
        + struct.pack("<IiiHHIIiiII", 40, n, n, 1, 8, 1, 0, 0, 0, 1, 0)
        + bytes(4)
        + (b"\1\7" * n + b"\0\0") * n
    ),
    "PPM as text": lambda n: b"P2 %d %d 255 " % (n, n) + b"1 " * (n * n),
    "PPM 100 steps": lambda n: b"P6 %d %d 100\n" % (n, n) + noise(n, 3, 6).tobytes(),
    "PGM 16 bits": lambda n: b"P5 %d %d 65535\n" % (n, n) + noise(n, 2).tobytes(),
    "PFM": lambda n: b"Pf %d %d -1.0\n" % (n, n) + (np.float32(noise(n, 1)) / 255).tobytes(),
}


def largest(kind: str) -> tuple[int, bytes]:
    """The side and the bytes of the largest square file of this kind that is accepted."""
    side = int(MAX_PIXELS**0.5)
    while True:
        small = KINDS[kind](min(side, 640))
        if not _too_large(small, side):
            data = KINDS[kind](side) if side > 640 else small
            try:
                read_header(io.BytesIO(data), kind, MAX_PIXELS)
            except ImageError as error:
                if "over the limits" not in str(error):
                    raise
            else:
                return side, data
        side = int(side * 0.9)


def _too_large(small: bytes, side: int) -> bool:
    """Whether the file of this side would be over the limits by far: judged by a small one."""
    try:
        still = read_header(io.BytesIO(small), "", MAX_PIXELS)
    except ImageError:
        return True
    grown = (side / min(side, 640)) ** 2
    return still.nanoseconds * grown > 4e9 or still.memory * grown > 12 * side * side + 1e8


def main() -> None:
    """Measure every kind, or those named on the command line, and print the result as JSON."""
    if sys.argv[1:2] == ["--measure"]:
        warm_up()
        print(json.dumps(measure(Path(sys.argv[2]).read_bytes())))
        return
    rows = {}
    for kind in sys.argv[1:] or KINDS:
        side, data = largest(kind)
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            size = len(data)
            del data
            command = [sys.executable, "-m", "benchmarks.images.limits", "--measure", file.name]
            found = json.loads(
                subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
            )
        megapixels = found["pixels"] / 1e6
        rows[kind] = {
            "megapixels": round(megapixels, 1),
            "file_mb": round(size / 1e6, 1),
            "peak_mb": round(found["peak"] / 1e6),
            "mb_over_8_bytes_a_pixel": round(found["peak"] / 1e6 - 8 * megapixels, 1),
            "cpu_seconds": round(found["seconds"], 2),
            "outcome": found["outcome"],
            "broken": broken_rule(found),
        }
        print(kind, side, rows[kind], file=sys.stderr, flush=True)
    print(json.dumps({**environment(), "files": rows}, indent=1))


if __name__ == "__main__":
    main()
