"""The machine code of a kernel: its loops, and an estimate of what it executes.

PTX says how often each block runs, SASS how many instructions it has. The products of a kernel are
the same in both, in the same order, and tell which blocks belong together; where ptxas unrolled a
loop, or there are no products, loops are matched, by products, loads and stores of global memory,
or exponentials. Where that fails, PTX alone is left.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import triton
from triton.runtime.cache import get_cache_manager

from ptx_machine.counters import LaunchCounts
from ptx_machine.liveness import successors
from ptx_machine.syntax import Kernel

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_FAMILIES = {  # the first that fits
    "tensor": ("HGMMA", "HMMA"),
    "mufu": ("MUFU",),
    "convert": ("F2F", "F2I", "I2F", "FRND"),
    "shuffle": ("SHFL", "REDUX", "VOTE"),
    "fma": ("FFMA", "FMUL", "FADD", "IMAD", "HFMA", "HADD", "HMUL"),
    "alu": ("IADD", "LOP", "SHF", "LEA", "ISETP", "FSETP", "SEL", "FSEL", "FMNMX", "PRMT", "PLOP",
            "IMNMX", "SGXT", "BMSK", "VIADD", "VIMNMX", "IABS", "SHL", "SHR"),
    "uniform": ("U", "R2UR", "S2UR", "CS2R"),
    "async": ("LDGSTS", "LDGDEPBAR", "DEPBAR"),
    "shared": ("LDS", "STS"),
    "global": ("LDG", "STG", "RED", "ATOM"),
    "local": ("LDL", "STL"),
}  # fmt: skip
_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_LABEL = re.compile(r"^\s*\.?(L_x_\d+):")
_TARGET = re.compile(r"`\(\.(L_x_\d+)\)")
# What ptxas keeps one for one: (in PTX, in SASS), best first.
_ANCHORS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("wgmma.mma_async", "mma.sync"), ("HGMMA", "HMMA")),
    (("ld.global", "st.global", "cp.async.c"), ("LDG.", "STG.", "LDGSTS")),
    (("ex2.approx",), ("MUFU.EX2",)),
)


@dataclass(frozen=True)
class Code:
    """Straight pieces, and where each may go next."""

    blocks: Sequence[Sequence[str]]  # opcodes
    successors: Sequence[Sequence[int]]

    def loops(self) -> list[frozenset[int]]:
        """Natural loops, as sets of blocks, in the order of their headers."""
        dominators = _dominators(self.successors)
        bodies: dict[int, set[int]] = {}
        for end, targets in enumerate(self.successors):
            for head in targets:
                if head in dominators[end]:
                    bodies.setdefault(head, {head}).update(_reaching(self.successors, end, head))
        return [frozenset(bodies[head]) for head in sorted(bodies)]

    def innermost(self) -> list[int | None]:
        """The header of the smallest loop that each block is in."""
        found: list[int | None] = [None] * len(self.blocks)
        for loop in sorted(self.loops(), key=len, reverse=True):
            for block in loop:
                found[block] = min(loop)
        return found

    def in_loops(self, prefixes: tuple[str, ...], runs: Sequence[int]) -> dict[int, int]:
        """How often each loop, by its header, runs instructions that begin so; those that do."""
        found: Counter[int] = Counter()
        for ops, loop, times in zip(self.blocks, self.innermost(), runs, strict=True):
            if loop is not None:
                found[loop] += times * sum(op.startswith(prefixes) for op in ops)
        return {loop: count for loop, count in found.items() if count}


def _dominators(successors: Sequence[Sequence[int]]) -> list[set[int]]:
    every = set(range(len(successors)))
    found = [{0}] + [set(every) for _ in successors[1:]]
    before: list[list[int]] = [[] for _ in successors]
    for block, targets in enumerate(successors):
        for target in targets:
            before[target].append(block)
    changed = True
    while changed:
        changed = False
        for block in range(1, len(successors)):
            common = (
                set.intersection(*(found[b] for b in before[block])) if before[block] else set()
            )
            new = common | {block}
            if new != found[block]:
                found[block], changed = new, True
    return found


def _reaching(successors: Sequence[Sequence[int]], end: int, head: int) -> set[int]:
    """Blocks from which `end` is reached without `head`."""
    before: dict[int, list[int]] = {}
    for block, targets in enumerate(successors):
        for target in targets:
            before.setdefault(target, []).append(block)
    found, todo = {end}, [end]
    while todo:
        block = todo.pop()
        if block == head:
            continue
        for earlier in before.get(block, []):
            if earlier not in found and earlier != head:
                found.add(earlier)
                todo.append(earlier)
    return found


def family(op: str) -> str:
    """The unit that a SASS instruction needs, or "other"."""
    if op.startswith("F2FP"):
        return "convert"
    for name, prefixes in _FAMILIES.items():
        if op.startswith(prefixes):
            return name
    return "other"


@lru_cache(maxsize=64)
def code_of(hash_: str, name: str) -> Code:
    """The machine code that Triton's cache has of a kernel."""
    group = get_cache_manager(hash_).get_group(f"{name[:150]}.json") or {}
    command = [_TOOLS / "nvdisasm", "-c", group[f"{name[:150]}.cubin"]]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _parse(text)


