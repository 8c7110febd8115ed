"""Which registers each block of a kernel needs, and which it must keep.

The machine cuts and joins groups of threads at the ends of blocks; only live registers move.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .syntax import Block, Instruction, Kernel, Mem, Operand, Pair, Reg, Sym, Vec

# The first operand of these is not what they write: they write no register.
_NO_DESTINATION = {
    "st", "bra", "brx", "ret", "exit", "bar", "barrier", "cp", "red", "fence", "membar", "trap",
    "prefetch", "griddepcontrol", "nanosleep", "wgmma", "setmaxnreg", "stmatrix", "tensormap",
}  # fmt: skip


def reads_and_writes(i: Instruction) -> tuple[list[Reg], list[Reg]]:
    """Registers that an instruction reads and writes; a guarded write keeps old values: a read."""
    operands = list(i.operands)
    writes: list[Reg] = []
    no_result = i.base in _NO_DESTINATION or (i.base == "mbarrier" and not _mbarrier_result(i))
    if not no_result and operands:
        writes = list(_registers(operands.pop(0)))
    reads = [r for o in operands for r in _registers(o)]
    if i.guard is not None:
        reads.append(i.guard)
        if i.base != "bra":
            reads += writes
    return reads, writes


def _mbarrier_result(i: Instruction) -> bool:
    waits = "try_wait" in i.op or "test_wait" in i.op
    return waits or ("arrive" in i.op and not isinstance(i.operands[0], (Mem, Sym)))


def _registers(operand: Operand) -> Iterator[Reg]:
    if isinstance(operand, Reg):
        yield operand
    inner: tuple[Operand, ...] = ()
    if isinstance(operand, Mem):
        inner = (operand.base, *operand.coords)
    elif isinstance(operand, Vec):
        inner = operand.items
    elif isinstance(operand, Pair):
        inner = (operand.first, operand.second)
    for part in inner:
        yield from _registers(part)


def successors(kernel: Kernel, index: int) -> list[int]:
    """Blocks that may follow a block: where it jumps to comes first."""
    block = kernel.blocks[index]
    following = [index + 1] if index + 1 < len(kernel.blocks) else []
    if not block.instructions:
        return following
    last = block.instructions[-1]
    if last.base == "bra":
        target = kernel.label_block(_label(last.operands[0]))
        return [target] if last.guard is None else [target, *following]
    if last.base in ("ret", "exit", "trap"):
        return [] if last.guard is None else following
    if last.base == "brx":
        return [kernel.label_block(label) for label in kernel.tables[_label(last.operands[1])]]
    return following


def _label(operand: Operand) -> str:
    if not isinstance(operand, Sym):
        raise TypeError(f"{operand} is no label")
    return operand.name


Registers = dict[str, Reg]  # by name


@dataclass(frozen=True)
class Liveness:
    """By block: registers that are live where it begins, and where it ends."""

    into: list[Registers]
    out: list[Registers]


def liveness(
    kernel: Kernel, follow: list[list[int]], landing: dict[int, tuple[Reg, ...]]
) -> Liveness:
    """The usual backward iteration to a fixed point; `follow` are the successors.

    `landing`: by index of an instruction, registers that it sets for some of the threads perhaps.
    """
    count = len(kernel.blocks)
    used, defined = zip(*(_uses(block, landing) for block in kernel.blocks), strict=True)
    into: list[Registers] = [dict(u) for u in used]
    out: list[Registers] = [{} for _ in range(count)]
    changed = True
    while changed:
        changed = False
        for b in reversed(range(count)):
            after = {n: r for s in follow[b] for n, r in into[s].items()}
            before = used[b] | {n: r for n, r in after.items() if n not in defined[b]}
            if len(after) != len(out[b]) or len(before) != len(into[b]):
                out[b], into[b] = after, before
                changed = True
    return Liveness(into, out)


def _uses(block: Block, landing: dict[int, tuple[Reg, ...]]) -> tuple[Registers, Registers]:
    """Registers that a block reads before it writes them, and those that it writes."""
    used: Registers = {}
    defined: Registers = {}
    for i in block.instructions:
        reads, writes = reads_and_writes(i)
        late = landing.get(i.index, ())
        used |= {r.name: r for r in (*reads, *late) if r.name not in defined}
        defined |= {r.name: r for r in (*writes, *late)}
    return used, defined
