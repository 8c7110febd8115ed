"""Choose tile sizes by their counted bounds, for a chip that need not be there.

The calls are those that a GPU would time. Each candidate that compiles clean is executed on the PTX
machine, some programs of every launch standing for all, and the one with the smallest geometric
mean of its bounds is chosen. Programs of attention and of products share what they read, so the
device's memory, the same for all their candidates, is left out of those. What bounds can't tell
apart to a hundredth, the instructions do; what then still ties stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.counted.case import Case, Grid, Part, count
from benchmarks.counted.machine import machine
from benchmarks.tuning import table_file
from benchmarks.tuning.rows import Call, Key, TunedOp, candidates_of, row, short
from ptx_machine import PtxDriver

CHIPS = {"sm_80": 80, "sm_90": 90}
PROGRAMS = 5
TIE = 0.01
_SHARING = ("attention", "pixel_shuffle_linear")
Verdict = Callable[[TunedOp, Key, Any, str], tuple[str, str]]


def choose(
    rows: Sequence[tuple[str, TunedOp, Key]], chip: str, out: Path, compiled: Verdict,
    put: Callable[[table_file.Table, Key, Any], None],
) -> int:  # fmt: skip
    """Write the tables row by row; 1 if one has no candidate that compiles clean."""
    torch.set_num_threads(1)
    gpu, tables, failed = machine(CHIPS[chip]), table_file.tables(), 0
    chosen, spilling = table_file.chosen_by(), table_file.spills()
    for name, op, key in rows:
        calls = calls_of(op, key, gpu)
        found: dict[Any, tuple[float, float]] = {}
        for config in candidates_of(op, key):
            if config is not None and compiled(op, key, config, chip)[0] != "clean":
                continue
            found[config] = bound(name, op, key, config, calls, gpu)
            print(name, key, short(config), "  {:.5g} clocks, {:.5g} instructions".format(
                *found[config]), flush=True)  # fmt: skip
        if not found:
            failed = 1
            continue
        best = best_of(found)
        print(f"* {name} {key} {short(best)}", flush=True)
        put(tables[op.table], key, best)
        chosen[chip] = described(chosen[chip], op.table)
        table_file.replace(tables, chosen, spilling, out)
    return failed


def described(before: str, table: str) -> str:
    """CHOSEN_BY of a chip when this table is counted too."""
    counted = {name for name in before.split(" counted")[0].split(", ") if name.isupper()}
    names = ", ".join(sorted(counted | {table}))
    return f"{names} counted; others compiled, Triton {triton.__version__}"


def best_of(found: dict[Any, tuple[float, float]]) -> Any:
    """The smallest bound; within a tie the fewest instructions, then the first."""
    least = min(bound for bound, _ in found.values())
    near = {c: n for c, (bound, n) in found.items() if bound <= least * (1 + TIE)}
    fewest = min(near.values())
    return next(config for config, n in near.items() if n <= fewest * (1 + TIE))


def calls_of(op: TunedOp, key: Key, gpu: PtxDriver) -> Sequence[Call]:
    """What would be timed, made without running a program: a backward's forward, say."""
    gpu.options.ctas = lambda name, grid: ()
    try:
        return op.calls(key, "cpu")
    finally:
        gpu.options.ctas = None


def bound(
    name: str, op: TunedOp, key: Key, config: Any, calls: Sequence[Call], gpu: PtxDriver
) -> tuple[float, float]:
    """Geometric means over the calls: clocks of a multiprocessor, and warp instructions."""
    found = []
    with row(op.table, key, config):
        for call in calls:
            case = Case(
                name, call.label, short(config), call.run, unit="call", units=1000,
                samples={"": inside}, sharing=dict.fromkeys(_SHARING, 0.0),
            )  # fmt: skip
            result = count(case, gpu, gpu.capability)
            found.append((result["bound"], result["instructions"]))
    logs = [[math.log(value) for value in values] for values in zip(*found, strict=True)]
    clocks, instructions = (math.exp(sum(values) / len(values)) for values in logs)
    return clocks, instructions


def inside(grid: Grid) -> list[Part]:
    """Programs spread over the grid, not its ends: the last ones may have little to do."""
    total = grid[0] * grid[1] * grid[2]
    chosen = sorted({int((i + 0.5) * total / PROGRAMS) for i in range(PROGRAMS)})
    return [(chosen, total / len(chosen))]
