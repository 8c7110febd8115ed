"""Which threads run next: divergence, barriers, mbarriers, deadlock.

Where threads part, their group is cut in two; groups that meet at a block, in the same turn of its
loops, are joined again. The group that is furthest behind runs first, so that it catches up; now
and then it is the one that waits longest, as other warps may spin until it has done something. With
``shuffle_warps`` each warp is a group of its own, and a random one runs up to its next jump or
wait.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np

from .clocks import WARP
from .group import Group
from .report import ExecutionError
from .syntax import Imm, Instruction

if TYPE_CHECKING:
    from .machine import Machine


_PATIENCE = 16  # every so many steps the longest wait counts

# Barriers that threads of a warp may come to one by one.
NOT_ALIGNED = ("barrier.sync", "barrier.cta.sync")


class Scheduler:
    """Runs the CTAs of the machine's slots to their ends."""

    def __init__(self, machine: Machine, rng: random.Random) -> None:
        self.machine, self.kernel = machine, machine.kernel
        self.shuffle, self.rng = machine.options.shuffle_warps, rng
        self.alive = machine.alive
        self.ready: list[Group] = []
        self.waiting: list[Group] = []  # at a barrier, which lies at the end of the block before
        self.stalled: list[tuple[Group, int]] = []  # behind an mbarrier; state when they tried
        self.steps = 0

    def run(self, group: Group) -> None:
        """Run all threads, which start in one group."""
        self._add(group)
        while self.ready or self.waiting or self.stalled:
            if not self.ready:
                self._wake()
            self._step(self._next())

    def _wake(self) -> None:
        """Let those try again whose mbarriers may have changed."""
        stalled, self.stalled = self.stalled, []
        for group, changes in stalled:
            if self.machine.mbarriers.changes != changes:
                self._add(group)
            else:
                self.stalled.append((group, changes))
        if not self.ready:
            raise self._deadlock()

    def _add(self, group: Group) -> None:
        """Make a group ready, joined with those that it may run with."""
        if self.shuffle and group.warp[0] != group.warp[-1]:
            for warp in np.unique(group.warp):
                self._add(group.part(group.warp == warp))
            return
        for k, other in enumerate(self.ready):
            together = not self.shuffle or other.warp[0] == group.warp[0]
            if other.place == group.place and together:
                self.ready[k] = other.join(group)
                return
        self.ready.append(group)

    def _next(self) -> Group:
        chosen = range(len(self.ready))
        self.steps += 1
        if self.shuffle:
            warp = self.ready[self.rng.randrange(len(self.ready))].warp[0]
            mine = [i for i in chosen if self.ready[i].warp[0] == warp]
            return self.ready.pop(min(mine, key=lambda i: self.ready[i].place))
        if self.steps % _PATIENCE == 0:
            return self.ready.pop(next(filter(self._is_first, chosen)))
        return self.ready.pop(min(chosen, key=lambda i: self.ready[i].place))

    def _is_first(self, i: int) -> bool:
        """Whether no other threads of the group's warps are further behind: those come first."""
        group = self.ready[i]
        behind = (g for g in self.ready if g.place < group.place)
        return not any(np.isin(g.warp, group.warp).any() for g in behind)

    def _step(self, group: Group) -> None:
        """Run one block and see where its threads go."""
        number, before = group.block, group.regs
        block = self.kernel.blocks[number]
        self.machine.count(len(block.instructions) * group.n)
        taken = self.machine.program.functions[number](group)
        if group.blocked is not None:
            self._stall(group, before)
            return
        self._count(number, group)
        last = block.instructions[-1] if block.instructions else None
        if last is None:
            self._goto(group, number + 1)
        elif last.base in ("bra", "ret", "exit"):
            self._leave(group, last, taken)
        elif last.base == "brx":
            for index in np.unique(taken):
                target = self.machine.program.successors[number][int(index)]
                self._add(group.part(taken == index, target))
        elif last.base in ("bar", "barrier") and "warp" not in last.parts:
            self._barrier(group, last)
        else:
            self._goto(group, number + 1)

    def _count(self, number: int, group: Group) -> None:
        if self.machine.counts is not None:
            self.machine.counts.block(number, group.warp)

    def _stall(self, group: Group, before: dict[str, np.ndarray]) -> None:
        """Keep the threads whose mbarrier is not ready; the others, if any, go on."""
        blocked, group.blocked = group.blocked, None
        assert blocked is not None
        after, group.regs = group.regs, before
        stalled = group.part(blocked)
        stalled.waits_for = group.waits_for
        self.stalled.append((stalled, self.machine.mbarriers.changes))
        if not blocked.all():
            group.regs = after
            rest = group.part(~blocked, group.block + 1)
            self._count(group.block, rest)
            self._add(rest)

    def _leave(self, group: Group, last: Instruction, taken: np.ndarray | None) -> None:
        """A jump, or the end of threads; `taken` are those who do, all if None."""
        number = group.block
        if taken is None or last.guard is None:
            taken = np.ones(group.n, bool)
        if last.base == "bra":
            target = self.machine.program.successors[number][0]
            if taken.all():
                self._goto(group, target)
            elif not taken.any():
                self._goto(group, number + 1)
            else:
                self._add(group.part(taken, target))
                self._add(group.part(~taken, number + 1))
            return
        self.machine.bulk.end(group, taken)
        self.alive -= np.bincount(group.warp[taken], minlength=len(self.alive))
        if not taken.all():
            self._add(group.part(~taken, number + 1))
        self._release()

    def _goto(self, group: Group, block: int) -> None:
        group.go(block)
        self._add(group)

    # Barriers

    def _barrier(self, group: Group, last: Instruction) -> None:
        """``bar.sync id`` waits for all of the CTA, ``bar.sync id, count`` for so many threads."""
        numbers = [o.value for o in last.operands if isinstance(o, Imm)]
        group.go(group.block + 1)
        group.barrier = (numbers[0], numbers[1] if len(numbers) == 2 else 0)
        self.waiting.append(group)
        self._release()

    def _release(self) -> None:
        """Let those threads go on whose barrier is complete."""
        for number in {g.barrier[0] for g in self.waiting}:
            here = [g for g in self.waiting if g.barrier[0] == number]
            arrived, needed = self._counts(here, number)
            free = (arrived == needed) & (arrived > 0)
            if free.any():
                self._meet(here, free)

    def _counts(self, here: list[Group], number: int) -> tuple[np.ndarray, np.ndarray]:
        """By slot: threads at a barrier, and how many it waits for."""
        if len({g.barrier[1] for g in here}) > 1:
            raise self._error(here[-1], f"barrier {number} with two counts")
        count = here[0].barrier[1]
        slots = self.machine.slots
        arrived = sum((np.bincount(g.slot, minlength=slots) for g in here), np.zeros(slots, int))
        alive = self.alive.reshape(slots, -1).sum(axis=1)
        needed = np.full_like(alive, count) if count else alive
        if (arrived > needed).any():
            raise self._error(here[-1], f"too many threads at barrier {number}")
        return arrived, needed

    def _meet(self, groups: list[Group], free: np.ndarray) -> None:
        self._check_aligned(groups, free)
        machine = self.machine
        warps = np.unique(np.concatenate([g.warp[free[g.slot]] for g in groups]))
        per_cta = machine.threads // WARP
        if len(warps) == per_cta * int(free.sum()):
            machine.clocks.full_barrier(np.flatnonzero(free))
        else:
            machine.clocks.barrier(warps, warps // per_cta)
        for group in groups:
            self.waiting.remove(group)
            go = free[group.slot]
            if go.all():
                self._add(group)
                continue
            rest = group
            if go.any():
                self._add(group.part(go))
                rest = group.part(~go)
                rest.barrier = group.barrier
            self.waiting.append(rest)

    def _check_aligned(self, groups: list[Group], free: np.ndarray) -> None:
        """All threads of a warp have to come to the same bar.sync (PTX ISA: .aligned)."""
        aligned = [g for g in groups if self._waits_at(g).op not in NOT_ALIGNED]
        for block in {g.block for g in aligned}:
            here = [g for g in aligned if g.block == block]
            counts = sum(
                (np.bincount(g.warp[free[g.slot]], minlength=len(self.alive)) for g in here),
                np.zeros_like(self.alive),
            )
            part = (counts > 0) & (counts < self.alive)
            if part.any():
                warp = int(np.flatnonzero(part)[0])
                group = next(g for g in here if warp in g.warp)
                raise self._error(
                    group,
                    f"{counts[warp]} threads of a warp are here, the others elsewhere",
                    int(np.flatnonzero(group.warp == warp)[0]),
                )

    def _error(self, group: Group, what: str, lane: int = 0) -> ExecutionError:
        """About a group at a barrier."""
        at = f"{self.kernel.name}: {self._waits_at(group)}"
        return ExecutionError(f"{at}: {what}; {group.who(lane)}")

    def _waits_at(self, group: Group) -> Instruction:
        return self.kernel.blocks[group.block - 1].instructions[-1]

    def _deadlock(self) -> ExecutionError:
        places = []
        for group in self.waiting:
            slot = group.slot[0]
            arrived, needed = self._counts(
                [g for g in self.waiting if g.barrier[0] == group.barrier[0]], group.barrier[0]
            )
            places.append(
                f"{arrived[slot]} of {needed[slot]} threads at {self._waits_at(group)}; "
                f"{group.who(0)}"
            )
        for group, _ in self.stalled:
            instruction = self.kernel.blocks[group.block].instructions[0]
            places.append(f"{group.n} threads at {instruction}; {group.who(0)}")
            places += map(
                self._mbarrier, set(() if group.waits_for is None else group.waits_for.tolist())
            )
        return ExecutionError(f"{self.kernel.name}: deadlock: {' | '.join(places)}")

    def _mbarrier(self, where: int) -> str:
        parity, arrivals, count = self.machine.mbarriers.pending(where)
        return (
            f"the mbarrier at {where % self.machine.shared.stride:#x} is in a phase of parity "
            f"{parity}, {arrivals} arrivals and {count} bytes pending"
        )
