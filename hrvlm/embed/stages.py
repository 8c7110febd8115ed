"""The three steps of the pipeline, each over one part: decode, encode, write.

A row of the Ray data set is a part of the output, whole: what Ray divides, joins or does again are
rows, so that no part is ever torn. Errors travel as data: whatever is raised for an image becomes
its row; only a process that dies, or a disk that is full, is the run's own affair.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..images.processor import ImageProcessor, normalize
from .config import EmbedConfig, Manifest
from .entries import Entry, apart
from .rows import Row, count_errors, listed, parquet_bytes, table_of
from .sources import Opener, Source, open_source
from .store import Store, part_name
from .tries import TRIES

if TYPE_CHECKING:
    from PIL import Image

    from .model import FeatureModel


@dataclass(frozen=True)
class Run:
    """What each step has to know.

    Attributes:
        config: What was asked for.
        manifest: What it comes to.
        careful: Decode each image in a process of its own, and encode it alone.
        tries: The actor that counts; None outside of Ray.
    """

    config: EmbedConfig
    manifest: Manifest
    careful: bool = False
    tries: Any = None

    def gives_up(self, step: str, part: int) -> bool:
        """Whether the processes that did this have died too often; counts one more beginning."""
        if self.tries is None:
            return False
        import ray

        key = f"{step} {part}{' with care' if self.careful else ''}"
        return ray.get(self.tries.begin.remote(key)) > TRIES


@lru_cache(maxsize=2)
def _source(config: EmbedConfig) -> Source:
    return open_source(config)


def decode_part(task: dict[str, Any], run: Run) -> dict[str, Any]:
    """Read, decode and resize the images of a part."""
    started = time.perf_counter()
    part = int(task["part"])
    if run.gives_up("decode", part):
        return {"part": part, "pixels": b"", "rows": "", "decode": 0.0}
    first = part * run.manifest.rows_per_part
    rows = decode(_source(run.config), listed(run.config.out, part, run.manifest), first, run)
    pixels = [row.pixels for row in rows if row.pixels is not None]
    flat = np.concatenate([p.ravel() for p in pixels]) if pixels else np.empty(0, np.uint8)
    told = [[row.id, row.row, row.error, row.kind, row.size, row.resized, row.grid] for row in rows]
    seconds = time.perf_counter() - started
    return {"part": part, "pixels": flat.tobytes(), "rows": json.dumps(told), "decode": seconds}


def decode(source: Opener, entries: Sequence[Entry], first: int, run: Run) -> list[Row]:
    """The images of these entries, resized; those that can't be read have an error."""
    facts = run.manifest.facts
    processor = ImageProcessor(
        run.config.max_img_size,
        vit_patch_size=facts.patch_size,
        pixel_shuffle_factor=facts.factor,
        allow_upscale=run.config.allow_upscale,
    )
    rows = [Row(entry.id, first + i) for i, entry in enumerate(entries)]
    for row, given in zip(rows, apart(source.images, entries), strict=True):
        try:
            _decode_one(row, given, processor, careful=run.careful)
        except Exception as error:  # decoders raise anything; the row tells it
            row.fail(error)
    return rows


def _decode_one(row: Row, given: Any, processor: ImageProcessor, *, careful: bool) -> None:
    if isinstance(given, BaseException):
        raise given
    from ..images.pixels import load_pixels, resize_pixels

    pixels = load_pixels(_in_own_process(given, row.id) if careful else given, name=row.id)
    _, height, width = pixels.shape
    geometry = processor.geometry(height, width)
    row.size, row.grid = (height, width), geometry.patch_grid
    row.resized = geometry.height, geometry.width
    row.pixels = resize_pixels(pixels, *row.resized).numpy()


def _in_own_process(given: Any, name: str) -> Image.Image:
    from ..images.intake import label_of, opened
    from ..images.worker import load_image_in_worker

    with opened(given, label_of(given, name)) as stream:
        return load_image_in_worker(stream.read(), name=name)


