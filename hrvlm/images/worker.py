"""One image file, decoded in a process of its own under limits of memory and time: for servers.

`formats.py` refuses what its header shows to be too costly. A server that reads files of
strangers has this besides, against what a header does not show and faults in decoders: whatever
the file does, it does to a process that ends.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .formats import BYTES_PER_PIXEL, ImageError, read_header
from .intake import MAX_PIXELS, WHITE, load_image

CPU_SECONDS, WALL_SECONDS = 10, 30
SPARE_BYTES = 300_000_000  # address space beside the pixels: more than what is used


def load_image_in_worker(
    data: bytes,
    *,
    name: str | int | None = None,
    background: Sequence[int] = WHITE,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """As `load_image`, of the bytes of a file, in a process that is started for it and has ended.

    The process may take `WALL_SECONDS`, on Linux and macOS `CPU_SECONDS` of that, and on Linux 8
    bytes of memory a pixel and `SPARE_BYTES`.

    Raises:
        ImageError: as `load_image`, or the process was over its limits or crashed.
    """
    label = f"image {name}" if isinstance(name, int) else name or "image"
    options = {"name": name, "background": list(background), "max_pixels": max_pixels}
    # A pipe or a buffer would hold the pixels in pieces and as a whole.
    with tempfile.TemporaryFile(buffering=0) as written:
        try:
            worker = subprocess.run(
                [sys.executable, "-m", __name__, json.dumps(options)],
                input=data,
                stdout=written,
                stderr=subprocess.DEVNULL,
                timeout=WALL_SECONDS,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        except subprocess.TimeoutExpired:
            raise ImageError(f"{label}: to decode it took more than {WALL_SECONDS} s") from None
        written.seek(0)
        head, pixels = written.readline(), written.read()
    if worker.returncode != 0 or not head:
        raise ImageError(
            f"{label}: the process that decodes it ended with code {worker.returncode}: over "
            f"{CPU_SECONDS} s of CPU time, or a fault in the decoder"
        )
    answer = json.loads(head)
    if "error" in answer:
        raise ImageError(answer["error"])
    return Image.frombytes("RGB", tuple(answer["size"]), pixels)


def _limit_time() -> None:
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))


def _limit_memory(pixels: int) -> None:
    """Of this process, from now on."""
    if sys.platform == "linux":  # others do not count address space, or do not limit it
        import resource

        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each thread reserves address space
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = used + BYTES_PER_PIXEL * pixels + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    """The worker: a file on stdin; on stdout a line of JSON and the pixels."""
    _limit_time()
    options = json.loads(sys.argv[1])
    data = sys.stdin.buffer.read()
    answer: dict[str, Any]
    label = f"image {options['name']}" if isinstance(options["name"], int) else options["name"]
    try:
        still = read_header(io.BytesIO(data), label or "image", options["max_pixels"])
        _limit_memory(still.width * still.height)
        image = load_image(data, **options)
        answer = {"size": image.size}
    except ImageError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": f"{label or 'image'}: to decode it takes too much memory"}
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    if "size" in answer:
        for row in range(0, image.height, 64):
            box = (0, row, image.width, min(row + 64, image.height))
            sys.stdout.buffer.write(image.crop(box).tobytes())


if __name__ == "__main__":
    main()
