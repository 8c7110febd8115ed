"""Choose the tile sizes of the kernels by timing them on this GPU.

    python -m benchmarks.tune [--op forward ...] [--head-dim 64 ...] [--bytes 2]
    python -m benchmarks.tune --dry-run [--chip sm_90] ...

For every row of kernels/hrvlm_kernels/tile_tables.py that belongs to this chip, each candidate has
to pass the op's test against float64 first; those that do take turns on images of 201, 2309 and
4101 tokens (256, 768 and 1024 px for the ops on grids), and the one with the smallest geometric
mean of its times goes into the table. The file is replaced once, at the end.

``--dry-run`` compiles every candidate for a chip that need not be there, and tells registers,
spills and shared memory. Nothing is timed or written.

Exit codes: 0; 1 if a row has no candidate that works; 2 without a GPU, or on wrong arguments.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:  # with the interpreter, nothing would be compiled
    os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.runtime.errors import OutOfResources

from benchmarks import tile_table_file
from benchmarks.tile_table_file import Table
from benchmarks.tune_ops import OPS, Key, TunedOp, candidates_of, row
from hrvlm.timing import take_turns
from hrvlm_kernels.launch import architecture
from tests.kernels.compile_checks import TARGETS, assert_clean, compile_kernel

Selection = Iterator[tuple[str, TunedOp, Key]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--head-dim", nargs="+", type=int, help="of attention and RoPE; or C")
    parser.add_argument("--bytes", nargs="+", type=int, choices=(2, 4), help="of an element")
    parser.add_argument("--dry-run", action="store_true", help="compile the candidates only")
    parser.add_argument("--chip", choices=TARGETS, help="of a dry run; default: this GPU's")
    parser.add_argument("--out", type=Path, default=tile_table_file.PATH)
    args = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    if args.chip and not args.dry_run:
        parser.error("--chip goes with --dry-run: only this machine's chip can be timed")
    if not gpu and not args.dry_run:
        return _refuse("there is no GPU to time on; --dry-run --chip sm_90 compiles the candidates")
    if not gpu and not args.chip:
        return _refuse("there is no GPU: --dry-run needs --chip")
    chip = args.chip or architecture(torch.device("cuda", torch.cuda.current_device()))
    rows = list(_selection(args, chip))
    if not rows:
        return _refuse(f"no row of the tables fits --head-dim {args.head_dim} --bytes {args.bytes}")
    if args.dry_run:
        return dry_run(rows, chip)
    return tune(rows, chip, args.out)


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
            print(name, key, _short(config), resources, verdict, sep="  ", flush=True)
        if not clean:
            failed = True
            print(f"tune: {name} {key}: no candidate compiles clean", file=sys.stderr)
    return int(failed)


def compiled(op: TunedOp, key: Key, config: Any, chip: str) -> tuple[str, str]:
    """("clean" or what is wrong, resources) of a candidate, compiled for `chip`."""
    job = op.job(key, config)
    try:
        built = compile_kernel(job.kernel, job.signature, job.constants, chip, **job.options)
    except (RuntimeError, triton.CompilationError) as error:
        return f"does not compile: {str(error).splitlines()[0][:80]}", "-"
    resources = f"{built.regs} registers, {built.spills} spilled, {built.shared // 1024} KiB"
    try:
        assert_clean(built, tensor_core=job.tensor_core)
    except AssertionError as error:
        return str(error).splitlines()[0][:100], resources
    return "clean", resources


def tune(rows: Sequence[tuple[str, TunedOp, Key]], chip: str, out: Path) -> int:
    """Time the candidates, writing the tables row by row; 1 if a row has none that works."""
    device = torch.device("cuda", torch.cuda.current_device())
    tables, failed = tile_table_file.tables(), False
    chosen = tile_table_file.chosen_by()
    chosen[chip] = (
        f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, "
        f"Triton {triton.__version__}"
    )
    for name, op, key in rows:
        right = [c for c in candidates_of(op, key) if _works(op, key, c, str(device))]
        if not right:
            failed = True
            print(f"tune: {name} {key}: no candidate works; the row stays", file=sys.stderr)
            continue
        times = measure(op, key, right, device)
        scores = geometric_means(times)
        best = min(range(len(right)), key=scores.__getitem__)
        for i in sorted(range(len(right)), key=scores.__getitem__):
            ms = "  ".join(f"{label} {1e3 * t[i]:.3f} ms" for label, t in times.items())
            mark = "*" if i == best else " "
            print(mark, name, key, _short(right[i]), ms, f"{scores[i]:.3f}", sep="  ", flush=True)
        put(tables[op.table], key, right[best])
        tile_table_file.replace(tables, chosen, out)  # a candidate that hangs costs no other row
    return int(failed)


def _works(op: TunedOp, key: Key, config: Any, device: str) -> bool:
    """Whether a candidate fits the chip and passes the op's gate; if not, say why."""
    try:
        with row(op.table, key, config):
            op.gate(key, device)
    except (AssertionError, OutOfResources, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        print(f"tune: {op.table} {key} {_short(config)}: {reason}", file=sys.stderr)
        return False
    return True


def measure(
    op: TunedOp, key: Key, configs: Sequence[Any], device: torch.device
) -> dict[str, list[float]]:
    """Median seconds of every candidate for each of the op's calls."""

    def timed(config: Any, run: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            with row(op.table, key, config):
                run()

        return call

    times = {}
    for label, run in op.calls(key, str(device)):
        rivals = {str(i): timed(config, run) for i, config in enumerate(configs)}
        for call in rivals.values():
            call()
        turns = take_turns(rivals, device)
        times[label] = [turns[name].median for name in rivals]
    return times


def geometric_means(times: dict[str, list[float]]) -> list[float]:
    """Of each candidate's times, each relative to the best candidate's."""
    relative = [[t / min(column) for t in column] for column in times.values()]
    return [math.exp(sum(map(math.log, ts)) / len(ts)) for ts in zip(*relative, strict=True)]


def put(table: Table, key: Key, best: Any) -> None:
    """Make `best` the first choice of a row; what was its last resort stays the last."""
    if best is None:
        table.pop(key, None)
        return
    last = table[key][-1] if key in table else best
    table[key] = (best,) if last == best else (best, last)


def _short(config: Any) -> str:
    return "no row" if config is None else tile_table_file.text(config)


if __name__ == "__main__":
    sys.exit(main())
