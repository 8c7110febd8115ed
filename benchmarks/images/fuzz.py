"""Mutated image files, by the hundred thousand: what reading each one costs (`make fuzz-images`).

A case is made from a small file of some format, which Pillow writes, by its number and the seed
alone; so a find can be made again with the same build of Pillow:
`python -m benchmarks.images.fuzz --show 12345`. Cases run one after the other in a child process,
which measures the CPU time of all its threads and the peak of its resident memory. `load_image`
(Pillow's decoders) and `load_pixels` (torchvision's for plain files) each read it. A case fails if
one of them

- takes more than 8 bytes for each pixel of the first frame and 100 MB, or 3 CPU seconds
- raises anything but ImageError, or ends the process
- reads what the other refuses

The cases are small or fail early; `benchmarks/images/limits.py` measures the largest files.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image, features
from torch import Tensor

from benchmarks.images.mutations import case, seeds
from hrvlm.images.formats import ImageError, read_header
from hrvlm.images.intake import MAX_PIXELS, load_image
from hrvlm.images.pixels import load_pixels
from hrvlm.machine import installed_version

READERS = load_image, load_pixels
ROOT = Path(__file__).parents[2]
BYTES_PER_PIXEL, SPARE_BYTES, CPU_SECONDS, WALL_SECONDS = 8, 100e6, 3, 60


def measure(data: bytes, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """Read one file both ways: outcome, pixels of the first frame, the larger CPU time and peak."""
    found = [_measure(read, data, max_pixels) for read in READERS]
    outcomes = [one["outcome"] for one in found]
    outcome = outcomes[0] if len(set(outcomes)) == 1 else f"not one outcome, but {outcomes}"
    costs = {key: max(one[key] for one in found) for key in ("seconds", "peak", "pixels")}
    return {"outcome": outcome, **costs}


def _measure(read: Callable[..., Any], data: bytes, max_pixels: int) -> dict[str, Any]:
    before, peak_before = _memory()
    started = time.process_time()
    pixels = 0
    try:
        image = read(data, max_pixels=max_pixels)
        height, width = image.shape[1:] if isinstance(image, Tensor) else image.size[::-1]
        outcome, pixels = "read", height * width
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


def warm_up() -> None:
    """Import what the readers import where they use it: no part of a case."""
    for data in seeds().values():
        measure(data)
    _forget_peak()


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


def run_cases(
    seed: int, start: int, stop: int, progress: int | None = None, only: str = ""
) -> dict[str, Any]:
    """Measure a range of cases in this process, of files whose name begins with `only`."""
    files = {name: data for name, data in seeds().items() if name.startswith(only)}
    formats: dict[str, dict[str, Any]] = {}
    failures = []
    warm_up()
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


def supervise(seed: int, start: int, stop: int, only: str = "") -> dict[str, Any]:
    """`run_cases` in a child process; one that ends before its time is a failure of its case."""
    formats: dict[str, dict[str, Any]] = {}
    failures: list[dict[str, Any]] = []
    while start < stop:
        with tempfile.NamedTemporaryFile() as progress:
            code = (
                "import json, sys, warnings; warnings.simplefilter('ignore')\n"
                "from benchmarks.images.fuzz import run_cases\n"
                "print(json.dumps(run_cases(*map(int, sys.argv[1:5]), sys.argv[5])))"
            )
            numbers = map(str, (seed, start, stop, progress.fileno()))
            child = subprocess.run(
                [sys.executable, "-c", code, *numbers, only],
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
            merge(formats, failures, supervise(seed, start, last, only))
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
        "torchvision": installed_version("torchvision"),
        "pillow_heif": installed_version("pillow_heif"),
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
    parser.add_argument("--only", default="", help="a format: HEIF, ...")
    parser.add_argument("--out", type=Path, help="file to write the result to, as JSON")
    parser.add_argument("--show", type=int, help="measure this case, and write it to --out")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.show is not None:
        files = {name: data for name, data in seeds().items() if name.startswith(options.only)}
        name, data = case(files, options.seed, options.show)
        print(name, len(data), "bytes", measure(data))
        if options.out:
            options.out.write_bytes(data)
        return
    formats: dict[str, Any] = {}
    failures: list[dict[str, Any]] = []
    ranges = list(chunks(options.start, options.start + options.cases, options.chunk))
    done = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda chunk: supervise(options.seed, *chunk, options.only), ranges)
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
