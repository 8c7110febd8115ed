"""Mutated image files, by the hundred thousand: what reading each one costs (`make fuzz-images`).

A case is made from a small file of some format, which Pillow writes, by its number and the seed
alone; so a find can be made again with the same build of Pillow:
`python -m benchmarks.images.fuzz --show 12345`. Cases run one after the other in a child process,
which measures the CPU time of all its threads and the peak of its resident memory. A case fails if
`load_image`

- takes more than 8 bytes for each pixel of the first frame and 100 MB, or 3 CPU seconds
- raises anything but ImageError, or ends the process

The cases are small or fail early; `benchmarks/images/limits.py` measures the largest files.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from hrvlm.images.formats import ImageError, read_header
from hrvlm.images.intake import MAX_PIXELS, load_image

ROOT = Path(__file__).parents[2]
BYTES_PER_PIXEL, SPARE_BYTES, CPU_SECONDS, WALL_SECONDS = 8, 100e6, 3, 60
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
    """A small file of every format and kind that Pillow writes, and of some formats not read."""
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
    for name in _UNREAD:
        add(name, grey if name in ("SPIDER", "IM") else rgb)
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
    name = dice.choice([name for name in files if (name.split()[0] not in _UNREAD) == is_read])
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


def measure(data: bytes, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """Read one file: the outcome, CPU seconds, peak bytes, and pixels of the first frame."""
    before, peak_before = _memory()
    started = time.process_time()
    pixels = 0
    try:
        image = load_image(data, max_pixels=max_pixels)
        outcome, pixels = "read", image.width * image.height
        del image
    except ImageError as error:
        text = str(error)
        outcome = next((o for o, words in _OUTCOMES.items() if words in text), "header")
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"[:200]
    seconds = time.process_time() - started
    peak = 0
    if (peak_now := _memory()[1]) > peak_before:
        peak = peak_now - before
        _forget_peak()
    if peak > SPARE_BYTES / 2 and not pixels:
        try:
            still = read_header(io.BytesIO(data), "", max_pixels)
            pixels = still.width * still.height
        except ImageError:
            pass
    return {"outcome": outcome, "seconds": seconds, "peak": peak, "pixels": pixels}


_OUTCOMES = {
    "over a limit": "over the",
    "no known format": "is not an image",
    "corrupt": "truncated or corrupt",
    "values": "expected",
}


def _memory() -> tuple[int, int]:
    """Resident bytes now, and at the peak since the last `_forget_peak`."""
    text = Path("/proc/self/status").read_text()
    return tuple(  # type: ignore[return-value]
        int(text.partition(key)[2].split(None, 1)[0]) * 1024 for key in ("VmRSS:", "VmHWM:")
    )


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def broken_rule(found: dict[str, Any]) -> str | None:
    """What a measured case violates."""
    if found["outcome"] not in ("read", "header", *_OUTCOMES):
        return f"raised {found['outcome']}"
    if found["peak"] > BYTES_PER_PIXEL * found["pixels"] + SPARE_BYTES:
        return f"took {found['peak'] / 1e6:.0f} MB for {found['pixels']} pixels"
    if found["seconds"] > CPU_SECONDS:
        return f"took {found['seconds']:.1f} CPU seconds"
    return None


def run_cases(seed: int, start: int, stop: int, progress: int | None = None) -> dict[str, Any]:
    """Measure a range of cases in this process."""
    files = seeds()
    formats: dict[str, dict[str, Any]] = {}
    failures = []
    _forget_peak()
    for number in range(start, stop):
        name, data = case(files, seed, number)
        if progress is not None:
            os.pwrite(progress, number.to_bytes(8, "little"), 0)
            signal.alarm(WALL_SECONDS)
        found = measure(data)
        if (broken := broken_rule(found)) is not None:
            failures.append({"case": number, "seed_file": name, "rule": broken})
        row = formats.setdefault(name.split()[0], _row())
        row["outcomes"][
            found["outcome"] if found["outcome"] in ("read", *_OUTCOMES) else "header"
        ] += 1
        excess = (found["peak"] - BYTES_PER_PIXEL * found["pixels"]) / 1e6
        for key, value in (("mb_over_8_bytes_a_pixel", excess), ("cpu_seconds", found["seconds"])):
            if value > row[key][0]:
                row[key] = [round(value, 4), number]
    return {"formats": formats, "failures": failures}


def _row() -> dict[str, Any]:
    return {"outcomes": Counter(), "mb_over_8_bytes_a_pixel": [0, None], "cpu_seconds": [0, None]}


def supervise(seed: int, start: int, stop: int) -> dict[str, Any]:
    """`run_cases` in a child process; one that ends before its time is a failure of its case."""
    formats: dict[str, dict[str, Any]] = {}
    failures: list[dict[str, Any]] = []
    while start < stop:
        with tempfile.NamedTemporaryFile() as progress:
            code = (
                "import json, sys, warnings; warnings.simplefilter('ignore')\n"
                "from benchmarks.images.fuzz import run_cases\n"
                "print(json.dumps(run_cases(*map(int, sys.argv[1:4]), int(sys.argv[4]))))"
            )
            child = subprocess.run(
                [sys.executable, "-c", code, *map(str, (seed, start, stop, progress.fileno()))],
                capture_output=True,
                pass_fds=(progress.fileno(),),
                cwd=ROOT,
            )
            reached = Path(progress.name).read_bytes()
        if child.returncode == 0:
            found = json.loads(child.stdout.splitlines()[-1])
            merge(formats, failures, found)
            break
        words = child.stderr.decode(errors="replace").strip()[-300:]
        if not reached:
            raise RuntimeError(f"no case was run: {words}")
        last = int.from_bytes(reached, "little")
        failures.append({"case": last, "rule": f"exit {child.returncode}: {words}"})
        if last > start:
            merge(formats, failures, supervise(seed, start, last))
        start = last + 1
    return {"formats": formats, "failures": failures}


def merge(formats: dict[str, Any], failures: list[Any], found: dict[str, Any]) -> None:
    """Add the result of other cases."""
    failures += found["failures"]
    for name, other in found["formats"].items():
        row = formats.setdefault(name, _row())
        row["outcomes"] = Counter(row["outcomes"]) + Counter(other["outcomes"])
        for key in ("mb_over_8_bytes_a_pixel", "cpu_seconds"):
            row[key] = max(row[key], other[key], key=lambda pair: pair[0])


def environment() -> dict[str, Any]:
    """What the result depends on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    libraries = ("jpg", "zlib", "webp", "avif", "libtiff", "jpg_2000")
    return {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "pillow": Image.__version__,
        **{name: features.version(name) for name in libraries},
    }


def chunks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `size` numbers."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def main() -> None:
    """Run the cases, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--chunk", type=int, default=2000, help="cases of one child process")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="chunks at a time")
    parser.add_argument("--out", type=Path, help="file to write the result to, as JSON")
    parser.add_argument("--show", type=int, help="measure this case, and write it to --out")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.show is not None:
        name, data = case(seeds(), options.seed, options.show)
        print(name, len(data), "bytes", measure(data))
        if options.out:
            options.out.write_bytes(data)
        return
    formats: dict[str, Any] = {}
    failures: list[dict[str, Any]] = []
    ranges = list(chunks(options.start, options.start + options.cases, options.chunk))
    done = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda chunk: supervise(options.seed, *chunk), ranges)
        for (first, last), found in zip(ranges, results, strict=True):
            merge(formats, failures, found)
            done += last - first
            print(f"{done} cases, {len(failures)} failures", flush=True)
    result = {
        "command": "python -m benchmarks.images.fuzz " + " ".join(sys.argv[1:]),
        "seed": options.seed,
        "cases": done,
        **environment(),
        "failures": failures,
        "formats": dict(sorted(formats.items())),
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if failures:
        print(json.dumps(failures, indent=1))
        sys.exit(1)


if __name__ == "__main__":
    main()
