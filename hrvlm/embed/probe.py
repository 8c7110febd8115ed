"""What a run will cost, from a few of its images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .config import EmbedConfig, Facts, Manifest
from .entries import Entry
from .sources import open_source
from .stages import Run, decode, encode

SAMPLE = 16  # images
_SECONDS = 1.0  # for which the encoder is timed
_ROW_BYTES = 64  # of a row beside its features


@dataclass(frozen=True)
class Probed:
    """What the sample says.

    Attributes:
        facts: Of the model.
        device: That it runs on.
        decode_seconds: To read and resize an image, on one core.
        tokens: Of an image.
        tokens_per_second: Of one encoder; 0 where no image of the sample could be read.
        pixel_bytes: Of an image, resized.
        row_bytes: Of a row, uncompressed.
    """

    facts: Facts
    device: str
    decode_seconds: float
    tokens: float
    tokens_per_second: float
    pixel_bytes: float
    row_bytes: float


def sample_of(entries: Sequence[Entry], count: int = SAMPLE) -> list[Entry]:
    """Some of the entries, at equal distances."""
    step = max(1, len(entries) // count)
    return list(entries[::step][:count])


def probe(
    config: EmbedConfig, entries: Sequence[Entry], dtype: str | None = None, threads: int = 0
) -> Probed:
    """Load the model, decode the sample and encode it.

    Args:
        config: Of the run.
        entries: The sample.
        dtype: Of the weights; default: the config's.
        threads: Of the encoder on a CPU; 0 for torch's own choice.
    """
    import torch

    from .model import FeatureModel

    if threads:
        torch.set_num_threads(threads)
    model = FeatureModel(config, dtype)
    facts = model.facts()
    run = Run(config, Manifest.make(config, facts, len(entries), len(entries), ""))
    source = open_source(config)
    decode(source, entries[:1], 0, run)  # what is imported and opened once
    started = time.perf_counter()
    rows = decode(source, entries, 0, run)
    decode_seconds = (time.perf_counter() - started) / len(entries)
    ready = [row for row in rows if row.pixels is not None and row.grid is not None]
    if not ready:
        return Probed(facts, model.device.type, decode_seconds, 0.0, 0.0, 0.0, 0.0)
    patches = sum(row.grid[0] * row.grid[1] for row in ready if row.grid) / len(ready)
    pixels = 3 * patches * facts.patch_size**2
    row_bytes: float = _ROW_BYTES + 4 * facts.hidden_size * (1 + (facts.num_prefix_tokens > 0))
    row_bytes += 2 * facts.hidden_size * patches * ("patches" in config.keep)
    row_bytes += 2 * facts.token_size * patches / facts.factor**2 * ("tokens" in config.keep)
    encode([replace(ready[0])], model, run)
    started, done = time.perf_counter(), 0
    while not done or time.perf_counter() - started < _SECONDS:
        done += encode([replace(row) for row in ready], model, run)
    speed = done / (time.perf_counter() - started)
    tokens = patches + facts.num_prefix_tokens
    return Probed(facts, model.device.type, decode_seconds, tokens, speed, pixels, row_bytes)
