"""A row of the tile tables as something to choose: candidates, gate and timed calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from triton import CompilationError

from benchmarks.tile_table_file import Table
from hrvlm_kernels.triton_kernels import tile_tables
from tests.kernels import shipped

HEADS, TOKENS = 16, 16_384  # of what is timed

Key = tuple[Any, ...]
Run = Callable[[], object]


class Call(NamedTuple):
    """What is timed: useful `flops`, None where memory decides."""

    label: str
    run: Run
    flops: int | None = None


@dataclass(frozen=True)
class TunedOp:
    """One table and how to choose its rows; keys are those of the table.

    A candidate of None means no row: what runs instead is timed like the others.
    """

    table: str
    keys: Callable[[str], Sequence[Key]]
    candidates: Callable[[Key], Sequence[Any]]
    gate: Callable[[Key, str], None]  # raises AssertionError
    calls: Callable[[Key, str], Sequence[Call]]
    job: Callable[[Key, Any], shipped.Job]


def candidates_of(op: TunedOp, key: Key) -> list[Any]:
    """What is in the table now, then the op's other candidates."""
    current = getattr(tile_tables, op.table).get(key, ())
    return list(dict.fromkeys((*current, *op.candidates(key))))


@contextmanager
def row(table: str, key: Key, config: Any) -> Iterator[None]:
    """Let the kernels see one row as `config`, or not at all when None; no Triton spills it."""
    rows: Table = getattr(tile_tables, table)
    before, spills = dict(rows), dict(tile_tables.SPILLS)
    tile_tables.SPILLS.clear()
    rows.pop(key, None)
    if config is not None:
        rows[key] = (config,)
    try:
        yield
    finally:
        rows.clear()
        rows.update(before)
        tile_tables.SPILLS.update(spills)


def reason(error: Exception) -> str:
    """One line for an error; those of Triton's language show the code first."""
    lines = str(error).strip().splitlines() or ["no message"]
    line = lines[-1] if isinstance(error, CompilationError) else lines[0]
    return f"{type(error).__name__}: {line}"[:200]


def dtype_of(key: Key) -> torch.dtype:
    """The dtype that the rows with this key are tuned in; those of norms serve every dtype."""
    return torch.float32 if key[-1] == 4 else torch.bfloat16


def attention_keys(chip: str) -> list[Key]:
    """The rows of the tables that go by head_dim; first those of DINOv3, in 16 bits."""
    return [(chip, head_dim, size) for size in (2, 4) for head_dim in (64, 128, 32)]


def attention_job(make: Callable[..., shipped.Job], **options: Any) -> Callable[..., shipped.Job]:
    """To compile a row of those."""
    return lambda key, config: make(key[1], dtype_of(key), config, **options)
