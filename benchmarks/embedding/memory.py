"""Memory of a run over very many small images: `python -m benchmarks.embedding.memory`.

Sampled each second: private memory (resident and not shared) of the driver, of the encoder, of the
processes that decode and write and of Ray itself, and what lies in the shared object store. The
pixels of all images together are several times as large as the store. Writes a result file and a
plot.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.case import RESULTS
from benchmarks.embedding.inputs import write_encoder, write_pictures
from hrvlm.charts import Axis, Series, line_chart
from hrvlm.embed.config import EmbedConfig, Resources
from hrvlm.embed.run import embed
from hrvlm.files import write_text

ROOT = Path(__file__).parents[2]
PLOT = ROOT / "docs" / "embed_memory.svg"
MIB = 1 << 20
STORE = 80 * MIB
GROUPS = ("driver", "encoder", "decoding and writing", "Ray", "object store")


def measured() -> dict[str, float]:
    """MiB of each group at this moment."""
    found = dict.fromkeys(GROUPS, 0.0)
    driver = psutil.Process()
    for process in [driver, *driver.children(recursive=True)]:
        try:
            memory, title = process.memory_info(), " ".join(process.cmdline())
        except psutil.Error:  # it has ended
            continue
        private = (memory.rss - memory.shared) / MIB
        if process == driver:
            found["driver"] += private
        elif "Encoder" in title:
            found["encoder"] += private
        elif title.startswith("ray::"):
            found["decoding and writing"] += private
        else:
            found["Ray"] += private
            if "raylet/raylet" in title:
                found["object store"] = store_bytes(process.pid) / MIB
    return found


def store_bytes(raylet: int) -> int:
    """Of the shared memory that the object store has touched; it gives none back."""
    total = 0
    for descriptor in Path(f"/proc/{raylet}/fd").iterdir():
        try:
            if "/plasma" in os.readlink(descriptor):
                total += 512 * os.stat(descriptor).st_blocks
        except OSError:  # closed meanwhile
            continue
    return total


class Sampler(threading.Thread):
    """Samples until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.rows: list[dict[str, float]] = []
        self.done = 0
        self._ending = threading.Event()

    def run(self) -> None:
        """Sample each second."""
        started = time.monotonic()
        while not self._ending.wait(1.0):
            at = {"seconds": round(time.monotonic() - started, 1), "images": self.done}
            self.rows.append(at | {k: round(v, 1) for k, v in measured().items()})

    def stop(self) -> None:
        """End it."""
        self._ending.set()
        self.join()


def run(images: int, side: int) -> dict[str, Any]:
    """The samples of a run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "in", images, (side, side), distinct=200)
        write_encoder(
            folder / "model",
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
        )
        config = EmbedConfig(
            str(folder / "in"), str(folder / "out"), model=str(folder / "model"), rows_per_part=128
        )
        sampler = Sampler()

        def tell(count: int) -> None:
            sampler.done += count

        sampler.start()
        report = embed(config, Resources(cpus=2, object_store_bytes=STORE), on_images=tell)
        sampler.stop()
    assert report.rows == images and not report.bad
    return {
        "command": f"python -m benchmarks.embedding.memory --images {images} --side {side}",
        "images": images,
        "side": side,
        "pixel_mib": round(images * 3 * side * side / MIB),
        "store_mib": STORE // MIB,
        "seconds": round(report.seconds, 1),
        "samples": sampler.rows,
    }


def plot(result: dict[str, Any]) -> str:
    """Memory over the images done."""
    rows = [row for row in result["samples"] if row["images"]]
    series = [
        Series(name, tuple((float(row["images"]), row[name]) for row in rows)) for name in GROUPS
    ]
    title = f"hrvlm embed, {result['images']} images: {result['pixel_mib']} MiB of pixels pass"
    return line_chart(title, Axis("images done"), Axis("MiB"), series)


def main(arguments: list[str] | None = None) -> None:
    """Run, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--out", type=Path, default=RESULTS / "embedding_memory.json")
    parser.add_argument("--plot", type=Path, default=PLOT)
    options = parser.parse_args(arguments)
    result = run(options.images, options.side)
    write_text(options.out, json.dumps(result) + "\n")
    write_text(options.plot, plot(result))


if __name__ == "__main__":
    main()