def _parse(text: str) -> Code:
    blocks: list[list[str]] = [[]]
    jumps: list[tuple[str | None, bool]] = [(None, True)]  # label, and whether it falls through
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1]:
                blocks.append([]), jumps.append((None, True))
            labels[label.group(1)] = len(blocks) - 1
        found = _LINE.match(line)
        if not found or found.group(2) == "NOP":
            continue
        guard, op, rest = found.groups()
        blocks[-1].append(op)
        if op.split(".")[0] in ("BRA", "EXIT", "RET"):
            target = _TARGET.search(rest)
            conditional = bool(guard) or bool(re.match(r"!?U?P\d", rest))
            jumps[-1] = (target.group(1) if target else None, conditional)
            blocks.append([]), jumps.append((None, True))
    successors = []
    for number, (label, falls) in enumerate(jumps):
        targets = [labels[label]] if label in labels else []
        if falls and number + 1 < len(blocks):
            targets.append(number + 1)
        successors.append(targets)
    return Code(blocks, successors)


def of_ptx(kernel: Kernel) -> Code:
    """The same of PTX, block by block."""
    blocks = [[i.op for i in block.instructions] for block in kernel.blocks]
    return Code(blocks, [successors(kernel, block.index) for block in kernel.blocks])


def executed(counts: LaunchCounts, code: Code) -> Counter[str] | None:
    """Warp instructions by SASS family; None where the blocks of both codes can't be matched."""
    ptx, runs = of_ptx(counts.kernel), counts.runs
    if any(op.startswith("setmaxnreg") for block in ptx.blocks for op in block):
        return None  # warps have code of their own
    times = _one_by_one(ptx, code, runs) or _by_loops(ptx, code, runs)
    if times is None:
        return None
    found: Counter[str] = Counter()
    for ops, count in zip(code.blocks, times, strict=True):
        for op in ops:
            found[family(op)] += count
    return found


def _one_by_one(ptx: Code, code: Code, runs: Sequence[int]) -> list[float] | None:
    """How many warps run each block of `code`, where its products are those of PTX one for one."""
    in_ptx, in_sass = _ANCHORS[0]
    wanted = [
        times for ops, times in zip(ptx.blocks, runs, strict=True)
        for op in ops if op.startswith(in_ptx)
    ]  # fmt: skip
    counts = [sum(op.startswith(in_sass) for op in ops) for ops in code.blocks]
    if not wanted or len(wanted) != sum(counts):
        return None
    times: list[float | None] = [None] * len(counts)
    for block, count in enumerate(counts):
        mine, wanted = wanted[:count], wanted[count:]
        if len(set(mine)) > 1:
            return None
        if mine:
            times[block] = float(mine[0])
    return _spread(code, times, float(runs[0]))


def _spread(code: Code, times: list[float | None], warps: float) -> list[float]:
    """Give blocks in a row the count of one of them, those in a loop the loop's, others `warps`."""
    before: list[list[int]] = [[] for _ in code.blocks]
    for block, targets in enumerate(code.successors):
        for target in targets:
            before[target].append(block)
    pairs = [
        (block, targets[0]) for block, targets in enumerate(code.successors)
        if len(targets) == 1 and len(before[targets[0]]) == 1
    ]  # fmt: skip
    changed = True
    while changed:
        changed = False
        for pair in pairs:
            for a, b in (pair, pair[::-1]):
                if times[a] is not None and times[b] is None:
                    times[b], changed = times[a], True
    loops, of_loop = code.innermost(), {}
    for loop, count in zip(loops, times, strict=True):
        if loop is not None and count is not None:
            of_loop[loop] = max(count, of_loop.get(loop, 0.0))
    return [
        count if count is not None else warps if loop is None else of_loop.get(loop, 0.0)
        for loop, count in zip(loops, times, strict=True)
    ]


def _by_loops(ptx: Code, code: Code, runs: Sequence[int]) -> list[float] | None:
    """How many warps run each block, where both have the same loops, unrolled or not."""
    loops = code.innermost()
    turns: dict[int, float] | None = None
    if not any(loop is not None for loop in ptx.innermost()):
        turns = {}
    for in_ptx, in_sass in _ANCHORS:
        wanted = ptx.in_loops(in_ptx, runs)
        static = code.in_loops(in_sass, [1] * len(code.blocks))
        if turns is None and wanted and len(wanted) == len(static):
            pairs = zip(sorted(wanted), sorted(static), strict=True)
            turns = {s: wanted[p] / static[s] for p, s in pairs}
    if turns is None:
        return None
    return [float(runs[0]) if loop is None else turns.get(loop, 0.0) for loop in loops]


def main_loop(code: Code) -> Counter[str]:
    """Instructions by family of the largest loop with products, else with loads or exponentials."""
    for _, anchors in _ANCHORS:
        found = code.in_loops(anchors, [1] * len(code.blocks))
        if found:
            head = max(found, key=found.__getitem__)
            inside = (
                ops for ops, loop in zip(code.blocks, code.innermost(), strict=True) if loop == head
            )
            return Counter(family(op) for ops in inside for op in ops)
    return Counter()
