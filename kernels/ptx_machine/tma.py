"""TMA: boxes of tensors between global and shared memory, and what of them is in flight.

Sources: PTX ISA, "cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor", "cp.async.bulk.wait_group"
and "Tensors" (boxes, coordinates, out-of-bound accesses, swizzles).

A load reads global memory at its issue, but the box lands in shared memory only when somebody waits
for its mbarrier. A store reads shared memory only when its thread waits for its group, with .read
or without, and writes global memory only when it waits without .read, or ends. So a program that
does not wait computes with what was there before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from .formats import UINT, decode, encode
from .global_memory import Region
from .report import ExecutionError, MemcheckError
from .tensor_map import MAP_BYTES, TensorMap, replace_field
from .wgmma_layout import swizzle

if TYPE_CHECKING:
    from .group import Group
    from .machine import Machine
    from .syntax import Instruction

ALIGNMENT = 128  # of a box in shared memory
_INTEGER_REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
_FLOAT_REDUCTIONS = {"add": np.add, "min": np.fmin, "max": np.fmax}


@dataclass
class Box:
    """The part of a box that lies inside its tensor, row by row; rows run along dimension 0."""

    inside: tuple[slice, ...]  # of the box, outermost dimension first, elements
    offsets: np.ndarray  # device address of the first byte of each row inside
    width: int  # bytes of these rows

    @staticmethod
    def of(tensor_map: TensorMap, corner: Sequence[int]) -> Box:
        """The box at `corner`, coordinates innermost first; they may lie outside."""
        if len(corner) != tensor_map.rank:
            raise ExecutionError(f"{len(corner)} coordinates of a tensor of rank {tensor_map.rank}")
        steps = (tensor_map.itemsize, *tensor_map.strides)
        inside, address = [], np.array([tensor_map.base], np.int64)
        width = 0
        for axis in reversed(range(tensor_map.rank)):
            first = min(max(-corner[axis], 0), tensor_map.box[axis])
            end = min(max(tensor_map.shape[axis] - corner[axis], first), tensor_map.box[axis])
            inside.append(slice(first, end))
            if axis:
                along = np.arange(corner[axis] + first, corner[axis] + end, dtype=np.int64)
                address = (address[:, None] + along * steps[axis]).ravel()
            else:
                address = address + (corner[0] + first) * steps[0]
                width = (end - first) * steps[0]
        return Box(tuple(inside), address if width else address[:0], width)


@lru_cache(maxsize=256)
def _chunks(tensor_map: TensorMap, start: int) -> np.ndarray:
    """Shared addresses of the 16-byte chunks of a box that lies at `start`, in order."""
    row = tensor_map.box[0] * tensor_map.itemsize
    if tensor_map.swizzle and row != tensor_map.swizzle:
        raise NotImplementedError(
            f"TMA: rows of {row} bytes under a swizzle of {tensor_map.swizzle}: their padding is "
            "not documented well enough; Triton makes them equal"
        )
    return swizzle(start + np.arange(0, tensor_map.box_bytes, 16), tensor_map.swizzle)


@dataclass
class _Load:
    """A box on its way."""

    group: Group
    lane: int  # in that group
    instruction: Instruction
    where: np.ndarray  # byte positions of its chunks
    data: np.ndarray  # [chunks, 16]


@dataclass
class _Store:
    """A store that has not been waited for; `reduction` is "" for a plain one."""

    group: Group
    lane: int  # in that group
    number: int  # commit group of its thread
    epoch: int  # of its warp
    instruction: Instruction
    tensor_map: TensorMap
    box: Box
    where: np.ndarray
    reduction: str
    rows: np.ndarray | None = None  # what it has read: [rows of the box, bytes]


class Bulk:
    """The bulk copies in flight of the CTAs that run together."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.loads: dict[int, list[_Load]] = defaultdict(list)  # by place of the mbarrier
        self.stores: dict[int, list[_Store]] = defaultdict(list)  # by thread, over all CTAs
        self.commits = np.zeros(machine.slots * machine.threads, np.int64)
        self.epochs: dict[int, int] = defaultdict(int)  # stores issued by a warp
        self.maps: dict[bytes, TensorMap] = {}
        self.unfenced: set[tuple[int, int]] = set()  # (CTA, address) of maps just copied there

    # Maps

    def tensor_map(self, g: Group, instruction: Instruction, lane: int, address: int) -> TensorMap:
        """The map at a generic address: a parameter's or global memory's."""
        if (int(g.slot[lane]), address) in self.unfenced:
            g.report.add(
                "no tensormap fence", g.kernel.name, instruction,
                "uses a tensor map that was copied to global memory, with no "
                f"fence.proxy.tensormap since; {g.who(lane)}",
            )  # fmt: skip
        data = self.machine.generic(address, MAP_BYTES)
        key = data.tobytes()
        if key not in self.maps:
            self.maps[key] = TensorMap.unpack(data)
        return self.maps[key]

    def place(self, g: Group, lane: int, tensor_map: TensorMap, start: int) -> np.ndarray:
        """Byte positions of the chunks of a box at shared address `start`."""
        if start % ALIGNMENT or start + tensor_map.box_bytes > self.machine.shared.size:
            raise MemcheckError(
                f"a box of {tensor_map.box_bytes} bytes, aligned to {ALIGNMENT}, at shared address "
                f"{start} of {self.machine.shared.size}"
            )
        return _chunks(tensor_map, start) + int(g.base[lane])

    def region(self, box: Box) -> Region:
        """The tensor that the rows of a box lie in."""
        low, high = int(box.offsets.min()), int(box.offsets.max()) + box.width
        return self.machine.memory.region_of(low, high)

    # Loads

    def load(
        self, g: Group, instruction: Instruction, lane: int, start: int, tensor_map: TensorMap,
        corner: Sequence[int], mbarrier: int,
    ) -> None:  # fmt: skip
        """Issue the load of a box that reports to the mbarrier at that byte position."""
        where = self.place(g, lane, tensor_map, start)
        box = Box.of(tensor_map, corner)
        fill = 0xFF if tensor_map.nan_fill else 0
        shape = (*reversed(tensor_map.box[1:]), tensor_map.box[0] * tensor_map.itemsize)
        data = np.full(shape, fill, np.uint8)
        if self.machine.counts is not None:
            self.machine.counts.tensor_copy(tensor_map.box_bytes, box.offsets, box.width, load=True)
        if len(box.offsets):
            region = self.region(box)
            first = box.offsets - region.base
            self.machine.memory.note_rows(g, instruction, region, first, box.width, lane, None)
            bytes_ = tensor_map.itemsize
            columns = slice(box.inside[-1].start * bytes_, box.inside[-1].stop * bytes_)
            target = data[(*box.inside[:-1], columns)]
            rows = region.data[first[:, None] + np.arange(box.width)]
            target[...] = rows.reshape(target.shape)
        phase = self.machine.mbarriers.phase(mbarrier)
        self.machine.proxies.load_writes(g, instruction, where, lane, mbarrier, phase)
        self.loads[mbarrier].append(_Load(g, lane, instruction, where, data.reshape(-1, 16)))
        self.machine.mbarriers.changes += 1

    def land(self, mbarrier: int) -> None:
        """What reports to this mbarrier arrives, until a phase of it is over: no more is sure."""
        loads = self.loads.pop(mbarrier, [])
        if not loads:
            return
        phase = self.machine.mbarriers.phase(mbarrier)
        while loads and self.machine.mbarriers.phase(mbarrier) == phase:
            load = loads.pop(0)
            self.machine.shared.bytes.reshape(-1, 16)[load.where >> 4] = load.data
            self.machine.mbarriers.complete_tx(mbarrier, load.data.size)
        if loads:
            self.loads[mbarrier] = loads
            for load in loads:
                self.machine.proxies.load_arrives(load.where, mbarrier, phase + 1)

    def finish(self) -> None:
        """The CTAs have ended."""
        for loads in self.loads.values():
            for load in loads:
                g = load.group
                g.report.add(
                    "bulk load never waited for", g.kernel.name, load.instruction,
                    f"it may write shared memory that another CTA has by then; {g.who(load.lane)}",
                )  # fmt: skip

    # Stores

    def store(
        self, g: Group, instruction: Instruction, lane: int, start: int, tensor_map: TensorMap,
        corner: Sequence[int], reduction: str,
    ) -> None:  # fmt: skip
        """Issue the store of a box, or a reduction with what global memory holds."""
        where = self.place(g, lane, tensor_map, start)
        box = Box.of(tensor_map, corner)
        warp, thread = int(g.warp[lane]), int(g.lanes[lane])
        self.epochs[warp] += 1
        epoch = self.epochs[warp]
        if self.machine.counts is not None:
            self.machine.counts.tensor_copy(
                tensor_map.box_bytes, box.offsets, box.width, load=False
            )
        self.machine.proxies.stores_read(g, instruction, where, lane, epoch)
        number = int(self.commits[thread]) + 1
        self.stores[thread].append(
            _Store(g, lane, number, epoch, instruction, tensor_map, box, where, reduction)
        )

    def wait(self, threads: np.ndarray, pending: int, read: bool) -> None:
        """All but the newest groups of these threads are over, or have read their bytes."""
        if not self.stores:
            return
        for thread in set(self.stores) & set(threads.tolist()):
            newest = int(self.commits[thread]) - pending
            done = [s for s in self.stores[thread] if s.number <= newest]
            for store in done:
                self._read(store)
                if not read:
                    self._write(store)
            if read:
                continue
            self.stores[thread] = self.stores[thread][len(done) :]
            if not self.stores[thread]:
                del self.stores[thread]

    def end(self, g: Group, gone: np.ndarray) -> None:
        """These threads of the group end."""
        if not self.stores:
            return
        for thread in set(self.stores) & set(g.lanes[gone].tolist()):
            for store in self.stores.pop(thread):
                if store.rows is None:
                    g.report.add(
                        "bulk store never waited for", g.kernel.name, store.instruction,
                        "its thread ends, and with the CTA the shared memory that it reads; "
                        f"{store.group.who(store.lane)}",
                    )  # fmt: skip
                self._read(store)
                self._write(store)

    def _read(self, store: _Store) -> None:
        """Take the bytes from shared memory, which is free then."""
        if store.rows is not None:
            return
        self.machine.proxies.stores_done(int(store.group.warp[store.lane]), store.epoch)
        tensor_map, box = store.tensor_map, store.box
        bytes_ = tensor_map.itemsize
        data = self.machine.shared.bytes.reshape(-1, 16)[store.where >> 4]
        shape = (*reversed(tensor_map.box[1:]), tensor_map.box[0] * bytes_)
        columns = slice(box.inside[-1].start * bytes_, box.inside[-1].stop * bytes_)
        rows = np.ascontiguousarray(data.reshape(shape)[(*box.inside[:-1], columns)])
        store.rows = rows.reshape(len(box.offsets), box.width)

    def _write(self, store: _Store) -> None:
        g, box, lane, rows = store.group, store.box, store.lane, store.rows
        if rows is None or not len(box.offsets):
            return
        tensor_map, memory = store.tensor_map, self.machine.memory
        with g.blamed(store.instruction, lane):
            region = self.region(box)
        first = box.offsets - region.base
        at = first[:, None] + np.arange(box.width)
        if store.reduction:
            old, itemsize = np.ascontiguousarray(region.data[at]), tensor_map.itemsize
            region.data[at] = reduce(old, rows, tensor_map.element, itemsize, store.reduction)
            return
        same = (region.data[at] == rows).all(axis=1)
        memory.note_rows(g, store.instruction, region, first, box.width, lane, same)
        region.data[at] = rows


