"""Global memory: the tensors of one launch, at addresses of our own making.

Each storage is a region far from the others, with the low 12 bits of its address in the host's
memory, so alignment is that of the tensor. A region spans from the first to the last element of the
tensors that were passed; what lies outside of it is not touched but reported.

Races are those of one launch: between programs (CTAs), and between warps without a barrier. Atomics
are exempt.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .clocks import AGENT, TAG_BITS
from .report import MemcheckError
from .values import UNSIGNED, as_granules

if TYPE_CHECKING:
    from .group import Group
    from .syntax import Instruction, Kernel

# Where parameters lie in the generic address space (cvta.param): one every PARAM_STEP bytes.
PARAM_BASE = 0x7D00_0000_0000
PARAM_STEP = 256

CONSTANTS = 0x7EF0_0000_0000  # of the kernel's own tables, one step before the tensors
SAME_GLOBAL_VALUE = "same global value written twice"
AFTER_READ = "global write after read"
IN_PLACE = f"{AFTER_READ}, in place"  # by a kernel that was given the tensor twice
_TRACKED = 1 << 28  # bytes of a region up to which it is checked for races
_INNER = (np.int64(1) << TAG_BITS) - 1  # of a tag, what the clocks of one program know
_EPOCH = _INNER - AGENT
_FIRST = 0x7F00_0000_0000
_STEP = 1 << 36


def smallest_store(kernel: Kernel) -> int:
    """Bytes of global memory that may share a tag: 1 if a kernel stores single bytes, else 2."""
    stores = [i for i in kernel.instructions if i.base == "st" and "global" in i.parts]
    return 1 if any(i.parts[-1][1:] == "8" for i in stores) else 2


@dataclass(frozen=True)
class Piece:
    """A tensor of a region: its name, and its bytes counted from the region's origin."""

    name: str
    low: int
    high: int


