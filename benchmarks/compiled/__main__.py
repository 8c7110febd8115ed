"""What the compilers make of every shipped kernel: a table that needs no GPU.

    python -m benchmarks.compiled [--target sm_90 ...] [--out FILE]

Each kernel is compiled for each chip with the tile sizes of its table: attention with RoPE where
its kernel exists with and without. The loop is the smallest one around a tensor-core instruction;
for attention its instructions are also given per score element and thread, the figure that decides
whether the tensor cores wait for the softmax. The orders of the attention forward on sm_90, shipped
or not, are compared at the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch
import triton

from benchmarks.case import RESULTS
from benchmarks.compiled import attention_jobs, jobs
from benchmarks.compiled.compiler import TARGETS, CompiledKernel, compile_kernel
from hrvlm.files import write_text
from hrvlm_kernels.triton_kernels.tilings import Tiling

OUT = RESULTS / "static_report.md"
COLUMNS = (
    "kernel",
    "registers",
    "shared KiB",
    "spills",
    "instructions",
    "in the loop",
    "per score",
)


# What was expected of (order, head_dim, tile) on sm_90 before it was written; of others, nothing.
LEADS = {
    ("plain", 64, "128x128"): "6.9 instructions per score; every product waited for",
    ("ahead", 64, "128x128"): "7.4 instructions per score, 32 exps beside a product, no spill",
    ("gluon", 64, "128x128"): "both products asynchronous, no spill",
    ("gluon", 128, "128x128"): "both products asynchronous, no spill",
}
# (head_dim, order, keys of a block); all have 128 rows.
VARIANTS = (
    (64, "plain", 128),
    (64, "plain", 64),
    (64, "ahead", 128),
    (64, "gluon", 128),
    (80, "plain", 128),
    (80, "ahead", 128),
    (128, "plain", 64),
    (128, "ahead", 128),
    (128, "gluon", 128),
)
_COMPUTING_WARPS = 8  # of each; warps that only load come on top
VARIANT_COLUMNS = (
    "order",
    "head_dim",
    "tile",
    "warps",
    "registers",
    "spills",
    "per score",
    "exps beside a product",
    "lead",
)


def variant_rows() -> Iterator[tuple[str, ...]]:
    """A row for each order of the attention forward on sm_90, none of which has RoPE."""
    for head_dim, order, step in VARIANTS:
        job = _variant_job(head_dim, order, step)
        built = compile_kernel(job.kernel, job.signature, job.constants, "sm_90", **job.options)
        scores = 128 * step / (32 * _COMPUTING_WARPS)
        tile = f"128x{step}"
        lead = LEADS.get((order, head_dim, tile), "-")
        yield (
            order,
            str(head_dim),
            tile,
            str(built.num_warps),
            str(built.regs),
            str(built.spills),
            f"{built.loop_instructions / scores:.1f}",
            f"{built.exps_beside_wgmma} of {scores:.0f}",
            lead + ("; ptxas serializes wgmma" if built.advisories else ""),
        )


def _variant_job(head_dim: int, order: str, step: int) -> jobs.Job:
    if order == "gluon":
        return attention_jobs.gluon_job(head_dim, torch.bfloat16, step)
    stages = 3 if order == "ahead" and head_dim == 64 else 2
    tiling = Tiling(128, step, 8, stages, order)
    return attention_jobs.forward_job(head_dim, torch.bfloat16, tiling)


def variant_section(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """The lines of the comparison of the orders."""
    return [
        "",
        "## Orders of the attention forward on sm_90",
        "",
        "The loop, for each score that a computing thread has, beside what was expected of the "
        'order with this head_dim and tile ("-": nothing). "exps beside a product": the most that '
        "stand between the issue of a wgmma and the next wait, of the scores that a thread has in "
        "a block: what overlaps. A block also has an exp for each of a thread's two rows, which "
        "fades what was summed up before it: so it can be up to two more than the scores.",
        "",
        f"| {' | '.join(VARIANT_COLUMNS)} |",
        "|---" * len(VARIANT_COLUMNS) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def rows_of(target: str) -> Iterator[tuple[str, ...]]:
    """A row of the table for each kernel and configuration of `target`."""
    attention = (attention_jobs.distinct_jobs(target, d) for d in attention_jobs.HEAD_DIMS)
    for job in (*jobs.jobs(target), *chain.from_iterable(attention)):
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


def per_score(job: jobs.Job, built: CompiledKernel) -> str:
    """Instructions of the inner loop for each score that a thread computes in it."""
    if not built.loop_instructions or not job.name.startswith("varlen_attention"):
        return "-"
    if "short" in job.name:  # its loop holds the rotation of q as well
        return "-"
    lanes = 32 if built.target.startswith("sm_") else 64
    scores = job.constants["BM"] * job.constants["BN"] / (lanes * job.options["num_warps"])
    return f"{built.loop_instructions / scores:.1f}"


def main() -> None:
    """Compile everything and write the table, complete or not at all."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    lines = [
        "# Shipped kernels, compiled without a GPU",
        "",
        f"`python -m benchmarks.compiled --target {' '.join(args.target)}` with torch "
        f"{torch.__version__}, Triton {triton.__version__}. Registers are per thread, spills in "
        "bytes (NVIDIA) or registers (AMD). Nothing here is a measurement of speed.",
    ]
    for target in args.target:
        lines += ["", f"## {target}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        for row in rows_of(target):
            print(target, *row, sep="  ", flush=True)
            lines.append(f"| {' | '.join(row)} |")
    if "sm_90" in args.target:
        lines += variant_section(variant_rows())
    write_text(args.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
