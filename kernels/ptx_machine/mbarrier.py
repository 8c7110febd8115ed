"""mbarriers: objects of 64 bits in shared memory that count arrivals and bytes.

Source: PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier" (phases,
pending counts, tx-counts, parity). What arrives at an mbarrier in a phase happened before what its
waiters do after the phase: the clocks that arrivals bring wait with the barrier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .clocks import MBARRIER
from .report import ExecutionError
from .shared_memory import SharedMemory

if TYPE_CHECKING:
    from .group import Group
    from .syntax import Instruction

MAX_COUNT = (1 << 20) - 1


class MbarrierError(ExecutionError):
    """An mbarrier used in a way that the ISA leaves undefined."""


@dataclass
class _State:
    """What the machine knows of an mbarrier beside its bits."""

    phases: int  # completed since the kernel began at this place
    carried: np.ndarray | None = None  # clocks of the arrivals so far: seen and fenced
    done: np.ndarray | None = None  # those of phases that are over


class Mbarriers:
    """The mbarriers of the CTAs that run together, by byte position in their shared memory.

    Their bits: phase 1, pending arrivals 20, expected arrivals 20, pending bytes 22 (signed), and
    one that says that this is an mbarrier. They live in memory: a kernel that reuses the bytes
    destroys them, as on the chip.
    """

    def __init__(self, shared: SharedMemory) -> None:
        self.words = shared.bytes.view(np.uint64)
        self.stride = shared.stride
        self.live: dict[int, _State] = {}
        self.phases: dict[int, int] = {}  # of barriers that were there before
        self.changes = 0  # a scheduler can tell whether waiting again makes sense

    def _fail(self, what: str, where: int) -> MbarrierError:
        return MbarrierError(f"mbarrier at {where % self.stride:#x}: {what}")

    def _load(self, where: int) -> tuple[int, int, int, int]:
        word = int(self.words[where >> 3])
        if where not in self.live or not word >> 63:
            raise self._fail("there is none", where)
        bytes_ = word >> 41 & 0x3FFFFF
        return (
            word & 1,
            word >> 1 & MAX_COUNT,
            word >> 21 & MAX_COUNT,
            bytes_ - ((bytes_ & 0x200000) << 1),
        )

    def _store(self, where: int, phase: int, pending: int, expected: int, bytes_: int) -> None:
        if not -MAX_COUNT <= bytes_ <= MAX_COUNT:
            raise self._fail(f"tx-count {bytes_} is out of range", where)
        word = phase | pending << 1 | expected << 21 | (bytes_ & 0x3FFFFF) << 41 | 1 << 63
        self.words[where >> 3] = word
        self.changes += 1

    def _end(self, where: int, phase: int, pending: int, expected: int, bytes_: int) -> None:
        """Store; begin the next phase if nothing is pending."""
        if pending == 0 and bytes_ == 0:
            phase, pending = phase ^ 1, expected
            state = self.live[where]
            state.phases += 1
            if state.carried is not None:
                state.done = state.carried.copy()
        self._store(where, phase, pending, expected, bytes_)

    def init(self, where: int, count: int) -> bool:
        """Make one; returns whether there was one already (undefined in the ISA)."""
        if not 1 <= count <= MAX_COUNT:
            raise self._fail(f"made for {count} arrivals", where)
        old = self.live.get(where)
        before = old.phases if old else self.phases.get(where, 0)
        self.live[where] = _State(before)
        self._store(where, 0, count, count, 0)
        return old is not None

    def inval(self, where: int) -> None:
        """End one: its bytes are ordinary memory again."""
        self._load(where)
        self.phases[where] = self.live.pop(where).phases
        self.words[where >> 3] = 0

    def expect_tx(self, where: int, count: int) -> None:
        """Wait for more bytes in this phase. It completes nothing."""
        phase, pending, expected, bytes_ = self._load(where)
        self._store(where, phase, pending, expected, bytes_ + count)

    def complete_tx(self, where: int, count: int) -> None:
        """Bytes have arrived."""
        phase, pending, expected, bytes_ = self._load(where)
        self._end(where, phase, pending, expected, bytes_ - count)

    def arrive(self, where: int, count: int = 1, clocks: np.ndarray | None = None) -> None:
        """So many arrivals, by a warp with these clocks."""
        phase, pending, expected, bytes_ = self._load(where)
        if not 1 <= count <= pending:
            raise self._fail(
                f"{count} arrive, {pending} are pending in a phase that nobody knows to be over",
                where,
            )
        state = self.live[where]
        if clocks is not None:
            known = state.carried
            state.carried = clocks if known is None else np.maximum(known, clocks)
        self._end(where, phase, pending - count, expected, bytes_)

    def is_over(self, where: int, parity: int) -> bool:
        """Whether the phase of that parity is over; of parity 1 at once on a fresh barrier."""
        return self._load(where)[0] != (parity & 1)

    def pending(self, where: int) -> tuple[int, int, int]:
        """(parity of the current phase, arrivals pending, bytes pending)."""
        phase, pending, _, bytes_ = self._load(where)
        return phase, pending, bytes_

    def phase(self, where: int) -> int:
        """The number of the current phase, from 1; it never repeats at a place."""
        self._load(where)
        return self.live[where].phases + 1


# Called by translated code


def _places(
    g: Group, instruction: Instruction, address: np.ndarray, guard: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(threads of the group that take part, byte position of the mbarrier of each)."""
    lanes = np.arange(g.n) if guard is None else np.flatnonzero(guard)
    where = g.machine.shared.locate(g, instruction, address[lanes], g.base[lanes], 8, 8, lanes)
    return lanes, where