@dataclass
class Region:
    """A piece of host memory that a kernel may touch."""

    base: int  # device address of the first byte of `data`
    data: np.ndarray  # uint8
    pieces: list[Piece]
    granule: int  # bytes that share a tag
    views: dict[int, np.ndarray] = field(init=False)  # by bytes of an element
    writer: np.ndarray | None = None  # tags, by granule: who wrote last
    reader: np.ndarray | None = None  # who read last
    other: np.ndarray | None = None  # a reader of another program than the last one's
    fellow: np.ndarray | None = None  # another warp of a reader's program, with no barrier between

    def __post_init__(self) -> None:
        self.views = {
            width: self.data[: len(self.data) // width * width].view(kind)
            for width, kind in UNSIGNED.items()
        }
        self.low = min(piece.low for piece in self.pieces)
        self.high = max(piece.high for piece in self.pieces)

    def start_tracking(self) -> None:
        """Follow who writes and reads."""
        granules = -(-len(self.data) // self.granule)
        self.writer = np.zeros(granules, np.int64)
        self.reader = np.zeros(granules, np.int64)
        self.other = np.zeros(granules, np.int64)
        self.fellow = np.zeros(granules, np.int64)

    def tracked(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
        """Who wrote and read each granule, if that is followed."""
        if self.writer is None or self.reader is None or self.other is None or self.fellow is None:
            return None
        return self.writer, self.reader, self.other, self.fellow

    def passed_twice(self, offset: int) -> bool:
        """Whether a byte is in a tensor that the kernel was given as two arguments."""
        starts = [piece.low for piece in self.pieces if piece.low <= offset < piece.high]
        return len(starts) > len(set(starts))

    def describe(self, offset: int) -> str:
        """The tensor that holds a byte, or the nearest one, and the byte in it."""
        nearest = min(self.pieces, key=lambda p: max(p.low - offset, offset - p.high + 1, 0))
        return f"byte {offset - nearest.low} of {nearest.name} ({nearest.high - nearest.low} bytes)"


Found = tuple[Region, np.ndarray, "np.ndarray | slice"]


class GlobalMemory:
    """The tensors of one launch."""

    def __init__(self, check: bool, granule: int = 2) -> None:
        self.regions: list[Region] = []
        self.constants: Region | None = None
        self.check = check
        self.granule = granule

    def add_constants(self, data: bytes) -> None:
        """Tables of the kernel, at :data:`CONSTANTS`."""
        if data:
            inside = [Piece("the kernel's constants", 0, len(data))]
            self.constants = Region(CONSTANTS, np.frombuffer(data, np.uint8), inside, self.granule)

    def add(self, pieces: list[tuple[str, int, int]]) -> int:
        """Allow pieces (name, host address, bytes) as one region.

        Returns what has to be added to a host address to get the device address.
        """
        start = min(address for _, address, _ in pieces)
        end = max(address + size for _, address, size in pieces)
        origin = start & ~15  # whole vectors can be viewed; the checks keep to the pieces
        span = -(-(end - origin) // 16) * 16
        buffer = (ctypes.c_uint8 * span).from_address(origin)
        base = _FIRST + len(self.regions) * _STEP + (origin & 0xFFF)
        inside = [Piece(name, at - origin, at - origin + size) for name, at, size in pieces]
        region = Region(base, np.ctypeslib.as_array(buffer), inside, self.granule)
        if self.check and end - start <= _TRACKED:
            region.start_tracking()
        self.regions.append(region)
        return base - origin

    def _region(self, address: int) -> Region | None:
        if CONSTANTS <= address < _FIRST:
            return self.constants
        number = (address - _FIRST) // _STEP
        return self.regions[number] if 0 <= number < len(self.regions) else None

    def locate(
        self,
        group: Group,
        instruction: Instruction,
        address: np.ndarray,
        lanes: np.ndarray | None,
        width: int,
        align: int = 0,
    ) -> list[Found]:
        """Regions, offsets in them and which of `address` they are, of accesses of `width` bytes.

        They have to be aligned to `align` bytes, to their width if that is 0.

        Raises:
            MemcheckError: names the first thread outside of every tensor, or misaligned.
        """
        align = align or width
        region = self._region(int(address[0]))
        if region is not None and region.high - region.low >= width:
            offset = address - np.uint64(region.base)
            inside = offset.max() <= region.high - width and offset.min() >= region.low
            if inside and not (address & np.uint64(align - 1)).any():
                return [(region, offset.astype(np.int64), slice(None))]
        return list(self._by_region(group, instruction, address, lanes, width, align))

    def _by_region(
        self,
        group: Group,
        instruction: Instruction,
        address: np.ndarray,
        lanes: np.ndarray | None,
        width: int,
        align: int,
    ) -> Iterator[Found]:
        for i, a in enumerate(map(int, address)):
            problem = self._problem(a, width, align)
            if problem:
                who = group.who(int(i if lanes is None else lanes[i]))
                raise MemcheckError(f"{group.kernel.name}: {instruction}: {problem}; {who}")
        numbers = (address - np.uint64(_FIRST)) // np.uint64(_STEP)
        for number in np.unique(numbers):
            at = np.flatnonzero(numbers == number)
            region = self.regions[int(number)]
            yield region, (address[at] - np.uint64(region.base)).astype(np.int64), at

    def _problem(self, address: int, width: int, align: int) -> str:
        """What is wrong with an access; empty if nothing is."""
        number = (address - _FIRST + _STEP // 2) // _STEP  # the nearest region
        if not 0 <= number < len(self.regions):
            return f"{width} bytes at {address:#x}, near no tensor"
        region = self.regions[number]
        offset = address - region.base
        place = f"{width} bytes at {region.describe(offset)}"
        if offset < region.low or offset + width > region.high:
            return f"{place}: outside"
        if address % align == 0:
            return ""
        return f"{place}: not aligned" + (f" to {align}" if align != width else "")

    def region_of(self, low: int, high: int) -> Region:
        """The tensor that device addresses [low, high) lie in."""
        number = (low - _FIRST + _STEP // 2) // _STEP
        if not 0 <= number < len(self.regions):
            raise MemcheckError(f"address {low:#x}, near no tensor")
        region = self.regions[number]
        for worst in (low - region.base, high - 1 - region.base):
            if not region.low <= worst < region.high:
                raise MemcheckError(f"{region.describe(worst)}: outside")
        return region

    def note_rows(
        self,
        group: Group,
        instruction: Instruction,
        region: Region,
        first: np.ndarray,
        width: int,
        lane: int,
        same: np.ndarray | None,
    ) -> None:
        """Rows of a box that one thread copies; a read if `same` is None."""
        if not self.check:
            return
        lanes = np.full(len(first), lane)
        found = (region, first, lanes)
        if same is None:
            self.note_read(group, instruction, found, width, lanes)
        else:
            self.note_write(group, instruction, found, width, lanes, same, None)

    def note_read(
        self,
        group: Group,
        instruction: Instruction,
        found: Found,
        width: int,
        lanes: np.ndarray | None,
    ) -> None:
        """Report what others wrote to the bytes that are read."""
        tracked = found[0].tracked()
        if tracked is None:
            return
        writer, reader, other, fellow = tracked
        at, mine = _tags(group, found, width, lanes)
        self._compare(group, instruction, found, lanes, writer[at], mine, "reads", None)
        before = reader[at]
        reader[at] = mine
        for tags, who in ((before, before), (reader[at], np.broadcast_to(mine, at.shape))):
            changed = (tags != 0) & ((tags ^ mine) & ~_EPOCH != 0)
            if not changed.any():
                continue
            foreign = changed & ((tags ^ mine) >> TAG_BITS != 0)
            other[at[foreign]] = who[foreign]
            near = changed & ~foreign
            if near.any():
                warp = group.warp[_threads(found, lanes)]
                near &= group.machine.clocks.unordered(warp, (tags & _INNER) * near)
                fellow[at[near]] = who[near]

    def note_write(
        self,
        group: Group,
        instruction: Instruction,
        found: Found,
        width: int,
        lanes: np.ndarray | None,
        same: np.ndarray,
        data: np.ndarray | None,
    ) -> None:
        """Report what others did to the bytes; `same`: threads that write what is there already.

        `data` [n, items] is what they write.
        """
        tracked = found[0].tracked()
        if tracked is None:
            return
        writer, *readers = tracked
        at, mine = _tags(group, found, width, lanes)
        self._compare(group, instruction, found, lanes, writer[at], mine, "writes", same)
        for tags in readers:
            self._compare(group, instruction, found, lanes, tags[at], mine, "read", None)
        writer[at] = mine
        left = writer[at]  # of those who write the same bytes now, one is left
        if data is not None and (left != mine).any():
            alike = _alike(at, as_granules(data, found[0].granule, at.shape))
            self._compare(group, instruction, found, lanes, left, mine, "writes", alike)

    def _compare(
        self,
        group: Group,
        instruction: Instruction,
        found: Found,
        lanes: np.ndarray | None,
        tags: np.ndarray,
        mine: np.ndarray,
        deed: str,
        same: np.ndarray | None,
    ) -> None:
        """`deed` is what this access does to bytes that others wrote; "read" if they read them."""
        if not tags.any():
            return
        region, offset, _ = found
        chosen = _threads(found, lanes)
        warp = group.warp[chosen]
        foreign = (tags >> TAG_BITS) != (mine >> TAG_BITS)
        inner = (tags & _INNER) * ~foreign
        bad = (tags != 0) & (foreign | group.machine.clocks.unordered(warp, inner))
        if same is not None and (bad & same[:, None]).any():
            twice = int((bad.any(axis=1) & same).sum())
            group.report.note(SAME_GLOBAL_VALUE, twice)
            bad &= ~same[:, None]
        if not bad.any():
            return
        i, g = (int(k[0]) for k in np.nonzero(bad))
        who = "another program" if foreign[i, g] else f"warp {int(inner[i, g]) & AGENT}"
        byte = int(offset[i]) + g * region.granule
        kind, done = "global race", f"{deed} what {who} wrote"
        if deed == "read":
            kind = IN_PLACE if region.passed_twice(byte) else AFTER_READ
            done = f"writes what {who} read"
        lane = int(np.arange(group.n)[chosen][i])
        group.report.add(
            kind, group.kernel.name, instruction,
            f"{done} in this launch: {region.describe(byte)}; "
            f"{group.who(lane)}",
            int(bad.any(axis=1).sum()),
        )  # fmt: skip


def _threads(found: Found, lanes: np.ndarray | None) -> np.ndarray | slice:
    """Positions in the group of those who make an access."""
    return found[2] if lanes is None else lanes


def _tags(
    group: Group, found: Found, width: int, lanes: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Granules [n, g] of an access, and the tags [n, 1] of those who make it."""
    region, offset, _ = found
    chosen = _threads(found, lanes)
    at = (offset // region.granule)[:, None] + np.arange(-(-width // region.granule))
    tags = group.machine.clocks.tag(group.warp[chosen])
    return at, ((group.cta[chosen] + 1) << TAG_BITS | tags)[:, None]


def _alike(at: np.ndarray, values: np.ndarray | None) -> np.ndarray:
    """[n]: whether all who write the granules `at` [n, g] of a thread write the same to them."""
    if values is None:
        return np.zeros(len(at), bool)
    cells, where = np.unique(at.ravel(), return_inverse=True)
    flat = values.ravel().astype(np.int64)
    low, high = np.full(len(cells), 1 << 32), np.full(len(cells), -1)
    np.minimum.at(low, where.ravel(), flat)
    np.maximum.at(high, where.ravel(), flat)
    return (low == high)[where].reshape(at.shape).all(axis=1)
