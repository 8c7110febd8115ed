"""Global and shared memory with the checks of a sanitizer.

    memcheck    every address lies in a tensor that the kernel was given, aligned to the access
    initcheck   no shared byte is read before it was written
    racecheck   two warps touch the same byte, one of them writing, with no barrier between

Order between warps is kept in vector clocks: ``seen[w, v]`` is the newest epoch of warp v whose
effects warp w is guaranteed to see; a barrier joins the clocks of those who met there. A *tag* is
``epoch << AGENT_BITS | agent``: an agent is a warp, or what it left running in the async proxy (see
``proxies.py``). Threads of one warp are never reported against each other.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .values import UNSIGNED

if TYPE_CHECKING:
    from .proxies import Proxies

AGENT_BITS = 7
WGMMA, BULK, MBARRIER = 32, 64, 96  # the first agents that are no warps; a CTA has 32 warps at most
_AGENT = (1 << AGENT_BITS) - 1
_OWN = np.int64(1) << 40  # a warp sees all that it did itself
IN_FLIGHT = (_OWN + 1) << AGENT_BITS  # being copied by cp.async: nobody may touch it
_CTA_SHIFT = 48  # of the tags of global memory: (cta + 1) above epoch and warp
_TRACKED = 1 << 28  # bytes of a tensor up to which global memory is checked for races


# Where parameters lie in the generic address space (cvta.param): one every PARAM_STEP bytes.
PARAM_BASE = 0x7D00_0000_0000
PARAM_STEP = 256


class ExecutionError(RuntimeError):
    """The kernel can't go on: a deadlock, or what the hardware leaves undefined."""


class MemcheckError(AssertionError):
    """An access outside every tensor of the kernel, or misaligned.

    An AssertionError, so that tests that seed bugs count it as noticed.
    """


@dataclass(frozen=True)
class Finding:
    """A defect seen while a kernel ran."""

    kind: str  # "uninitialised", "race", "in flight", "global race", ...
    kernel: str
    instruction: str
    detail: str


class Report:
    """Collects findings; each (kind, instruction) once, with a count."""

    def __init__(self) -> None:
        self.findings: OrderedDict[tuple[str, str, str], list] = OrderedDict()
        self.notes: dict[str, int] = {}

    def add(self, kind: str, kernel: str, instruction: object, detail: str, count: int = 1) -> None:
        key = (kind, kernel, str(instruction))
        entry = self.findings.setdefault(key, [Finding(*key, detail), 0])
        entry[1] += count

    def note(self, what: str, count: int = 1) -> None:
        self.notes[what] = self.notes.get(what, 0) + count

    def clear(self) -> None:
        self.findings.clear()
        self.notes.clear()

    def kinds(self) -> dict[str, int]:
        kinds: dict[str, int] = {}
        for finding, count in self.findings.values():
            kinds[finding.kind] = kinds.get(finding.kind, 0) + count
        return kinds

    def __bool__(self) -> bool:
        return bool(self.findings)

    def __str__(self) -> str:
        return "\n".join(
            f"{f.kind} x{n}: {f.kernel}: {f.instruction}\n    {f.detail}"
            for f, n in self.findings.values()
        )