def mbarrier_init(
    g: Group, instruction: Instruction, address: np.ndarray, count: np.ndarray,
    guard: np.ndarray | None,
) -> None:  # fmt: skip
    """mbarrier.init."""
    lanes, where = _places(g, instruction, address, guard)
    if not len(lanes):
        return
    g.machine.shared.note_write(g, instruction, where, g.warp[lanes], 8, None)
    for lane, place in zip(lanes, where, strict=True):
        with g.blamed(instruction, int(lane)):
            if g.machine.mbarriers.init(int(place), int(count[lane])):
                g.report.note("mbarrier.init where an mbarrier is")


def mbarrier_inval(
    g: Group, instruction: Instruction, address: np.ndarray, guard: np.ndarray | None
) -> None:
    """mbarrier.inval."""
    lanes, where = _places(g, instruction, address, guard)
    if len(lanes):
        g.machine.shared.note_write(g, instruction, where, g.warp[lanes], 8, None)
    for lane, place in zip(lanes, where, strict=True):
        with g.blamed(instruction, int(lane)):
            g.machine.mbarriers.inval(int(place))


def mbarrier_arrive(
    g: Group, instruction: Instruction, address: np.ndarray, count: np.ndarray | None,
    tx: np.ndarray | None, arrives: bool, guard: np.ndarray | None,
) -> None:  # fmt: skip
    """mbarrier.arrive, .arrive.expect_tx and .expect_tx."""
    lanes, where = _places(g, instruction, address, guard)
    if not len(lanes):
        return
    clocks, warps, barriers = g.machine.clocks, g.warp[lanes], g.machine.mbarriers
    g.machine.shared.note_read(g, instruction, where, warps, 8)
    for lane, place in zip(lanes, where, strict=True):
        with g.blamed(instruction, int(lane)):
            if tx is not None:
                barriers.expect_tx(int(place), int(tx[lane]))
            if arrives:
                number = 1 if count is None else int(count[lane])
                barriers.arrive(int(place), number, clocks.release(int(g.warp[lane])))
    if arrives:
        clocks.epoch[np.unique(warps)] += 1


def mbarrier_wait(
    g: Group, instruction: Instruction, address: np.ndarray, parity: np.ndarray,
    guard: np.ndarray | None,
) -> np.ndarray:  # fmt: skip
    """mbarrier.try_wait.parity and test_wait.parity: true, or the threads wait in ``g.blocked``.

    Both block until the phase is over, so that a loop around them goes round once.
    """
    lanes, where = _places(g, instruction, address, guard)
    ready = np.zeros(g.n, bool)
    if not len(lanes):
        return ready
    g.machine.shared.note_read(g, instruction, where, g.warp[lanes], 8)
    clocks, barriers = g.machine.clocks, g.machine.mbarriers
    key = where * 2 + (parity[lanes].astype(np.int64) & 1)
    for one in np.unique(key):
        place, mine = int(one) >> 1, lanes[key == one]
        with g.blamed(instruction, int(mine[0])):
            g.machine.bulk.land(place)
            over = barriers.is_over(place, int(one) & 1)
        if not over:
            continue
        ready[mine] = True
        warps = np.unique(g.warp[mine])
        state = barriers.live[place]
        if state.done is not None:
            clocks.acquire(warps, state.done)
        agent = g.machine.proxies.mbarriers.get(place % g.machine.shared.stride)
        if agent is not None:
            assert agent >= MBARRIER
            clocks.seen[warps, agent] = np.maximum(clocks.seen[warps, agent], state.phases)
    waits = np.zeros(g.n, bool)
    waits[lanes] = ~ready[lanes]
    if waits.any():
        g.blocked = waits
        g.waits_for = np.unique(where[~ready[lanes]])
    return ready