def rows_of(task: dict[str, Any]) -> list[Row]:
    """What `decode_part` gave, with the pixels of each image as a view."""
    flat, at, rows = np.frombuffer(task["pixels"], dtype=np.uint8), 0, []
    for name, index, error, kind, size, resized, grid in json.loads(task["rows"]):
        row = Row(name, index, error, kind)
        row.size, row.grid = size and tuple(size), grid and tuple(grid)
        if error is None:
            height, width = row.resized = tuple(resized)
            end = at + 3 * height * width
            row.pixels, at = flat[at:end].reshape(3, height, width), end
        rows.append(row)
    return rows


class Encoder:
    """An encoder in a process of its own."""

    def __init__(self, run: Run, threads: int):
        import torch

        from .model import FeatureModel

        if threads:
            torch.set_num_threads(threads)
        self._run = run
        self._model = FeatureModel(run.config, run.manifest.facts.dtype)

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """The rows of a part as an Arrow table, and how long they took."""
        started, part = time.time(), int(task["part"])
        if not task["rows"] or self._run.gives_up("encode", part):
            return {"table": b"", "told": json.dumps({"part": part, "died": True})}
        rows = rows_of(task)
        tokens = encode(rows, self._model, self._run)
        table = table_of(rows, part, self._run.manifest)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        told = {
            "part": part,
            "images": len(rows),
            "bad": count_errors(rows),
            "tokens": tokens,
            "worker": f"{os.uname().nodename}:{os.getpid()}",
            "started": started,
            "ended": time.time(),
            "decode": float(task["decode"]),
        }
        return {"table": sink.getvalue().to_pybytes(), "told": json.dumps(told)}


def encode(rows: Sequence[Row], model: FeatureModel, run: Run) -> int:
    """Give each row that has pixels its features; returns the tokens.

    Packs are filled in the order of the rows; what a pass has no memory for is tried in halves.
    """
    ready = [row for row in rows if row.pixels is not None]
    lengths = [model.tokens_of(row.grid) for row in ready if row.grid is not None]
    limit = 1 if run.careful else run.config.max_tokens_per_pass
    for pack in packs(lengths, limit):
        _encode_pack(ready[pack], model, run)
    return sum(lengths)


def packs(lengths: Sequence[int], limit: int) -> Iterator[slice]:
    """Runs of neighbours whose lengths add up to at most `limit`, or of one that is longer."""
    first = total = 0
    for i, length in enumerate(lengths):
        if i > first and total + length > limit:
            yield slice(first, i)
            first, total = i, 0
        total += length
    if lengths:
        yield slice(first, len(lengths))


def _encode_pack(rows: Sequence[Row], model: FeatureModel, run: Run) -> None:
    import torch

    facts = run.manifest.facts
    try:
        pixels = [torch.from_numpy(np.array(row.pixels)) for row in rows]  # Ray's own is read-only
        ready = [normalize(p.to(model.device), facts.image_mean, facts.image_std) for p in pixels]
        for row, features in zip(rows, model(ready), strict=True):
            row.features, row.pixels = features, None
            if not np.isfinite(features["mean"]).all():
                row.fail("features are not finite")
    except torch.OutOfMemoryError as error:
        if len(rows) == 1:
            rows[0].fail(MemoryError(f"no memory for its {model.tokens_of(rows[0].grid)} tokens"))
            return
        del error
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            _encode_pack(half, model, run)


def write_part(task: dict[str, Any], run: Run) -> dict[str, Any]:
    """Write a part; says what `Encoder` told, with the bytes written, or why it can't be."""
    told = json.loads(task["told"])
    if "died" in told:
        return {"told": task["told"]}
    with pa.ipc.open_stream(task["table"]) as stream:
        content = parquet_bytes(stream.read_all())
    try:
        Store(run.config.out).write(part_name(told["part"]), content)
    except OSError as error:
        told["failed"] = f"{error.strerror or error}"
    return {"told": json.dumps(told | {"bytes": len(content)})}


class Writer:
    """:func:`write_part` in a process that stays."""

    def __init__(self, run: Run):
        self._run = run

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """See there."""
        return write_part(task, self._run)