def reduce(old: np.ndarray, new: np.ndarray, element: str, itemsize: int, name: str) -> np.ndarray:
    """Bytes [rows, width] of op(old, new), element by element."""
    x, y = old.view(UINT[itemsize]), new.view(UINT[itemsize])
    if element in ("f16", "bf16", "f32"):
        with np.errstate(over="ignore", invalid="ignore"):
            done = encode(_FLOAT_REDUCTIONS[name](decode(x, element), decode(y, element)), element)
    elif element in ("f64", "tf32"):
        raise NotImplementedError(f"TMA: reduction of {element}")
    else:
        if element[0] == "s":
            x, y = x.view(f"i{itemsize}"), y.view(f"i{itemsize}")
        done = _INTEGER_REDUCTIONS[name](x, y)
    return np.ascontiguousarray(done).view(np.uint8).reshape(old.shape)


# Called by translated code


def _active(g: Group, guard: np.ndarray | None) -> np.ndarray:
    return np.arange(g.n) if guard is None else np.flatnonzero(guard)


def bulk_load(
    g: Group, instruction: Instruction, target: np.ndarray, source: np.ndarray,
    corner: list[np.ndarray], mbarrier: np.ndarray, guard: np.ndarray | None,
) -> None:  # fmt: skip
    """cp.async.bulk.tensor from global to shared memory."""
    bulk, shared = g.machine.bulk, g.machine.shared
    for lane in map(int, _active(g, guard)):
        one = np.array([lane])
        place = shared.locate(g, instruction, mbarrier[one], g.base[one], 8, 8, one)
        with g.blamed(instruction, lane):
            tensor_map = bulk.tensor_map(g, instruction, lane, int(source[lane]))
            bulk.load(g, instruction, lane, int(target[lane]), tensor_map,
                      [int(c[lane]) for c in corner], int(place[0]))  # fmt: skip


