"""Count what the kernels and their peers execute, and write it down.

    python -m benchmarks.counted [--chip sm_90 ...] [--only "attention forward" ...]
                                 [--missing] [--minutes 5] [--peers FOLDER] [--page]

writes benchmarks/results/counted-<chip>.json and docs/counted.md. Every kernel is compiled for the
chip and executed on a CPU (``kernels/ptx_machine``), some programs of each launch standing for all.
There is no GPU, and nothing here is a time. Every row says of which commit it is. ``--only``
replaces the rows whose op begins so and keeps the others; ``--missing`` counts none that is there,
and ``--minutes`` begins no other after so much CPU time: together they fill the files piece by
piece. ``--page`` writes the page alone. Peers: see benchmarks/counted/peers.py.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # read when Triton is imported

import argparse
import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import RESULTS
from benchmarks.counted import attention, page, peers, rows
from benchmarks.counted.case import Case, Later, count
from benchmarks.counted.machine import machine
from benchmarks.counted.results import name_of, others, write
from benchmarks.suite import commit_here
from hrvlm.files import write_text

CHIPS = {"sm_80": 80, "sm_90": 90}
WRITE_EVERY = 5.0  # seconds of CPU time


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counted", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--only", nargs="+", default=[""], help="ops that begin so")
    parser.add_argument("--missing", action="store_true", help="keep the rows that are there")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of CPU, about")
    parser.add_argument("--peers", type=Path, help="folder of the peers' packages")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=page.DOCS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if not args.page:
        for chip in args.chip:
            path = args.results / f"counted-{chip}.json"
            only = tuple(args.only)
            kept, missing = others(path, () if args.missing else only), set[str]()
            known = {name_of(row) for row in kept}
            written = -WRITE_EVERY
            for row in run(CHIPS[chip], only, args.peers, missing, known):
                kept.append(row)
                if time.process_time() - written > WRITE_EVERY:  # an interruption loses little
                    write(path, chip, kept, sorted(missing))
                    written = time.process_time()
                if time.process_time() > 60 * args.minutes:
                    print(f"sm_{CHIPS[chip]}: stopped after --minutes {args.minutes:g}")
                    break
            if len(kept) > len(known):
                write(path, chip, kept, sorted(missing))
    write_text(args.docs / page.NAME, page.render(args.results))
    return 0


def run(
    chip: int,
    only: tuple[str, ...],
    folder: Path | None,
    missing: set[str],
    known: Container[tuple[str, ...]] = (),
) -> Iterator[dict[str, Any]]:
    """The rows of a chip but for the known ones; adds to `missing` which peers are not there."""
    gpu = machine(chip)
    for make in _cases(chip, folder, only):
        if isinstance(make, Later) and (make.name in known or not make.name[0].startswith(only)):
            continue
        gpu.options.ctas = lambda name, grid: ()  # the forward of a backward: its shapes are enough
        try:
            case = make()
        except peers.MissingError as error:
            missing.add(str(error))
            continue
        finally:
            gpu.options.ctas = None
        if not case.op.startswith(only) or case.name in known:
            continue
        torch.manual_seed(0)
        begin = time.process_time()
        result = count(case, gpu, chip)
        print(
            f"sm_{chip}  {'  '.join(case.name)}:  {result['bound']:.2f} clocks"
            f" per 1000 {case.unit}s ({' + '.join(result['limits'])}),"
            f" {result['instructions']:.2f} instructions  [{time.process_time() - begin:.0f} s]",
            flush=True,
        )
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        yield {**result, "commit": commit_here(), "date": now}


def _cases(chip: int, folder: Path | None, only: tuple[str, ...]) -> Iterator[Callable[[], Case]]:
    """Made one by one, since many hold large tensors; those of other ops not at all."""

    def wanted(op: str) -> bool:
        return any(op.startswith(name) or name.startswith(op) for name in only)

    for op, makers in (
        ("attention forward", lambda: attention.forwards(chip)),
        ("attention forward", lambda: peers.attention(chip, folder)),
        ("attention backward", lambda: attention.backwards()),
        ("attention backward", lambda: peers.backwards(chip, folder)),
        *rows.makers(chip, folder),
    ):
        if wanted(op):
            yield from makers()


if __name__ == "__main__":
    sys.exit(main())
