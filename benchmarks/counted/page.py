"""Make docs/counted.md from the result files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
NAME = "counted.md"
Row = dict[str, Any]

ABOUT = """\
# Counted work

Made by `python -m benchmarks.counted` from `benchmarks/results/counted-*.json`; don't edit.

No GPU has run any of this, and **nothing here is a time**. Each kernel was compiled for the chip by
Triton's own backend, and its PTX was executed on a CPU (`kernels/ptx_machine`), ours and the peers'
on the same inputs, in bfloat16 with 16 heads. The executor counts warp instructions by unit,
32-byte sectors, wavefronts of shared memory with their bank conflicts, and what the tensor cores
do. From these follows a **bound**: the clocks that one multiprocessor needs for the unit that has
most to do, for 1000 units of useful work (scores without padding, elements, products), as if
everything else happened beside it. Latency, occupancy, dependences and launches are not in it.
Launches of one call add up. The epilogues of linear_gelu, linear_swiglu and linear_rope_2d count as
serial: what they add to the need of each unit comes on top ("then"), though another program's
products may run beside them. "Rotated in the product" is attention on q and k that linear_rope_2d
has rotated, with what that adds to the product of q, k and v, and with the table.

*Instructions* are those of a thread for a unit of useful work, read from machine code: PTX says how
often a loop runs, SASS how many instructions a turn has (where a loop can't be matched, PTX is
counted: marked with *). *PTX* has them as PTX does, which overstates addresses and moves, and has
once chosen wrongly; *loop* is the machine code of one turn of the main loop, static.
*FLOPs* are executed for each useful one: above 1 is padding (in the backward, five products are
useful and seven are executed). *Sectors* are bytes of sectors for each byte asked
for, and *moved* those of device memory for each byte that the op has to move at least. *Conflicts*
are wavefronts of shared memory for each one without conflicts. The peers of attention take images
of one length, so that the mixed draw has none; flash-attn's rotary and Liger's know one direction.

Some programs of a launch stand for all: of attention a full tile and the last one of a head, six
tiles of the mixed draw (64 images of 224 to 1024 px, see `benchmarks/case.py`), one tile of a
product, two to ten programs of kernels that do the same for every row. Device memory is counted as
if q, k and v, weights and rows came from it once, and as if parts of a sum went there and came
back. "Few tokens" are those of one image of 1024 px, with nothing else on the chip: there, and only
there, the bound is that of the multiprocessor with most programs, so that those without one count
as idle. Heads of 80 are counted without RoPE, the peers' with tiles padded to 128. Whether the
softmax does run beside the tensor cores is read from machine code: docs/tuning.md. The rates, their
sources and which of them are uncertain stand in `benchmarks/counted/rates.py`.
"""
HEADER = (
    "| {} | kernel | bound | limited by | next | instructions | PTX | loop "
    "| FLOPs | sectors | moved | conflicts |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def rounded(value: Any) -> Any:
    """Numbers with five digits: what is sampled has no more."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    return [rounded(x) for x in value] if isinstance(value, (list, tuple)) else value


def render(results: Path) -> str:
    """The page."""
    parts = [ABOUT]
    files = sorted(results.glob("counted-*.json"), reverse=True)
    documents = [json.loads(path.read_text()) for path in files]
    anywhere = dict.fromkeys(name for document in documents for name in _names(document["rows"]))
    for document in documents:
        parts += _chip(document, list(anywhere))
    return "\n".join(parts).rstrip() + "\n"


def _names(rows: list[Row]) -> list[tuple[str, str]]:
    """Op and size of what is ours."""
    return [(row["op"], row["size"]) for row in rows if row["role"] == "ours"]


def _chip(document: Row, anywhere: list[tuple[str, str]]) -> Iterator[str]:
    versions = ", ".join(f"{name} {v}" for name, v in document["versions"].items())
    yield f"## {document['chip']}\n"
    rows = document["rows"]
    commits = Counter((row["commit"], row["date"][:10]) for row in rows)
    of = ", ".join(f"{n} rows of {commit} ({date})" for (commit, date), n in commits.items())
    yield f"Device: none. {versions}; {of}."
    yield "".join(f" {reason}." for reason in document["missing"]) + "\n"
    left: dict[str, list[str]] = {}
    for op, size in anywhere:
        if (op, size) not in _names(rows):
            left.setdefault(op, []).append(size)
    if left:
        told = "; ".join(f"{op}: {', '.join(sizes)}" for op, sizes in left.items())
        yield f"Counted on another chip, and not yet here: {told}.\n"
    yield from _against(rows)
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        yield f"### {op}\n"
        yield HEADER.format(f"per 1000 {mine[0]['unit']}s")
        for size in dict.fromkeys(row["size"] for row in mine):
            for row in sorted(
                (row for row in mine if row["size"] == size), key=lambda row: row["role"] != "ours"
            ):
                yield from _lines(row)
        yield ""


def _against(rows: list[Row]) -> Iterator[str]:
    """Each of our bounds beside the lowest of a peer."""
    yield "### Against the peers\n"
    yield "| op | size | our bound | the lowest of a peer | ours for 1 of it |"
    yield "| --- | --- | --- | --- | --- |"
    for row in rows:
        rivals = [
            r
            for r in rows
            if r["role"] == "peer" and (r["op"], r["size"]) == (row["op"], row["size"])
        ]
        if row["variant"] != "shipped" or not rivals:
            continue
        best = min(rivals, key=lambda r: r["bound"])
        yield (
            f"| {row['op']} | {row['size']} | {row['bound']:.4g} | {best['variant']}: "
            f"{best['bound']:.4g} | {row['bound'] / best['bound']:.2f} |"
        )
    yield ""


def _lines(row: Row) -> Iterator[str]:
    """A line for each launch, and their sum where there are several."""
    if len(row["kernels"]) > 1:
        yield (
            f"| {row['size']}, {row['variant']} | all {len(row['kernels'])} launches "
            f"| **{row['bound']:.4g}** | | | {row['instructions']:.2f} | | | | | | |"
        )
    for kernel in row["kernels"]:
        clocks = sorted(kernel["clocks"].items(), key=lambda item: -item[1])
        second, less = clocks[1]
        bound = f"{kernel['bound']:.4g}"
        bound = bound if len(row["kernels"]) > 1 else f"**{bound}**"
        mark = "" if kernel["sass"] else "*"
        yield (
            f"| {row['size']}, {row['variant']} | {kernel['kernel']} | {bound} | {kernel['limit']} "
            f"| {less:.4g} {second} | {kernel['instructions']:.2f}{mark} "
            f"| {kernel['ptx_instructions']:.2f} | {kernel.get('loop') or ''} "
            f"| {_ratio(kernel['flops_per_useful'])} | {_ratio(kernel['sectors_per_asked'])} "
            f"| {_ratio(kernel.get('moved_per_least'))} | {kernel['conflicts']:.2f} |"
        )


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
