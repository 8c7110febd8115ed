"""Shared memory of the CTAs that run together, with the checks of a sanitizer.

    range       every address lies in the kernel's shared memory, aligned to the access
    initcheck   no byte is read before it was written
    racecheck   two warps touch the same byte, one of them writing, with no barrier between
    in flight   nobody touches what a cp.async that was not waited for will write

What is checked is kept by *granule*: the smallest piece that an instruction of the kernel touches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .clocks import AGENT, IN_FLIGHT, WGMMA, Clocks
from .report import MemcheckError
from .syntax import Kernel
from .values import UNSIGNED, as_granules

if TYPE_CHECKING:
    from .group import Group
    from .proxies import Proxies
    from .syntax import Instruction

SAME_VALUE = "same value written twice by two warps"


def smallest_access(kernel: Kernel) -> int:
    """Bytes of the smallest piece of shared memory that an instruction touches, at most 4."""
    smallest = 4
    for i in kernel.instructions:
        if i.base in ("ld", "st") and ("shared" in i.parts or "shared::cta" in i.parts):
            smallest = min(smallest, int(i.parts[-1][1:]) // 8)
    return smallest


class SharedMemory:
    """`slots` times `size` bytes, one CTA after the other, `stride` bytes apart."""

    POISON = 0xFF  # NaN in every float format

    def __init__(self, size: int, granule: int, clocks: Clocks, check: bool) -> None:
        slots, warps = clocks.slots, clocks.warps
        self.size = size
        self.stride = max(1024, -(-size // 1024) * 1024)  # swizzles work on address bits
        self.bytes = np.full(slots * self.stride, self.POISON, np.uint8)
        self.views = {width: self.bytes.view(kind) for width, kind in UNSIGNED.items()}
        self.granule = granule
        self.clocks = clocks
        self.check = check
        self.proxies: Proxies  # sets itself
        if check:
            granules = slots * self.stride // granule
            self.writer = np.zeros(granules, np.int64)  # tags
            self.readers = np.zeros((granules, warps), np.int64)  # epochs, by warp
        self.changers: np.ndarray | None = None  # the same of atomics, once there was one

    def locate(
        self,
        group: Group,
        instruction: Instruction,
        address: np.ndarray,
        slot_base: np.ndarray,
        width: int,
        align: int,
        lanes: np.ndarray | None = None,
    ) -> np.ndarray:
        """Byte positions of 32-bit shared addresses; `lanes` are their threads in the group.

        Raises:
            MemcheckError: names the first thread that is out of range or misaligned.
        """
        address = address.astype(np.int64)
        bad = (address + width > self.size) | (address % align != 0)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            at = int(address[i])
            problem = "not aligned" if at + width <= self.size else "outside"
            who = group.who(int(i if lanes is None else lanes[i]))
            raise MemcheckError(
                f"{group.kernel.name}: {instruction}: {width} bytes at byte {at} of shared memory "
                f"({self.size} bytes): {problem}; {who}"
            )
        return slot_base + address

    def granules(self, where: np.ndarray, width: int) -> np.ndarray:
        """[n, g] granules of the accesses of `width` bytes at byte positions `where`."""
        first = where // self.granule
        if width <= self.granule:
            return first[:, None]
        return first[:, None] + np.arange(width // self.granule)

    def note_read(
        self,
        group: Group,
        instruction: Instruction,
        where: np.ndarray,
        warp: np.ndarray,
        width: int,
    ) -> None:
        """Check a read, and remember it."""
        if not self.check:
            return
        at = self._after_writes(group, instruction, where, warp, width, "reads what")
        self._after_others(group, instruction, where, warp, at, self.changers, "reads", "changed")
        local = warp % self.clocks.warps
        self.readers[at, local[:, None]] = self.clocks.epoch[warp][:, None]

    def note_atomic(
        self,
        group: Group,
        instruction: Instruction,
        where: np.ndarray,
        warp: np.ndarray,
        width: int,
    ) -> None:
        """Check an atomic change, and remember it: only others may come in any order."""
        if not self.check:
            return
        at = self._after_writes(group, instruction, where, warp, width, "changes what")
        self._after_others(group, instruction, where, warp, at, self.readers, "changes", "read")
        self.proxies.before_write(group, instruction, at, where, warp)
        if self.changers is None:
            self.changers = np.zeros_like(self.readers)
        local = warp % self.clocks.warps
        self.changers[at, local[:, None]] = self.clocks.epoch[warp][:, None]

    def _after_writes(
        self,
        group: Group,
        instruction: Instruction,
        where: np.ndarray,
        warp: np.ndarray,
        width: int,
        verb: str,
    ) -> np.ndarray:
        """The granules of an access that takes what is there, which has to be there."""
        at = self.granules(where, width)
        tags = self.writer[at]
        if not tags.all():
            empty = (tags == 0).any(axis=1)
            i = int(np.flatnonzero(empty)[0])
            group.report.add(
                "uninitialised", group.kernel.name, instruction,
                f"shared byte {int(where[i]) % self.stride} never written; "
                f"{self._who(group, warp[i])}",
                int(empty.sum()),
            )  # fmt: skip
        late = self.clocks.unordered(warp, tags)
        if late.any():
            self._race(group, instruction, where, warp, tags, late, verb, "wrote")
        return at

    def note_write(
        self,
        group: Group,
        instruction: Instruction,
        where: np.ndarray,
        warp: np.ndarray,
        width: int,
        values: np.ndarray | None,
        in_flight: bool = False,
    ) -> None:
        """Check a write of `values`, before it; `in_flight`: the issue of a cp.async."""
        if not self.check:
            return
        at = self.granules(where, width)
        tags = self.writer[at]
        new = as_granules(values, self.granule, at.shape)
        late = self.clocks.unordered(warp, tags)
        if late.any():
            same = late & (tags < IN_FLIGHT) & (tags & AGENT < WGMMA) & self._holds(at, new)
            if same.any():
                group.report.note(SAME_VALUE, int(same.sum()))
            if (late & ~same).any():
                bad = late & ~same
                self._race(group, instruction, where, warp, tags, bad, "overwrites what", "wrote")
        for others, deed in ((self.readers, "read"), (self.changers, "changed")):
            self._after_others(group, instruction, where, warp, at, others, "overwrites", deed)
        self.proxies.before_write(group, instruction, at, where, warp)
        mine = self.clocks.tag(warp)[:, None]
        if in_flight:
            mine = IN_FLIGHT + (warp % self.clocks.warps)[:, None]
        self.writer[at] = mine
        lost = self.writer[at] != mine  # another warp writes the same granule in this instruction
        if lost.any() and new is not None and _agree(at, new):
            group.report.note(SAME_VALUE, int(lost.sum()))
        elif lost.any():
            tags = self.writer[at]
            self._race(group, instruction, where, warp, tags, lost, "writes what", "writes too")

    def _after_others(
        self,
        group: Group,
        instruction: Instruction,
        where: np.ndarray,
        warp: np.ndarray,
        at: np.ndarray,
        others: np.ndarray | None,
        verb: str,
        deed: str,
    ) -> None:
        """Report other warps' deeds, by the epochs of `others`, that no barrier orders before."""
        if others is None:
            return
        epochs = others[at]
        early = epochs > self.clocks.seen[warp][:, None, : epochs.shape[-1]]
        if early.any():
            i, g, other = (int(k[0]) for k in np.nonzero(early))
            group.report.add(
                "race", group.kernel.name, instruction,
                f"{verb} what warp {other} {deed}, no barrier between: shared byte "
                f"{int(where[i]) % self.stride + g * self.granule}; {self._who(group, warp[i])}",
                int(early.any(axis=(1, 2)).sum()),
            )  # fmt: skip

    def landed(self, where: np.ndarray, warp: np.ndarray, width: int) -> None:
        """An asynchronous copy of this warp was waited for."""
        if self.check:
            at = self.granules(where, width)
            self.writer[at] = self.clocks.tag(warp)[:, None]
            self.proxies.landed(at)

    def _holds(self, at: np.ndarray, new: np.ndarray | None) -> np.ndarray:
        """Which granules hold the new values already."""
        if new is None:
            return np.zeros(at.shape, bool)
        return self.views[self.granule][at] == new

    def _who(self, group: Group, warp: int) -> str:
        return group.who(int(np.flatnonzero(group.warp == warp)[0])).rpartition(",")[0]

    def _race(
        self,
        group: Group,
        instruction: Instruction,
        where: np.ndarray,
        warp: np.ndarray,
        tags: np.ndarray,
        bad: np.ndarray,
        verb: str,
        end: str,
    ) -> None:
        i, g = (int(k[0]) for k in np.nonzero(bad))
        kind, deed = self.proxies.writer(int(tags[i, g]), end)
        byte = int(where[i]) % self.stride + g * self.granule
        group.report.add(
            kind, group.kernel.name, instruction,
            f"{verb} {deed}: shared byte {byte}; {self._who(group, warp[i])}",
            int(bad.any(axis=1).sum()),
        )  # fmt: skip


def _agree(at: np.ndarray, new: np.ndarray) -> bool:
    """Whether granules that are written several times get the same value each time."""
    order = np.argsort(at.ravel(), kind="stable")
    cells, data = at.ravel()[order], new.ravel()[order]
    twice = cells[1:] == cells[:-1]
    return bool((data[1:][twice] == data[:-1][twice]).all())