class Clocks:
    """Who has seen whom, for all warps of the CTAs that run together."""

    def __init__(self, slots: int, warps: int) -> None:
        self.slots, self.warps = slots, warps
        self.epoch = np.ones(slots * warps, np.int64)
        self.seen = np.zeros((slots * warps, 1 << AGENT_BITS), np.int64)
        self.fenced = np.zeros((slots * warps, WGMMA), np.int64)  # see proxies.py
        self._own()

    def _own(self) -> None:
        rows = np.arange(self.slots * self.warps)
        self.seen[rows, rows % self.warps] = _OWN

    def tag(self, warp: np.ndarray) -> np.ndarray:
        """The tag of what these warps (numbered over all slots) do now."""
        return self.epoch[warp] << AGENT_BITS | warp % self.warps

    def barrier(self, warps: np.ndarray, slot_of: np.ndarray) -> None:
        """These warps met, each with those of its own slot."""
        for slot in np.unique(slot_of):
            met = warps[slot_of == slot]
            local = met % self.warps
            known = self.seen[met].copy()
            known[np.arange(len(met)), local] = self.epoch[met]
            self.seen[met] = known.max(axis=0)
            self.fenced[met] = self.fenced[met].max(axis=0)
            self.epoch[met] += 1
        self._own()

    def full_barrier(self, slots: np.ndarray) -> None:
        """All warps of these slots met."""
        epoch = self.epoch.reshape(self.slots, self.warps)
        seen = self.seen.reshape(self.slots, self.warps, -1)
        seen[slots, :, : self.warps] = epoch[slots][:, None, :]
        seen[slots, :, WGMMA:] = seen[slots, :, WGMMA:].max(axis=1, keepdims=True)
        fenced = self.fenced.reshape(self.slots, self.warps, -1)
        fenced[slots] = fenced[slots].max(axis=1, keepdims=True)
        epoch[slots] += 1
        self._own()

    def fence(self, warps: np.ndarray) -> None:
        """A fence.proxy.async by these warps."""
        known = self.seen[warps, :WGMMA].copy()
        known[np.arange(len(warps)), warps % self.warps] = self.epoch[warps]
        self.fenced[warps] = np.maximum(self.fenced[warps], known)
        self.epoch[warps] += 1

    def release(self, warp: int) -> np.ndarray:
        """What those see who see that the warp was here: for :meth:`acquire`."""
        known = self.seen[warp].copy()
        known[warp % self.warps] = self.epoch[warp]
        return np.concatenate((known, self.fenced[warp]))

    def acquire(self, warps: np.ndarray, known: np.ndarray) -> None:
        """These warps see what was released."""
        self.seen[warps] = np.maximum(self.seen[warps], known[: 1 << AGENT_BITS])
        self.fenced[warps] = np.maximum(self.fenced[warps], known[1 << AGENT_BITS :])

    def unordered(self, warp: np.ndarray, tags: np.ndarray) -> np.ndarray:
        """Which of these tags (not 0) the warps are not guaranteed to see."""
        return (tags >> AGENT_BITS) > self.seen[warp[:, None], tags & _AGENT]


