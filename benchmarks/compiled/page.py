"""Make docs/compiled.md from the result files: what was executed without a GPU, and what it showed.

PYTHONPATH=kernels:. python -m benchmarks.compiled.page [--results FOLDER] [--docs FOLDER]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compiled import results
from hrvlm.files import write_text
from ptx_machine import NOT_SEEN
from ptx_machine.global_memory import SAME_GLOBAL_VALUE
from ptx_machine.proxies import CP_ASYNC_NOTE
from ptx_machine.shared_memory import SAME_VALUE
from ptx_machine.wgmma import COPY_NOTE, READ_NOTE

DOCS = Path(__file__).parents[2] / "docs"
NAME = "compiled.md"

ABOUT = """\
# Kernels as compiled, executed on a CPU

Made by `make compiled` (`PYTHONPATH=kernels:. python -m benchmarks.compiled.page`) from the result
files `benchmarks/results/compiled-*.json`; don't edit.

No GPU has run any of this. Triton's NVIDIA backend compiled each kernel for the chip, and the PTX
that came out was executed with numpy, instruction by instruction, on ordinary CPU tensors
(`kernels/ptx_machine`). That sees what Triton's interpreter does not: bfloat16, layouts, vector
widths, software pipelining, tensor-core fragments, TMA, shared memory, barriers. It is not a chip,
and knows nothing of registers or occupancy.

Checked are bounds and alignment of every access, reads of shared memory that nobody wrote, races in
shared and global memory, asynchronous copies and products touched before their wait, the order of
the async proxy, collectives by part of a warp, deadlock. A finding fails a case. Not seen are:

{not_seen}

*Share of the allowed error* is the largest of error / limit over outputs and gradients, over the
whole tensor, every segment and the worst row (the rules of `hrvlm/verification/rules.py`, as in all
tests); above 1 fails. For elementwise rules a share near 1 is half a rounding: as good as it gets.
*Equal bits* stands where a check compares bits and measures no error.
*Instructions* are those executed by all threads of all launches of the case.

One pattern is no finding: where `rope_2d` writes in place, into the tensor that it was given to
read, warps that hold copies of elements of others read what those may have overwritten, and drop
it. The cases *in place, warps in random order* show that no bit depends on it. Of tensors of its
own the same is a finding, as in any other kernel.
""".format(not_seen="\n".join(f"- {what};" for what in NOT_SEEN[:-1]) + f"\n- {NOT_SEEN[-1]}.")
NOTE = """\
**Triton 3.6 puts no `fence.proxy.async` between `cp.async` and wgmma** (fixed upstream in 3.7). The
loops that load by pointers have this pattern on sm_90, where the PTX memory model asks for the
fence: it was seen in {ops}. It is counted as a note, for this pattern only. Attention's forward
order `ahead`, which loads by TMA, is free of it. On Hopper, use Triton 3.7 or newer.
"""
FAULTS = """\
## Faults seeded in the PTX

One instruction of a compiled kernel is changed, at up to three places of each kind spread over the
kernel, and the kernel runs again: something has to notice, or there is a reason why the change does
nothing. `tests/compiled/test_faults.py` holds the reasons and proves a sample again with every
`make test`, all with `make compiled`.

- *barrier dropped*: `bar.sync`; *wait dropped*, *wait a group short*: `cp.async.wait_group`,
  `wgmma.wait_group`, mbarriers; *fence dropped*: `fence.proxy.async`; *half the bytes expected*: of
  an mbarrier
- *mask off by one*: `<` becomes `<=`, `>` becomes `>=`
- *operands exchanged*: two registers of A, or the descriptors of A and B, of a tensor-core product
- *vector shifted*: a load, store or copy of global memory, by its own size; *store dropped*: to
  global or shared memory
- *at every place*: all barriers, waits or fences of the kernel at once. Where dropping one of
  several does nothing, this shows that the check is not blind
"""


NOTES = """\
What the machine saw and does not count as a finding, with the number of cases:

"""
COPIES = "rope_2d in place: a warp reads what another may have overwritten, and drops it"
EXPLAINED = {
    SAME_VALUE: (
        "warps that hold copies of one element store it to one place of shared memory. Whichever "
        "comes last, the same bits are there; different bits are a race"
    ),
    SAME_GLOBAL_VALUE: "likewise in global memory, by warps or programs",
    COPIES: "see above",
    CP_ASYNC_NOTE: "see above",
    COPY_NOTE: (
        "`wgmma.fence` has to lie between a write of registers and the product that reads them. "
        "Triton sets it after the writes, and its compiler then copies some of these values to "
        "other registers, behind the fence. By the letter of the ISA such a copy is a write too; "
        "but the value was there before the fence, and which copies are left is ptxas' choice, "
        "which gives out the real registers. A value *computed* behind the fence is a finding"
    ),
    READ_NOTE: (
        "a product in flight owns the registers of its operand A, and the ISA leaves every access "
        "to them undefined. Reading them changes nothing that the product reads. Writing them "
        "before the wait is a finding, and so is reading the registers of its result"
    ),
}


TESTS = """\
## The kernels' own tests

