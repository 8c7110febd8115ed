"""Choose the tile sizes of the kernels by timing them on this GPU.

    python -m benchmarks.tuning [--op forward ...] [--head-dim 64 ...] [--bytes 2]
    python -m benchmarks.tuning --dry-run [--chip sm_90] ...
    python -m benchmarks.tuning --counted --chip sm_90 ...

For every row of triton_kernels/tile_tables.py that belongs to this chip, each candidate has to pass
its op's case of ``hrvlm verify`` first, in a process of its own: one that hangs or breaks the
device costs itself alone. Those that pass take turns on images of 201, 2309 and 4101 tokens
(256, 768 and 1024 px for the ops on grids), and the one with the smallest geometric mean of its
times goes into the table. After each row the table is written, and what was measured goes into
benchmarks/results/tune-*.json, beside what the device reaches at best and the commit; a later run
on the same commit adds to that file.

``--dry-run`` compiles every candidate for a chip that need not be there, and tells registers,
spills and shared memory. Nothing is timed or written. ``--counted`` chooses where no GPU has, by
the bounds that follow from what the candidates execute (:mod:`benchmarks.tuning.counted`), and
writes the tables.

Exit codes: 0; 1 if a row has no candidate that works; 2 without a GPU, or on wrong arguments.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

if {"--dry-run", "--counted"} & set(sys.argv):  # with the interpreter, nothing would be compiled
    os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.errors import TritonError

from benchmarks.case import RESULTS, Settings
from benchmarks.compiled.compiler import TARGETS, assert_clean, compile_kernel
from benchmarks.suite import SuiteRun
from benchmarks.tuning import counted, table_file
from benchmarks.tuning.ops import OPS, trouble
from benchmarks.tuning.rows import (
    MISSING,
    Call,
    Key,
    RowResult,
    TunedOp,
    candidates_of,
    earlier,
    reason,
    replaced,
    row,
    short,
)
from benchmarks.tuning.table_file import Table
from benchmarks.tuning.worker import Worker
from hrvlm.machine import device_name
from hrvlm.measuring.timing import Timing, take_turns
from hrvlm_kernels.triton_kernels.launch import architecture, triton_release

TIMEOUT_S = 180  # for a candidate: compiled, tested, and run once as it will be timed
ROUNDS_S = 2.0  # of the candidates of a row together, for each call

Selection = Iterator[tuple[str, TunedOp, Key]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tuning", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--head-dim", nargs="+", type=int, help="of attention and RoPE; or C")
    parser.add_argument("--bytes", nargs="+", type=int, choices=(2, 4), help="of an element")
    parser.add_argument("--dry-run", action="store_true", help="compile the candidates only")
    parser.add_argument("--counted", action="store_true", help="choose by counted bounds")
    parser.add_argument("--chip", choices=TARGETS, help="of what is not timed; default: this GPU's")
    parser.add_argument("--out", type=Path, default=table_file.PATH, help="the tables' file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the JSON file")
    parser.add_argument("--commit", help="commit to name in it, where there is no git")
    args = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    if args.counted and args.chip not in counted.CHIPS:
        parser.error(f"--counted needs --chip, one of {', '.join(counted.CHIPS)}")
    if args.chip and not (args.dry_run or args.counted):
        parser.error("--chip goes with --dry-run: only this machine's chip can be timed")
    if not gpu and not args.dry_run and not args.counted:
        return _refuse("there is no GPU to time on; --dry-run --chip sm_90 compiles the candidates")
    if not gpu and not args.chip:
        return _refuse("there is no GPU: --dry-run needs --chip")
    chip = args.chip or architecture(torch.device("cuda", torch.cuda.current_device()))
    rows = list(_selection(args, chip))
    if not rows:
        return _refuse(f"no row of the tables fits --head-dim {args.head_dim} --bytes {args.bytes}")
    if args.dry_run:
        return dry_run(rows, chip)
    if args.counted:
        return counted.choose(rows, chip, args.out, compiled, put)
    device = torch.device("cuda", torch.cuda.current_device())
    settings = Settings(device, round_s=ROUNDS_S, results=args.results, commit=args.commit)
    return tune(rows, chip, args.out, settings)


def _refuse(why: str) -> int:
    print(f"tune: {why}", file=sys.stderr)
    return 2


def _selection(args: argparse.Namespace, chip: str) -> Selection:
    for name in args.op:
        for key in OPS[name].keys(chip):
            sized = len(key) == 3 or name.startswith("norm")
            if args.head_dim and sized and key[1] not in args.head_dim:
                continue
            if args.bytes and not name.startswith("norm") and key[-1] not in args.bytes:
                continue
            if OPS[name].counted or not args.counted:
                yield name, OPS[name], key


def dry_run(rows: Sequence[tuple[str, TunedOp, Key]], chip: str) -> int:
    """Compile all candidates of the rows; 1 if one of them has none that is clean."""
    failed = False
    for name, op, key in rows:
        clean = 0
        for config in candidates_of(op, key):
            if config is None:
                continue
            verdict, resources = compiled(op, key, config, chip)
            clean += verdict == "clean"
            print(name, key, short(config), resources, verdict, sep="  ", flush=True)
        if not clean:
            failed = True
            print(f"tune: {name} {key}: no candidate compiles clean", file=sys.stderr)
    return int(failed)


def compiled(op: TunedOp, key: Key, config: Any, chip: str) -> tuple[str, str]:
    """("clean" or what is wrong, resources) of a candidate, compiled for `chip`."""
    job = op.job(key, config)
    try:
        built = compile_kernel(job.kernel, job.signature, job.constants, chip, **job.options)
    except (RuntimeError, TritonError) as error:
        return f"does not compile: {reason(error)[:80]}", "-"
    resources = f"{built.regs} registers, {built.spills} spilled, {built.shared // 1024} KiB"
    try:
        assert_clean(built, tensor_core=job.tensor_core)
    except AssertionError as error:
        return str(error).splitlines()[0][:100], resources
    return "clean", resources


def tune(rows: Sequence[tuple[str, TunedOp, Key]], chip: str, out: Path, settings: Settings) -> int:
    """Time the candidates, writing the tables row by row; 1 if a row has none that works."""
    device = settings.device
    tables, failed = table_file.tables(), False
    chosen, spilling = table_file.chosen_by(), table_file.spills()
    chosen[chip] = f"{device_name(device)}, torch {torch.__version__}, Triton {triton.__version__}"
    run = SuiteRun("tune", settings, budget_s=math.inf)
    run.cases = earlier(run.path)
    with closing(Worker(TIMEOUT_S)) as worker:
        for name, op, key in rows:
            found = try_row(worker, name, op, key, settings)
            run.cases = replaced(run.cases, found.cases(run.ceilings))
            run.write()
            if found.best is MISSING:
                failed = True
                print(f"tune: {name} {key}: no candidate works; the row stays", file=sys.stderr)
                continue
            for line in found.lines():
                print(line, flush=True)
            put(tables[op.table], key, found.best)
            spilling.get(triton_release(), {}).pop((op.table, *key), None)  # measured is better
            table_file.replace(tables, chosen, spilling, out)
    return int(failed)


def try_row(worker: Worker, name: str, op: TunedOp, key: Key, settings: Settings) -> RowResult:
    """Find out which candidates work, and time those."""
    candidates, device = candidates_of(op, key), str(settings.device)
    failures = {c: failure(worker, name, key, c, device) for c in candidates}
    right = [c for c in candidates if failures[c] is None]
    calls = op.calls(key, device) if right else ()
    timings = {call: measure(op, key, right, call, settings) for call in calls}
    return RowResult(name, op.table, key, failures, timings)


def failure(worker: Worker, name: str, key: Key, config: Any, device: str) -> str | None:
    """Why a candidate is out, which is printed too."""
    why = worker.failure(trouble, name, key, config, device)
    if why is not None:
        print(f"tune: {name} {key} {short(config)}: {why}", file=sys.stderr, flush=True)
    return why


def measure(
    op: TunedOp, key: Key, configs: Sequence[Any], call: Call, settings: Settings
) -> dict[Any, Timing]:
    """The rounds of every candidate for one of the op's calls."""

    def timed(config: Any) -> Callable[[], None]:
        def run() -> None:
            with row(op.table, key, config):
                call.run()

        return run

    rivals = {short(config): timed(config) for config in configs}
    for run in rivals.values():
        run()
    s = settings
    turns = take_turns(
        rivals, s.device, budget_s=s.round_s, min_rounds=s.min_rounds, max_rounds=s.max_rounds
    )
    return {config: turns[short(config)] for config in configs}


def put(table: Table, key: Key, best: Any) -> None:
    """Make `best` the first choice of a row; what was its last resort stays the last."""
    if best is None:
        table.pop(key, None)
        return
    last = table[key][-1] if key in table else best
    table[key] = (best,) if last == best else (best, last)


if __name__ == "__main__":
    sys.exit(main())