class SharedMemory:
    """The shared memory of all CTAs that run together, `stride` bytes each, one after the other."""

    POISON = 0xFF  # NaN in every float format

    def __init__(
        self, slots: int, size: int, warps: int, granule: int, clocks: Clocks, check: bool
    ) -> None:
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
            self.writer = np.zeros(granules, np.int64)
            self.readers = np.zeros((granules, warps), np.int32)

    def granules(self, where: np.ndarray, width: int) -> np.ndarray:
        """[n, g] granules of the accesses of `width` bytes at byte positions `where`."""
        first = where // self.granule
        if width <= self.granule:
            return first[:, None]
        return first[:, None] + np.arange(width // self.granule)

    def locate(self, group, instruction, address, slot_base, width: int, align: int):
        """Byte positions of 32-bit shared addresses, checked."""
        address = address.astype(np.int64)
        if ((address + width) > self.size).any() or (address % align).any():
            bad = ((address + width) > self.size) | (address % align != 0)
            lane = int(np.flatnonzero(bad)[0])
            raise MemcheckError(
                f"{group.kernel.name}: {instruction}: shared address {int(address[lane])} "
                f"({width} bytes, aligned to {align}) of {self.size}; {group.who(lane)}"
            )
        return slot_base + address

    def note_read(self, group, instruction, where, warp, width: int) -> None:
        if not self.check:
            return
        at = self.granules(where, width)
        tags = self.writer[at]
        if not tags.all():
            lane = int(np.flatnonzero((tags == 0).any(axis=1))[0])
            group.report.add(
                "uninitialised", group.kernel.name, instruction,
                f"shared byte {int(where[lane]) % self.stride} never written; {group.who(lane)}",
                int((tags == 0).any(axis=1).sum()),
            )  # fmt: skip
        late = self.clocks.unordered(warp, tags)
        if late.any():
            self._report(group, instruction, where, warp, tags, late, "reads what", "wrote")
        local = warp % self.clocks.warps
        self.readers[at, local[:, None]] = self.clocks.epoch[warp][:, None]

    def note_write(self, group, instruction, where, warp, width: int, values, in_flight=False):
        """Before the write of `values`; `in_flight` is the issue of an asynchronous copy."""
        if not self.check:
            return
        at = self.granules(where, width)
        tags = self.writer[at]
        late = self.clocks.unordered(warp, tags)
        if late.any():
            same = self._same(at, late, values) & (tags < IN_FLIGHT) & (tags & _AGENT < WGMMA)
            if (late & ~same).any():
                self._report(
                    group, instruction, where, warp, tags, late & ~same, "overwrites what", "wrote"
                )
            if same.any():
                group.report.note("same value written twice by two warps", int(same.sum()))
        readers = self.readers[at]
        columns = readers.shape[-1]
        early = readers > self.clocks.seen[warp][:, None, :columns]
        if early.any():
            lane, g, other = (int(i[0]) for i in np.nonzero(early))
            group.report.add(
                "race", group.kernel.name, instruction,
                f"overwrites what warp {other} read, no barrier between: shared byte "
                f"{int(where[lane]) % self.stride + g * self.granule}; {group.who(lane)}",
                int(early.any(axis=(1, 2)).sum()),
            )  # fmt: skip
        self.proxies.before_write(group, instruction, at, where, warp)
        mine = self.clocks.tag(warp)[:, None]
        if in_flight:
            mine = mine * 0 + IN_FLIGHT + (warp % self.clocks.warps)[:, None]
        self.writer[at] = mine
        lost = self.writer[at] != mine
        if lost.any():
            same = self._same_among(at, lost, values)
            if not same:
                self._report(
                    group, instruction, where, warp, self.writer[at], lost, "writes with", "too"
                )
            else:
                group.report.note("same value written twice by two warps", int(lost.sum()))

    def landed(self, where: np.ndarray, warp: np.ndarray, width: int) -> None:
        """An asynchronous copy of this warp was waited for."""
        if self.check:
            at = self.granules(where, width)
            self.writer[at] = self.clocks.tag(warp)[:, None]
            self.proxies.landed(at)

    def _same(self, at, late, values) -> np.ndarray:
        if values is None or self.granule not in (2, 4):
            return np.zeros_like(late)
        new = _as_granules(values, self.granule, at.shape)
        return late & (self.views[self.granule][at] == new) if new is not None else late & False

    def _same_among(self, at, lost, values) -> bool:
        new = _as_granules(values, self.granule, at.shape) if values is not None else None
        if new is None:
            return False
        order = np.argsort(at.ravel(), kind="stable")
        cells, data = at.ravel()[order], new.ravel()[order]
        twice = cells[1:] == cells[:-1]
        return bool((data[1:][twice] == data[:-1][twice]).all())

    def _report(self, group, instruction, where, warp, tags, bad, verb, end) -> None:
        lane, g = (int(i[0]) for i in np.nonzero(bad))
        kind, deed = self.proxies.writer(int(tags[lane, g]), end)
        byte = int(where[lane]) % self.stride + g * self.granule
        group.report.add(
            kind, group.kernel.name, instruction,
            f"{verb} {deed}: shared byte {byte}; {group.who(lane)}", int(bad.any(axis=1).sum()),
        )  # fmt: skip


def _as_granules(values: np.ndarray, granule: int, shape) -> np.ndarray | None:
    """The data [n, items] of a store as [n, granules], None if it is narrower than a granule."""
    data = np.ascontiguousarray(values)
    data = data.reshape(len(data), -1).view(UNSIGNED[granule]) if data.size else data
    return data if data.shape == tuple(shape) else None


@dataclass
class Region:
    """A piece of host memory that a kernel may touch, at an address of our own making.

    Regions lie far apart, so that a pointer that leaves one never meets another.
    """

    name: str
    base: int  # device address of host address `origin`
    origin: int
    low: int  # offsets [low, high) are allowed
    high: int
    data: np.ndarray  # uint8, from origin on
    writable: bool = True

    def __post_init__(self) -> None:
        whole = len(self.data) // 8 * 8
        self.views = {1: self.data}
        for width in (2, 4, 8):
            self.views[width] = self.data[: len(self.data) // width * width].view(UNSIGNED[width])
        del whole
        self.writer: np.ndarray | None = None
        self.reader: np.ndarray | None = None

    def start_tracking(self) -> None:
        granules = -(-len(self.data) // 2)
        self.writer = np.zeros(granules, np.int64)
        self.reader = np.zeros(granules, np.int64)


class GlobalMemory:
    """The tensors of one launch."""

    _FIRST = 0x7F00_0000_0000
    _STEP = 1 << 36

    def __init__(self, check: bool) -> None:
        self.regions: list[Region] = []
        self.check = check

    def add(self, name: str, host: int, size: int) -> int:
        """Allow [host, host + size); the device address of `host`."""
        for region in self.regions:
            if region.origin + region.low <= host and host + size <= region.origin + region.high:
                return region.base + host - region.origin
        import ctypes

        origin = host & ~15  # whole vectors can be viewed; the check keeps to [low, high)
        span = -(-(host + size - origin) // 16) * 16
        buffer = (ctypes.c_uint8 * span).from_address(origin)
        base = self._FIRST + len(self.regions) * self._STEP + (origin & 0xFFF)
        data = np.frombuffer(buffer, np.uint8)
        region = Region(name, base, origin, host - origin, host - origin + size, data)
        if self.check and size <= _TRACKED:
            region.start_tracking()
        self.regions.append(region)
        return base + host - origin

    def locate(self, group, instruction, address: np.ndarray, lanes, width: int):
        """(region, offsets) of accesses of `width` bytes; all of one instruction hit one region."""
        number = (int(address[0]) - self._FIRST) // self._STEP
        region = self.regions[number] if 0 <= number < len(self.regions) else None
        if region is not None:
            offset = address - np.uint64(region.base)
            limit = np.uint64(region.high - width) if region.high >= width else None
            inside = limit is not None and offset.max() <= limit and offset.min() >= region.low
            if inside and not (address & np.uint64(width - 1)).any():
                return region, offset.astype(np.int64)
        self._fail(group, instruction, address, lanes, width)

    def region_of(self, low: int, high: int) -> Region:
        """The tensor that device addresses [low, high) lie in."""
        number = (low - self._FIRST + (1 << 35)) // self._STEP
        if not 0 <= number < len(self.regions):
            raise MemcheckError(f"address {low:#x}, near no tensor")
        region = self.regions[number]
        first, end = low - region.base - region.low, high - region.base - region.low
        if first < 0 or end > region.high - region.low:
            raise MemcheckError(
                f"bytes {first} to {end} of {region.name} ({region.high - region.low} bytes): outside"
            )
        return region

    def note_rows(self, group, instruction, region, first, width, lane, same) -> None:
        """:meth:`note` for rows of a box that one thread copies; a read if `same` is None."""
        if self.check:
            lanes = np.full(len(first), lane)
            self.note(group, instruction, region, first, width, lanes, same is not None, same)

    def _fail(self, group, instruction, address, lanes, width) -> None:
        for i, a in enumerate(int(a) for a in address):
            number = (a - self._FIRST + (1 << 35)) // self._STEP
            region = self.regions[number] if 0 <= number < len(self.regions) else None
            lane = int(i if lanes is None else lanes[i])
            what = f"{group.kernel.name}: {instruction}: {width} bytes at"
            if region is None:
                raise MemcheckError(f"{what} {a:#x}, near no tensor; {group.who(lane)}")
            offset = a - region.base - region.low
            place = f"{what} byte {offset} of {region.name} ({region.high - region.low} bytes)"
            if offset < 0 or offset + width > region.high - region.low:
                raise MemcheckError(f"{place}: outside; {group.who(lane)}")
            if a % width:
                raise MemcheckError(f"{place}: not aligned; {group.who(lane)}")
        raise MemcheckError(
            f"{group.kernel.name}: {instruction}: lanes of one access in several tensors"
        )

    def note(self, group, instruction, region, offset, width, lanes, write: bool, same=None):
        """Report what another CTA, or another warp without a barrier, did to the same bytes.

        `same` says which threads write what is there already: that is only counted.
        """
        if region.writer is None:
            return
        at = (offset // 2)[:, None] + np.arange(max(1, width // 2))
        warp, cta = group.warp, group.cta
        if lanes is not None:
            warp, cta = warp[lanes], cta[lanes]
        clocks = group.machine.clocks
        mine = ((cta + 1) << _CTA_SHIFT | clocks.tag(warp))[:, None]
        for tags, deed in ((region.writer[at], "wrote"), (region.reader[at], "read")):
            if deed == "read" and not write:
                continue
            present = tags != 0
            if not present.any():
                continue
            foreign = (tags >> _CTA_SHIFT) != (mine >> _CTA_SHIFT)
            inner = (tags & ((np.int64(1) << _CTA_SHIFT) - 1)) * ~foreign
            bad = present & (foreign | clocks.unordered(warp, inner))
            if deed == "wrote" and same is not None and (bad & same[:, None]).any():
                group.report.note(
                    "same global value written twice", int((bad.any(axis=1) & same).sum())
                )
                bad &= ~same[:, None]
            if bad.any():
                i, g = (int(k[0]) for k in np.nonzero(bad))
                who = "another CTA" if foreign[i, g] else f"warp {int(inner[i, g]) & _AGENT}"
                kind = "global race" if deed == "wrote" else "global write after read"
                group.report.add(
                    kind, group.kernel.name, instruction,
                    f"{'writes' if write else 'reads'} what {who} {deed} in this launch: byte "
                    f"{int(offset[i]) - region.low} of {region.name}; "
                    f"{group.who(int(i if lanes is None else lanes[i]))}",
                    int(bad.any(axis=1).sum()),
                )  # fmt: skip
        if write:
            region.writer[at] = mine
        else:
            region.reader[at] = mine
