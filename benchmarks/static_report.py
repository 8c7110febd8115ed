"""What the compilers make of every shipped kernel: a table that needs no GPU.

    python -m benchmarks.static_report [--target sm_90 ...] [--out FILE]

Each kernel is compiled for each chip with the tile sizes of its table. The loop is the smallest one
around a tensor-core instruction; for attention its instructions are also given per score element
and thread, the figure that decides whether the tensor cores wait for the softmax.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from tests.kernels import shipped, shipped_attention
from tests.kernels.compile_checks import TARGETS, CompiledKernel, compile_kernel

OUT = Path(__file__).parent / "results" / "static_report.md"
COLUMNS = (
    "kernel",
    "registers",
    "shared KiB",
    "spills",
    "instructions",
    "in the loop",
    "per score",
)


def rows_of(target: str) -> Iterator[tuple[str, ...]]:
    """A row of the table for each kernel and configuration of `target`."""
    for job in (*shipped.jobs(target), *shipped_attention.attention_jobs(target)):
        built = compile_kernel(job.kernel, job.signature, job.constants, target, **job.options)
        yield (
            job.name,
            str(built.regs),
            f"{built.shared / 1024:.0f}",
            str(built.spills),
            str(built.instructions),
            str(built.loop_instructions or "-"),
            per_score(job, built),
        )


def per_score(job: shipped.Job, built: CompiledKernel) -> str:
    """Instructions of the inner loop for each score that a thread computes in it."""
    if not built.loop_instructions or not job.name.startswith("varlen_attention"):
        return "-"
    lanes = 32 if built.target.startswith("sm_") else 64
    scores = job.constants["BM"] * job.constants["BN"] / (lanes * job.options["num_warps"])
    return f"{built.loop_instructions / scores:.1f}"


def main() -> None:
    """Compile everything and write the table, complete or not at all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    lines = [
        "# Shipped kernels, compiled without a GPU",
        "",
        f"`python -m benchmarks.static_report --target {' '.join(args.target)}` with torch "
        f"{torch.__version__}, Triton {triton.__version__}. Registers are per thread, spills in "
        "bytes (NVIDIA) or registers (AMD). Nothing here is a measurement of speed.",
    ]
    for target in args.target:
        lines += ["", f"## {target}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        for row in rows_of(target):
            print(target, *row, sep="  ", flush=True)
            lines.append(f"| {' | '.join(row)} |")
    temporary = args.out.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n")
    os.replace(temporary, args.out)


if __name__ == "__main__":
    main()
