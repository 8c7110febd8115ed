"""cp.async: copies from global to shared memory that land when they are waited for.

Data are read at the issue; until the wait of their group the bytes are in flight, and any access to
them is reported. What landed counts as written by the warp that waited: another warp that reads it
without a barrier is a race. PTX ISA 9.7.9.25.3. Translated code calls the functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .clocks import WARP
from .report import ExecutionError

if TYPE_CHECKING:
    from .group import Group
    from .syntax import Instruction


@dataclass
class Copy:
    """An issued copy: data read, not yet visible."""

    lanes: np.ndarray  # thread numbers over all slots
    where: np.ndarray  # byte positions in shared memory
    data: np.ndarray  # [n, bytes] uint8
    instruction: Instruction

    def of(self, lanes: np.ndarray) -> list[Copy]:
        """What of it these threads issued: one copy or none."""
        keep = np.isin(self.lanes, lanes)
        if not keep.any():
            return []
        return [Copy(self.lanes[keep], self.where[keep], self.data[keep], self.instruction)]


class Copies:
    """The copies of a group of threads."""

    def __init__(self) -> None:
        self.open: list[Copy] = []  # issued, in no group yet
        self.groups: list[list[Copy]] = []  # committed, oldest first

    def of(self, lanes: np.ndarray) -> Copies:
        """Those of these threads."""
        part = Copies()
        part.open = [c for copy in self.open for c in copy.of(lanes)]
        part.groups = [[c for copy in group for c in copy.of(lanes)] for group in self.groups]
        return part

    def join(self, other: Copies) -> Copies:
        """Both; waits count groups from the newest one."""
        joined = Copies()
        joined.open = self.open + other.open
        for k in range(max(len(self.groups), len(other.groups)), 0, -1):
            parts = [c.groups[-k] if k <= len(c.groups) else [] for c in (self, other)]
            joined.groups.append(parts[0] + parts[1])
        return joined


def copy_async(
    g: Group,
    instruction: Instruction,
    target: np.ndarray,
    source: np.ndarray,
    size: int,
    read: np.ndarray | None,
    guard: np.ndarray | None,
) -> None:
    """Copy `size` bytes; of those, `read` come from global memory and the rest are zero."""
    lanes = g.active(guard)
    chosen = np.arange(g.n) if lanes is None else lanes
    if not len(chosen):
        return
    shared = g.machine.shared
    warp = g.warp[chosen]
    where = shared.locate(g, instruction, target[chosen], g.base[chosen], size, size, chosen)
    data = np.zeros((len(chosen), size), np.uint8)
    wanted = np.full(len(chosen), size) if read is None else read[chosen].astype(np.int64)
    if (wanted > size).any():
        lane = int(chosen[wanted > size][0])
        raise ExecutionError(
            f"{g.kernel.name}: {instruction}: reads more bytes than it copies; {g.who(lane)}"
        )
    g.count_shared(instruction, where, chosen, size)
    for count in np.unique(wanted[wanted > 0]):
        at = np.flatnonzero(wanted == count)
        g.count_global(instruction, source[chosen[at]], chosen[at], int(count))
        data[at, :count] = _global_bytes(g, instruction, source, chosen[at], size, int(count))
    shared.note_write(g, instruction, where, warp, size, data, in_flight=True)
    g.copies.open.append(Copy(g.lanes[chosen], where, data, instruction))


def _global_bytes(
    g: Group, instruction: Instruction, source: np.ndarray, lanes: np.ndarray, size: int, count: int
) -> np.ndarray:
    """[n, count] bytes; the addresses have to be aligned to `size`, also if less is read."""
    memory = g.machine.memory
    out = np.empty((len(lanes), count), np.uint8)
    for found in memory.locate(g, instruction, source[lanes], lanes, count, size):
        region, offset, pick = found
        if memory.check:
            memory.note_read(g, instruction, found, count, lanes[pick])
        if count == size:
            words = region.views[4][(offset // 4)[:, None] + np.arange(size // 4)]
            out[pick] = words.view(np.uint8)
        else:
            out[pick] = region.data[offset[:, None] + np.arange(count)]
    return out


def async_commit(g: Group) -> None:
    """What was issued since the last commit is a group."""
    g.copies.groups.append(g.copies.open)
    g.copies.open = []


def async_wait(g: Group, newest: int) -> None:
    """Everything but the `newest` newest groups has landed."""
    groups = g.copies.groups
    done = groups[: len(groups) - newest] if newest else groups
    g.copies.groups = groups[len(done) :]
    for copy in (copy for group in done for copy in group):
        _land(g, copy)


def async_wait_all(g: Group) -> None:
    """Everything has landed, committed or not."""
    async_commit(g)
    async_wait(g, 0)


def _land(g: Group, copy: Copy) -> None:
    shared = g.machine.shared
    width = copy.data.shape[1]
    warp = copy.lanes // WARP
    shared.landed(copy.where, warp, width)
    at = (copy.where // 4)[:, None] + np.arange(width // 4)
    shared.views[4][at] = copy.data.view(np.uint32)
