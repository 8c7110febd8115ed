"""Which tiles of the tile tables spill with the Triton at hand.

    python -m benchmarks.tuning.spills [--target sm_90 ...] [--out FILE]

Compiles the kernels with the tiles of every row, as they are shipped, for chips that need not be
there, and writes this Triton's entry of SPILLS in triton_kernels/tile_tables.py: there the
next tiles of those rows are used. Other reasons not to ship a kernel (it does not fit the chip,
the tensor cores are held up) count as spilling.

Exit codes: 0; 1 if a row would be left without tiles that always run: then nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.compiled import attention_jobs, jobs
from benchmarks.compiled.compiler import TARGETS, assert_clean, compile_kernel
from benchmarks.tuning import table_file
from hrvlm_kernels.triton_kernels import tile_tables
from hrvlm_kernels.triton_kernels.launch import triton_release

# What has no row there runs in another way.
OPTIONAL = ("SHORT", "GEMM_PARTS", "LINEAR_GELU", "LINEAR_SWIGLU", "LINEAR_ROPE_2D")

Row = tuple[Any, ...]


@contextmanager
def all_tiles() -> Iterator[None]:
    """The tables as if nothing were known of any Triton."""
    before = dict(tile_tables.SPILLS)
    tile_tables.SPILLS.clear()
    try:
        yield
    finally:
        tile_tables.SPILLS.update(before)


def trouble(job: jobs.Job, target: str) -> str | None:
    """Why other tiles are better with this Triton."""
    built = compile_kernel(job.kernel, job.signature, job.constants, target, **job.options)
    try:
        assert_clean(built, tensor_core=job.tensor_core)
    except AssertionError as error:
        return str(error).splitlines()[0]
    return None


def spilling(target: str) -> dict[Row, tuple[Any, ...]]:
    """The tiles not to be used on a chip, by (table, *row)."""
    with all_tiles():
        attention = (attention_jobs.distinct_jobs(target, d) for d in attention_jobs.HEAD_DIMS)
        in_tables = [job for job in chain(jobs.jobs(target), *attention) if job.row]
    found: dict[Row, tuple[Any, ...]] = {}
    for job in in_tables:
        others = found.get(job.row, ())
        if job.tiles not in others and (why := trouble(job, target)):
            print(f"{job.row}: {job.name}: {why}", flush=True)
            found[job.row] = (*others, job.tiles)
    return found


def stuck(rows: dict[Row, tuple[Any, ...]]) -> list[Row]:
    """Those of the rows that would have no tiles left that run on any tensors."""
    tables = table_file.tables()

    def left(row: Row) -> list[Any]:
        configs = tables[row[0]].get(row[1:], ())
        kept = [config for config in configs if config not in rows[row]]
        return [config for config in kept if getattr(config, "order", "plain") == "plain"]

    return [row for row in rows if row[0] not in OPTIONAL and not left(row)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, tell, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--out", type=Path, default=table_file.PATH)
    args = parser.parse_args(arguments)
    spills = table_file.spills()
    rows = spills.setdefault(triton_release(), {})
    for target in args.target:
        for row in [row for row in rows if row[1] == target]:
            del rows[row]
        rows.update(spilling(target))
    for row in stuck(rows):
        print(f"spills: {row} would have no tiles that always run", file=sys.stderr)
    if stuck(rows):
        return 1
    tables, chosen = table_file.tables(), table_file.chosen_by()
    table_file.replace(tables, chosen, spills, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