All of `tests/kernels` but those that only compile, run as compiled for a chip instead of in
Triton's interpreter: unaligned and strided tensors of every op are among them. Skipped is what
needs a GPU or holds for the interpreter's tiles only, each with its reason in the test.

"""


def page(
    cases: Sequence[dict[str, Any]],
    faults: Sequence[dict[str, Any]],
    tests: Sequence[dict[str, Any]] = (),
) -> str:
    """The text of docs/compiled.md, from the documents of all chips."""
    parts = [ABOUT]
    if ops := sorted({op for document in cases for op in _without_fence(document)}):
        parts.append(NOTE.format(ops=", ".join(f"`{op}`" for op in ops)))
    if notes := _notes(cases):
        parts.append(NOTES + _table(("chip", "note", "seen in"), notes) + "\n")
        parts.append(_explained(dict.fromkeys(note for _, note, _ in notes)))
    parts += map(_cases, cases)
    if faults:
        parts += [FAULTS, *map(_faults, faults)]
    if tests:
        columns = ("chip", "passed", "failed", "skipped", "commit", "date")
        rows = [
            (document["chip"], *(document["tests"].get(outcome, 0) for outcome in columns[1:4]),
             document["commit"], document["date"][:10])
            for document in tests
        ]  # fmt: skip
        parts.append(TESTS + _table(columns, rows) + "\n")
    return "\n".join(parts)


def _explained(notes: Iterable[str]) -> str:
    """Why these notes are none of the findings."""
    return "".join(f"- *{note}*: {EXPLAINED[note]}.\n" for note in notes)


def _without_fence(document: dict[str, Any]) -> set[str]:
    """The ops in which the machine noted the pattern."""
    return {row["op"] for row in document["rows"] if CP_ASYNC_NOTE in row["notes"]}


def _notes(documents: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Chip, note, and the ops with the number of their cases."""
    seen: dict[tuple[str, str], Counter[str]] = {}
    for document in documents:
        for row in document["rows"]:
            for note in row["notes"]:
                seen.setdefault((document["chip"], note), Counter())[row["op"]] += 1
    return [
        (chip, note, ", ".join(f"{op} {n}" for op, n in sorted(ops.items())))
        for (chip, note), ops in sorted(seen.items())
    ]


def _provenance(document: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    again: dict[str, Counter[str]] = {}  # rows that were run again, by commit
    for row in document["rows"]:
        if "commit" in row:
            again.setdefault(row["commit"], Counter())[row.get("op") or row["kernel"]] += 1
    later = "".join(
        f"; run at {commit}: " + ", ".join(f"{op} {n}" for op, n in sorted(ops.items()))
        for commit, ops in again.items()
    )
    return f"Device: none. {versions}; commit {document['commit']}{later}, {document['date'][:10]}."


def _cases(document: dict[str, Any]) -> str:
    cases = document["rows"]
    bad = sum(bool(case["findings"] or case["problem"]) for case in cases)
    executed = _millions(sum(case["instructions"] for case in cases))
    rows = [
        (
            case["op"],
            case["dtype"],
            case["configuration"],
            _share(case),
            ", ".join(f"{kind} {n}" for kind, n in case["findings"].items()) or "none",
            _millions(case["instructions"]),
        )
        for case in cases
    ]
    columns = "op", "dtype", "configuration", "share", "findings", "instructions, million"
    return (
        f"## {document['chip']}\n\n{_provenance(document)} {len(cases)} cases, {bad or 'none'} "
        f"with a finding or above a limit; {executed} million instructions executed.\n\n"
        f"{_table(columns, rows)}\n"
    )


def _share(case: dict[str, Any]) -> str:
    if case["problem"]:
        return "failed"
    return "equal bits" if case["at"] == "equal bits" else f"{case['used']:.2f}"


def _faults(document: dict[str, Any]) -> str:
    faults = document["rows"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for fault in faults:
        groups.setdefault((fault["kernel"], fault["fault"]), []).append(fault)
    rows = []
    for (kernel, kind), places in groups.items():
        by = Counter(fault["noticed"] for fault in places if fault["noticed"])
        why = Counter(fault["reason"] for fault in places if not fault["noticed"])
        lists = ("; ".join(f"{text} ({n})" for text, n in c.items()) for c in (by, why))
        rows.append((kernel, kind, len(places), *lists))
    noticed = sum(bool(fault["noticed"]) for fault in faults)
    columns = "kernel", "fault", "places", "noticed by", "without effect, because"
    return (
        f"### Faults on {document['chip']}\n\n{_provenance(document)} {len(faults)} faults, "
        f"{noticed} noticed, {len(faults) - noticed} without effect.\n\n{_table(columns, rows)}\n"
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    documents = [results.read(options.results, kind) for kind in ("case", "fault")]
    write_text(options.docs / NAME, page(*documents, results.read_tests(options.results)))


if __name__ == "__main__":
    main()
