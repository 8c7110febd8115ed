"""Which registers wgmma may have at each instruction: data flow over the blocks of a kernel.

From its issue to its wait a product owns the registers of D and of A (PTX ISA, "wgmma.mma_async":
accessing them before is undefined), and wgmma.fence has to lie between an ordinary write of them
and the product. What *may* happen on some path is found here, once per kernel; :mod:`wgmma` then
looks, while it runs, only at those instructions. Of correct programs these are the waits alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .syntax import Instruction, Kernel, Reg, Vec

_OLDEST = 8  # no wait leaves as many groups pending


@dataclass
class Uses:
    """By index of the instruction, where there is something to do."""

    landing: dict[int, tuple[Reg, ...]] = field(default_factory=dict)  # waits: what they may set
    touched: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    unfenced: dict[int, tuple[str, ...]] = field(default_factory=dict)  # products
    copied: dict[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass
class _State:
    """At one place of the program."""

    d: dict[str, int]  # accumulator in flight -> commits since its youngest product
    a: dict[str, int]  # likewise registers of A
    fresh: dict[str, bool]  # written since the last wgmma.fence -> only copied from an older one

    def copy(self) -> _State:
        return _State(dict(self.d), dict(self.a), dict(self.fresh))

    def merge(self, other: _State) -> bool:
        """Take in what may hold on another path; whether that changed anything."""
        changed = False
        for mine, theirs in ((self.d, other.d), (self.a, other.a)):
            for name, age in theirs.items():
                if mine.get(name, _OLDEST + 1) > age:
                    mine[name] = age
                    changed = True
        for name, copied in other.fresh.items():
            if name not in self.fresh or (self.fresh[name] and not copied):
                self.fresh[name] = copied
                changed = True
        return changed


class _Flow:
    def __init__(
        self,
        kernel: Kernel,
        registers: Callable[[Instruction], tuple[list[Reg], list[Reg]]],
    ) -> None:
        self.kernel = kernel
        self.registers = registers
        self.all: dict[str, Reg] = {}
        self.uses = Uses()

    def block(self, index: int, state: _State, note: bool) -> _State:
        for i in self.kernel.blocks[index].instructions:
            if i.op.startswith("wgmma."):
                self._wgmma(i, state, note)
            else:
                self._ordinary(i, state, note)
        return state

    def _wgmma(self, i: Instruction, state: _State, note: bool) -> None:
        kind = i.parts[1]
        if kind == "mma_async":
            d, a = (
                [r.name for r in o.items if isinstance(r, Reg)] if isinstance(o, Vec) else []
                for o in i.operands[:2]
            )
            self.all |= {
                r.name: r
                for o in i.operands[:2]
                if isinstance(o, Vec)
                for r in o.items
                if isinstance(r, Reg)
            }
            if note:
                late = [name for name in (*a, *d) if name in state.fresh]
                self.uses.unfenced[i.index] = tuple(n for n in late if not state.fresh[n])
                self.uses.copied[i.index] = tuple(n for n in late if state.fresh[n])
                reads = tuple(name for name in a if name in state.d)
                writes = tuple(name for name in d if name in state.a)
                if reads or writes:
                    self.uses.touched[i.index] = (reads, writes)
            state.d |= dict.fromkeys(d, 0)
            state.a |= dict.fromkeys(a, 0)
            for name in d:
                state.fresh.pop(name, None)
        elif kind == "commit_group":
            for ages in (state.d, state.a):
                for name in ages:
                    ages[name] = min(ages[name] + 1, _OLDEST)
        elif kind == "wait_group":
            pending = i.operands[0].value  # type: ignore[union-attr]
            if note:
                self.uses.landing[i.index] = tuple(self.all[name] for name in sorted(state.d))
            for ages in (state.d, state.a):
                for name in [n for n, age in ages.items() if age > pending]:
                    del ages[name]
        elif kind == "fence":
            state.fresh.clear()

    def _ordinary(self, i: Instruction, state: _State, note: bool) -> None:
        reads, writes = self.registers(i)
        if note and (state.d or state.a):
            seen = tuple(r.name for r in reads if r.name in state.d or r.name in state.a)
            set_ = tuple(r.name for r in writes if r.name in state.d or r.name in state.a)
            if seen or set_:
                self.uses.touched[i.index] = (seen, set_)
        source = i.operands[1] if i.parts[0] == "mov" and len(i.operands) == 2 else None
        for r in writes:
            old = isinstance(source, Reg) and state.fresh.get(source.name, True)
            state.fresh[r.name] = bool(old)


def analyse(
    kernel: Kernel,
    successors: Sequence[Sequence[int]],
    registers: Callable[[Instruction], tuple[list[Reg], list[Reg]]],
) -> Uses:
    """What wgmma may have where; `registers` gives those that an instruction reads and writes."""
    flow = _Flow(kernel, registers)
    if not any(i.op.startswith("wgmma.mma_async") for i in kernel.instructions):
        return flow.uses
    states = {0: _State({}, {}, {})}
    todo = [0]
    while todo:
        index = todo.pop()
        after = flow.block(index, states[index].copy(), note=False)
        for following in successors[index]:
            if following not in states:
                states[following] = after.copy()
            elif not states[following].merge(after):
                continue
            todo.append(following)
    for index, state in states.items():
        flow.block(index, state.copy(), note=True)
    return flow.uses