def bulk_store(
    g: Group, instruction: Instruction, target: np.ndarray, corner: list[np.ndarray],
    source: np.ndarray, reduction: str, guard: np.ndarray | None,
) -> None:  # fmt: skip
    """cp.async.bulk.tensor and cp.reduce.async.bulk.tensor from shared to global memory."""
    bulk = g.machine.bulk
    for lane in map(int, _active(g, guard)):
        with g.blamed(instruction, lane):
            tensor_map = bulk.tensor_map(g, instruction, lane, int(target[lane]))
            bulk.store(g, instruction, lane, int(source[lane]), tensor_map,
                       [int(c[lane]) for c in corner], reduction)  # fmt: skip


def bulk_commit(g: Group, guard: np.ndarray | None) -> None:
    """cp.async.bulk.commit_group."""
    g.machine.bulk.commits[g.lanes if guard is None else g.lanes[guard]] += 1


def bulk_wait(g: Group, pending: int, read: bool, guard: np.ndarray | None) -> None:
    """cp.async.bulk.wait_group, with .read if `read`."""
    g.machine.bulk.wait(g.lanes if guard is None else g.lanes[guard], pending, read)


def replace_in_map(
    g: Group, instruction: Instruction, name: str, address: np.ndarray, ordinal: int,
    value: np.ndarray, guard: np.ndarray | None,
) -> None:  # fmt: skip
    """tensormap.replace on a map in shared memory."""
    shared = g.machine.shared
    for lane in map(int, _active(g, guard)):
        one = np.array([lane])
        where = shared.locate(g, instruction, address[one], g.base[one], MAP_BYTES, 64, one)
        shared.note_read(g, instruction, where, g.warp[one], MAP_BYTES)
        shared.note_write(g, instruction, where, g.warp[one], MAP_BYTES, None)
        start = int(where[0])
        replace_field(shared.bytes[start : start + MAP_BYTES], name, int(value[lane]), ordinal)


