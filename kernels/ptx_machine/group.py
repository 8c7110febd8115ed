"""Threads that stand at the same place of the program: what translated code calls `g`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from .clocks import WARP
from .copies import Copies
from .loops import Place
from .report import ExecutionError, MemcheckError
from .syntax import UnknownInstructionError
from .values import UNSIGNED
from .wgmma import InFlight

if TYPE_CHECKING:
    from .machine import Machine
    from .syntax import Instruction


class Group:
    """Threads `lanes` (numbered over all slots, ascending) at a block.

    An instruction is one numpy operation over the group. Registers are held where they are live.
    """

    def __init__(self, machine: Machine, lanes: np.ndarray, block: int, place: Place) -> None:
        self.machine, self.kernel, self.report = machine, machine.kernel, machine.report
        self.block, self.place = block, place
        self.regs: dict[str, np.ndarray] = {}
        self.copies = Copies()
        self.barrier = (0, 0)  # where it waits: number, threads (0 for all)
        self.blocked: np.ndarray | None = None  # threads that an mbarrier keeps
        self.waits_for: np.ndarray | None = None  # byte positions of those mbarriers
        self.in_flight = InFlight()  # products of wgmma
        self.lanes = lanes
        self.n = len(lanes)
        self.warp = lanes // WARP  # over all slots
        self.slot = lanes // machine.threads
        self.thread = lanes % machine.threads
        self.cta = machine.order[machine.first + self.slot]
        self.base = self.slot.astype(np.int64) * machine.shared.stride
        self._whole: bool | None = None
        self._special: dict[str, np.ndarray] = {}

    def go(self, block: int) -> None:
        """The threads come to another block, or to the same one again."""
        self.block = block
        self.place = self.machine.program.order.moved(self.place, block)

    def who(self, lane: int) -> str:
        """Where a thread of the group is, for people."""
        x, y, _ = self.machine.grid
        c, thread = int(self.cta[lane]), int(self.thread[lane])
        return (
            f"program ({c % x}, {c // x % y}, {c // (x * y)}), warp {thread // WARP}, "
            f"lane {thread % WARP}"
        )

    @contextmanager
    def blamed(self, instruction: Instruction, lane: int) -> Iterator[None]:
        """Errors raised inside say of which instruction and thread of the group they are."""
        try:
            yield
        except (ExecutionError, MemcheckError, NotImplementedError, ValueError) as error:
            kind = ExecutionError if isinstance(error, ValueError) else type(error)
            text = f"{self.kernel.name}: {instruction}: {error}; {self.who(lane)}"
            raise kind(text) from None

    # Called by translated code

    def full(self, value: Any) -> np.ndarray:
        """A number for every thread."""
        return np.full(self.n, value)

    def param(self, index: int, offset: int, kind: type) -> np.ndarray:
        """A parameter of the kernel, from byte `offset` of it on."""
        raw = self.machine.params[index][offset : offset + np.dtype(kind).itemsize]
        return np.full(self.n, np.frombuffer(raw, kind)[0])

    def param_at(
        self,
        addresses: np.ndarray,
        kind: type,
        instruction: Instruction,
        guard: np.ndarray | None,
    ) -> np.ndarray:
        """Parameters of the kernel by their addresses, of the threads that take part."""
        values: np.ndarray = np.zeros(self.n, kind)
        taking = np.arange(self.n) if guard is None else np.flatnonzero(guard)
        for address in np.unique(addresses[taking]):
            raw = self.machine.parameter(int(address), np.dtype(kind).itemsize)
            if raw is None:
                lane = int(taking[addresses[taking] == address][0])
                raise ExecutionError(
                    f"{self.kernel.name}: {instruction}: {self.who(lane)}: no parameter is at "
                    f"{address:#x}"
                )
            values[addresses == address] = np.frombuffer(raw, kind)[0]
        return values

    def special(self, name: str) -> np.ndarray:
        """A special register."""
        found = self._special.get(name)
        if found is None:
            values = SPECIAL[name](self) + 0 * self.thread
            found = self._special[name] = values.astype(np.uint32)
        return found

    def active(self, guard: np.ndarray | None) -> np.ndarray | None:
        """Positions in the group of the threads that take part; None for all."""
        if guard is None or guard.all():
            return None
        return np.flatnonzero(guard)

    def whole_warps(self, instruction: Instruction) -> None:
        """Raise unless every warp of the group is complete: what a collective needs."""
        if self._whole is None:
            full = self.n % WARP == 0 and (self.lanes[::WARP] % WARP == 0).all()
            self._whole = bool(full and (self.warp[::WARP] == self.warp[WARP - 1 :: WARP]).all())
        if not self._whole:
            warps, counts = np.unique(self.warp, return_counts=True)
            part = warps[counts < WARP][0]
            lane = int(np.flatnonzero(self.warp == part)[0])
            raise ExecutionError(
                f"{self.kernel.name}: {instruction}: {counts[counts < WARP][0]} threads of a warp "
                f"are here, the others are elsewhere; the first: {self.who(lane)}"
            )

    def all_members(self, instruction: Instruction, members: np.ndarray) -> None:
        """Raise unless a collective names all threads of its warps, in a register."""
        some = np.flatnonzero(members.view(np.uint32) != 0xFFFF_FFFF)
        if len(some):
            raise UnknownInstructionError(
                f"{self.kernel.name}: by part of a warp: {instruction}; {self.who(int(some[0]))}"
            )

    def trap(self, instruction: Instruction, guard: np.ndarray | None) -> None:
        """The program gives up."""
        lanes = np.arange(self.n) if guard is None else np.flatnonzero(guard)
        if len(lanes):
            raise ExecutionError(f"{self.kernel.name}: {instruction}: {self.who(int(lanes[0]))}")

    # Counting

    def count_global(
        self,
        instruction: Instruction,
        address: np.ndarray,
        lanes: np.ndarray | None,
        width: int,
        store: bool = False,
    ) -> None:
        """Count accesses of `width` bytes by the threads at `lanes`, all if None."""
        counts = self.machine.counts
        if counts is not None:
            warp = self.warp if lanes is None else self.warp[lanes]
            counts.global_access(instruction, warp, address, width, store)

    def count_shared(
        self, instruction: Instruction, where: np.ndarray, lanes: np.ndarray | None, width: int
    ) -> None:
        """The same in shared memory; `where` are byte positions over all programs."""
        counts = self.machine.counts
        if counts is not None:
            thread = self.lanes if lanes is None else self.lanes[lanes]
            counts.shared_access(instruction, thread, where, width)

    # Cutting and joining

    def part(self, keep: np.ndarray, block: int | None = None) -> Group:
        """The threads where `keep` holds, as a group of their own that goes to `block` or stays."""
        other = Group(self.machine, self.lanes[keep], self.block, self.place)
        if block is not None:
            other.go(block)
        live = self.machine.program.live.into[other.block]
        other.regs = {name: self.regs[name][keep] for name in live}
        other.copies = self.copies.of(other.lanes)
        if self.in_flight:
            other.in_flight = self.in_flight.part(keep, self)
        return other

    def join(self, other: Group) -> Group:
        """Both groups, which are at the same place, as one."""
        lanes = np.concatenate((self.lanes, other.lanes))
        order = np.argsort(lanes, kind="stable")
        joined = Group(self.machine, lanes[order], self.block, self.place)
        for name, reg in self.machine.program.live.into[self.block].items():
            a, b = self.regs[name], other.regs[name]
            if reg.bits != 1:
                kind = UNSIGNED[reg.bits // 8]
                a, b = a.view(kind), b.view(kind)
            joined.regs[name] = np.concatenate((a, b))[order]
        joined.copies = self.copies.join(other.copies)
        if self.in_flight or other.in_flight:
            joined.in_flight = self.in_flight.join(other.in_flight, (self.n, other.n), order)
        return joined


SPECIAL = {
    "%tid.x": lambda g: g.thread,
    "%tid.y": lambda g: 0,
    "%tid.z": lambda g: 0,
    "%ntid.x": lambda g: g.machine.threads,
    "%ntid.y": lambda g: 1,
    "%ntid.z": lambda g: 1,
    "%laneid": lambda g: g.thread % WARP,
    "%warpid": lambda g: g.thread // WARP,
    "%ctaid.x": lambda g: g.cta % g.machine.grid[0],
    "%ctaid.y": lambda g: g.cta // g.machine.grid[0] % g.machine.grid[1],
    "%ctaid.z": lambda g: g.cta // (g.machine.grid[0] * g.machine.grid[1]),
    "%nctaid.x": lambda g: g.machine.grid[0],
    "%nctaid.y": lambda g: g.machine.grid[1],
    "%nctaid.z": lambda g: g.machine.grid[2],
}