def copy_map(
    g: Group, instruction: Instruction, target: np.ndarray, source: np.ndarray,
    guard: np.ndarray | None,
) -> None:  # fmt: skip
    """tensormap.cp_fenceproxy: a map from shared to global memory, by whole warps."""
    g.whole_warps(instruction)
    active = np.ones(g.n, bool) if guard is None else guard
    for warp in np.unique(g.warp[active]):
        mine = g.warp == warp
        lane = int(np.flatnonzero(mine)[0])
        alike = active[mine].all() and (target[mine] == target[lane]).all()
        if not alike or (source[mine] != source[lane]).any():
            raise ExecutionError(
                f"{g.kernel.name}: {instruction}: the threads of a warp differ; {g.who(lane)}"
            )
        _copy_map(g, instruction, lane, int(target[lane]), source)


def _copy_map(
    g: Group, instruction: Instruction, lane: int, address: int, source: np.ndarray
) -> None:
    shared, memory, one = g.machine.shared, g.machine.memory, np.array([lane])
    where = shared.locate(g, instruction, source[one], g.base[one], MAP_BYTES, MAP_BYTES, one)
    shared.note_read(g, instruction, where, g.warp[one], MAP_BYTES)
    with g.blamed(instruction, lane):
        region = memory.region_of(address, address + MAP_BYTES)
    start, at = address - region.base, int(where[0])
    memory.note_rows(g, instruction, region, np.array([start]), MAP_BYTES, lane, np.array([False]))
    region.data[start : start + MAP_BYTES] = shared.bytes[at : at + MAP_BYTES]
    g.machine.bulk.unfenced.add((int(g.slot[lane]), address))


def fence_map(g: Group, address: np.ndarray, guard: np.ndarray | None) -> None:
    """fence.proxy.tensormap, acquire: the map at the address may be used."""
    for lane in map(int, _active(g, guard)):
        g.machine.bulk.unfenced.discard((int(g.slot[lane]), int(address[lane])))
