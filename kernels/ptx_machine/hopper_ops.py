"""The sm_90-only instructions of a PTX program, for an executor: the bridge to hopper.py.

    cta = Cta(smem, threads, read, write, proxies=None)     once for each CTA
    if handles(op):                                         "wgmma.mma_async...." and so on
        result = execute(cta, instruction, lanes, get, put)

`smem` is the CTA's shared memory (uint8, index = shared address), `threads` how many it has,
`read(addresses) -> uint8` and ``write(addresses, uint8)`` reach global memory byte by byte
(int64 arrays of any shape; the bytes have the same shape). `instruction` is a ptx.Instruction.
`lanes` are the threads of this CTA that execute it now, after its guard, in ascending order;
``get(operand)`` gives one value per entry of `lanes` (uint32, uint64 or bool; for ``Mem`` the
address with its offset, for ``Imm`` one value or an array), ``put(operand, values)`` takes them.

`execute` returns

    None        done, go on
    BLOCKED     an array of bool per lane came with it: (BLOCKED, ready). Lanes that are not ready
                have to execute the same instruction again after others have run. The predicate of
                try_wait was put for the lanes that are ready only.

Rules for the executor:

1. Call `execute` once for all lanes of the CTA that stand at the instruction. wgmma.* needs whole
   warpgroups (128 lanes with consecutive numbers from a multiple of 128), elect.sync, stmatrix and
   tensormap.cp_fenceproxy whole warps; others take any lanes. All are checked here.
2. With `proxies` (hopper.Proxies), also report the ordinary accesses to it: ``generic_read(warp,
   addresses, size)`` and ``generic_write`` for ld/st/ldmatrix/atom on shared memory, cp.async at
   its wait_group; ``bar_sync(warps)`` when a bar.sync or barrier.sync lets its warps go.
3. `setmaxnreg`, `griddepcontrol`, `fence.proxy.tensormap`, `prefetch.tensormap` and
   `cp.async.bulk.commit/wait_group` do nothing to the state here.
4. Tensor maps: put ``hopper.TensorMap.host(...).pack()`` (128 bytes) where the kernel has its
   CUtensorMap: in the parameter space, whose address must be readable by `read` (cvta.param gives
   it), or in global memory. Device-made maps are built by tensormap.replace in shared memory and
   copied to global scratch by tensormap.cp_fenceproxy, both here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from . import hopper

BLOCKED = "blocked"
_HANDLED = (
    "wgmma.", "mbarrier.", "fence.proxy.", "fence.mbarrier_init", "cp.async.bulk", "elect.",
    "cp.reduce.async.bulk",
    "stmatrix.", "setmaxnreg.", "tensormap.", "griddepcontrol", "prefetch.tensormap",
)  # fmt: skip


def handles(op: str) -> bool:
    """Whether `execute` knows this opcode."""
    return op.startswith(_HANDLED)


class HopperError(RuntimeError):
    """An instruction used against the rules of the ISA."""


@dataclass
class Cta:
    """What these instructions keep about one CTA."""

    smem: np.ndarray
    threads: int
    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray, np.ndarray], None]
    proxies: hopper.Proxies | None = None
    notes: dict[str, int] = field(default_factory=dict)
    changes: int = 0  # of mbarriers: a scheduler can tell whether waiting again makes sense

    def __post_init__(self) -> None:
        self.mbarriers = hopper.Mbarrier(self.smem)
        self.maps: dict[bytes, hopper.TensorMap] = {}

    def note(self, what: str) -> None:
        self.notes[what] = self.notes.get(what, 0) + 1

    def tensor_map(self, address: int) -> hopper.TensorMap:
        data = self.read(np.int64(address) + np.arange(128, dtype=np.int64))
        key = data.tobytes()
        if key not in self.maps:
            self.maps[key] = hopper.TensorMap.unpack(data)
            self.maps[key].check()
        return self.maps[key]


def execute(cta: Cta, instruction, lanes: np.ndarray, get, put):
    """See the top of the module."""
    op = instruction.op
    if not len(lanes):
        return None
    for prefix, run in _RUN:
        if op.startswith(prefix):
            return run(cta, instruction, lanes, get, put)
    raise NotImplementedError(op)


def _warps(lanes: np.ndarray) -> np.ndarray:
    return np.unique(lanes // 32)


def _whole(lanes: np.ndarray, size: int, op: str) -> list[np.ndarray]:
    """Positions in `lanes` of each whole group of `size` threads."""
    if len(lanes) % size or (lanes[::size] % size).any():
        raise HopperError(f"{op}: not by whole groups of {size} threads: {lanes[:8]}...")
    groups = lanes.reshape(-1, size)
    if (groups - groups[:, :1] != np.arange(size)).any():
        raise HopperError(f"{op}: not by whole groups of {size} threads: {lanes[:8]}...")
    return list(np.arange(len(lanes)).reshape(-1, size))


def _same(values: np.ndarray, op: str, what: str) -> int:
    if (values != values[0]).any():
        raise HopperError(f"{op}: {what} differs between threads of a warp(group)")
    return int(values[0])


def _array(value, count: int, kind=np.int64) -> np.ndarray:
    value = np.asarray(value)
    return np.broadcast_to(value, (count,)).astype(kind, copy=False)


# -- wgmma -----------------------------------------------------------------------------------------

_MMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.(\w+)\.(\w+)\.(\w+)$")


def _mma(cta, instruction, lanes, get, put):
    op = instruction.op
    found = _MMA.match(op)
    if not found:
        raise NotImplementedError(op)
    n, k, d_kind, a_kind, b_kind = (*map(int, found.groups()[:2]), *found.groups()[2:])
    if hopper.K_OF[hopper.ITEMSIZE[a_kind]] != k:
        raise HopperError(f"{op}: k{k} with {a_kind}")
    d_op, a_op, b_op, scale_d, *tail = instruction.operands
    tail = [t.value - (1 << 32 if t.value >> 31 else 0) for t in tail]
    scale_a, scale_b, *trans = tail
    from_registers = hasattr(a_op, "items")
    if from_registers:
        trans = [0, *trans] if trans else [0, 0]
    trans = trans or [0, 0]
    d_items, count = d_op.items, len(lanes)
    if len(d_items) * (2 if d_kind == "f16" else 1) != n // 2:
        raise HopperError(f"{op}: {len(d_items)} registers for D")
    d = np.stack([_array(get(r), count, np.uint32) for r in d_items], 1)
    scale = _array(get(scale_d), count).astype(bool)
    b = _array(get(b_op), count, np.uint64)
    if from_registers:
        a = np.stack([_array(get(r), count, np.uint32) for r in a_op.items], 1)
    else:
        a = _array(get(a_op), count, np.uint64)
    out = np.empty_like(d)
    for group in _whole(lanes, 128, op):
        touched: list = []
        out[group] = hopper.wgmma(
            cta.smem, n, (d_kind, a_kind, b_kind),
            a[group] if from_registers else _same(a[group], op, "descriptor of A"),
            _same(b[group], op, "descriptor of B"), d[group],
            scale_d=bool(_same(scale[group], op, "scale-d")), scale_a=scale_a, scale_b=scale_b,
            trans_a=bool(trans[0]), trans_b=bool(trans[1]),
            touched=touched if cta.proxies is not None else None,
        )  # fmt: skip
        if cta.proxies is not None:
            cta.proxies.where = str(instruction)
            for addresses, size in touched:
                cta.proxies.async_read(_warps(lanes[group]), addresses, size)
    for i, register in enumerate(d_items):
        put(register, out[:, i])


def _mma_commit(cta, instruction, lanes, get, put):
    _whole(lanes, 128, instruction.op)
    if cta.proxies is not None:
        for warp in _warps(lanes):
            cta.proxies.wgmma_commit(warp)


def _mma_wait(cta, instruction, lanes, get, put):
    _whole(lanes, 128, instruction.op)
    if cta.proxies is not None:
        for warp in _warps(lanes):
            cta.proxies.wgmma_wait(warp, instruction.operands[0].value)


def _mma_fence(cta, instruction, lanes, get, put):
    _whole(lanes, 128, instruction.op)


# -- mbarrier ----------------------------------------------------------------------------------------


def _each(cta, instruction, lanes, get):
    """(position, warp, address) of each lane; addresses per lane."""
    memory = next(o for o in instruction.operands if hasattr(o, "base"))
    address = _array(get(memory), len(lanes))
    for i, lane in enumerate(lanes):
        yield i, int(lane) // 32, int(address[i])


def _arrived(cta, warp: int, address: int, completed: bool) -> None:
    cta.changes += 1
    if cta.proxies is not None:
        cta.proxies.mbarrier_arrive(warp, address)
        if completed:
            cta.proxies.mbarrier_completed(address)


def _mbarrier_init(cta, instruction, lanes, get, put):
    count = _array(get(instruction.operands[1]), len(lanes))
    for i, warp, address in _each(cta, instruction, lanes, get):
        if cta.mbarriers.init(address, int(count[i])):
            cta.note(f"mbarrier.init where one is already: {address:#x}")
        if cta.proxies is not None:
            cta.proxies.mbarrier_init(warp, address)
            cta.proxies.where = str(instruction)
            cta.proxies.generic_write(warp, address + np.arange(8))


def _mbarrier_inval(cta, instruction, lanes, get, put):
    for _, warp, address in _each(cta, instruction, lanes, get):
        cta.mbarriers.inval(address)
        if cta.proxies is not None:
            cta.proxies.where = str(instruction)
            cta.proxies.generic_write(warp, address + np.arange(8))


def _mbarrier_arrive(cta, instruction, lanes, get, put):
    parts = instruction.op.split(".")
    operands = instruction.operands
    at = next(i for i, o in enumerate(operands) if hasattr(o, "base"))
    if at and getattr(operands[0], "name", "_") != "_":
        raise NotImplementedError(f"{instruction.op}: its state token")
    count = _array(get(operands[at + 1]), len(lanes)) if len(operands) > at + 1 else None
    for i, warp, address in _each(cta, instruction, lanes, get):
        if "expect_tx" in parts:
            if parts[1] == "expect_tx":
                cta.mbarriers.expect_tx(address, int(count[i]))
                continue
            done = cta.mbarriers.arrive_expect_tx(address, int(count[i]))
        else:
            done = cta.mbarriers.arrive(address, 1 if count is None else int(count[i]))
        _arrived(cta, warp, address, done)


def _mbarrier_wait(cta, instruction, lanes, get, put):
    parts = instruction.op.split(".")
    if "parity" not in parts:
        raise NotImplementedError(instruction.op)
    parity = _array(get(instruction.operands[2]), len(lanes))
    ready = np.empty(len(lanes), bool)
    seen = set()
    for i, warp, address in _each(cta, instruction, lanes, get):
        ready[i] = cta.mbarriers.test_parity(address, int(parity[i]))
        if ready[i] and cta.proxies is not None and (warp, address) not in seen:
            seen.add((warp, address))
            cta.proxies.mbarrier_wait(warp, address)
    put(instruction.operands[0], ready)
    return None if ready.all() else (BLOCKED, ready)


# -- TMA -------------------------------------------------------------------------------------------


def _bulk_tensor(cta, instruction, lanes, get, put):
    """cp.async.bulk.tensor.Nd, tile mode: loads with an mbarrier, stores, reductions."""
    op = instruction.op
    parts = op.split(".")
    if any(p.startswith(("im2col", "multicast", "tile::", "cta_group")) for p in parts):
        raise NotImplementedError(op)
    memories = [o for o in instruction.operands if hasattr(o, "base")]
    loads = len(memories) == 3
    count = len(lanes)
    if loads:
        target, source, barrier = memories
        shared, mapped = _array(get(target), count), _address(get, source, count)
        barriers = _array(get(barrier), count)
        coordinates = source.coords
    else:
        target, source = memories
        shared, mapped = _array(get(source), count), _address(get, target, count)
        coordinates = target.coords
    columns = [_array(get(c), count, np.uint32).view(np.int32) for c in coordinates]
    for i, lane in enumerate(lanes):
        tensor_map = cta.tensor_map(int(mapped[i]))
        place = [int(c[i]) for c in columns]
        warp = int(lane) // 32
        offset, _, _ = hopper.box_addresses(tensor_map, place)
        where = hopper.swizzle(int(shared[i]) + offset.ravel(), tensor_map.swizzle)
        if cta.proxies is not None:
            cta.proxies.where = str(instruction)
        if loads:
            if cta.proxies is not None:
                cta.proxies.async_write(warp, where, tensor_map.itemsize, int(barriers[i]))
            bytes_ = hopper.tma_load(cta.smem, int(shared[i]), tensor_map, place, cta.read)
            done = cta.mbarriers.complete_tx(int(barriers[i]), bytes_)
            cta.changes += 1
            if done and cta.proxies is not None:
                cta.proxies.mbarrier_completed(int(barriers[i]))
        else:
            if cta.proxies is not None:
                cta.proxies.async_read([warp], where, tensor_map.itemsize, wgmma=False)
            if "reduce" in parts:
                kind = next(p for p in parts if p in ("add", "min", "max", "and", "or", "xor"))
                hopper.tma_reduce(
                    cta.smem, int(shared[i]), tensor_map, place, cta.read, cta.write, kind
                )
            else:
                hopper.tma_store(cta.smem, int(shared[i]), tensor_map, place, cta.write)


def _address(get, memory, count: int) -> np.ndarray:
    return _array(get(memory), count)


def _nothing(cta, instruction, lanes, get, put):
    cta.note(instruction.op)


def _replace(cta, instruction, lanes, get, put):
    """tensormap.replace.tile.<field>.<space>.b1024.<type> [address], (ordinal,) value"""
    parts = instruction.op.split(".")
    if parts[2] != "tile":
        raise NotImplementedError(instruction.op)
    operands = instruction.operands
    value = get(operands[-1])
    for i, _, address in _each(cta, instruction, lanes, get):
        ordinal = operands[1].value if len(operands) == 3 else 0
        new = int(_array(value, len(lanes), np.uint64)[i])
        if "shared::cta" in parts:
            data = cta.smem[address : address + 128]
            hopper.tensormap_replace(data, parts[3], new, ordinal)
        else:
            where = address + np.arange(128, dtype=np.int64)
            data = cta.read(where).copy()
            hopper.tensormap_replace(data, parts[3], new, ordinal)
            cta.write(where, data)


def _copy_map(cta, instruction, lanes, get, put):
    """tensormap.cp_fenceproxy: 128 bytes from shared to global, by a warp."""
    op = instruction.op
    target, source = (_array(get(o), len(lanes)) for o in instruction.operands[:2])
    for warp in _whole(lanes, 32, op):
        to, start = _same(target[warp], op, "target"), _same(source[warp], op, "source")
        data = cta.smem[start : start + 128].copy()
        hopper.TensorMap.unpack(data).check()
        cta.write(to + np.arange(128, dtype=np.int64), data)


# -- the rest ---------------------------------------------------------------------------------------


def _fence_proxy(cta, instruction, lanes, get, put):
    if instruction.op.startswith("fence.proxy.async") and cta.proxies is not None:
        for warp in _warps(lanes):
            cta.proxies.fence_proxy_async(warp)


def _elect(cta, instruction, lanes, get, put):
    leader = np.empty(len(lanes), np.uint32)
    chosen = np.zeros(len(lanes), bool)
    for warp in _whole(lanes, 32, instruction.op):
        leader[warp], chosen[warp] = hopper.elect(np.ones(32, bool))
    pair = instruction.operands[0]
    put(pair.first, leader)
    put(pair.second, chosen)


def _stmatrix(cta, instruction, lanes, get, put):
    op = instruction.op
    if "m8n8" not in op or not op.endswith("b16"):
        raise NotImplementedError(op)
    memory, values = instruction.operands
    address = _array(get(memory), len(lanes))
    items = values.items if hasattr(values, "items") else (values,)
    registers = np.stack([_array(get(r), len(lanes), np.uint32) for r in items], 1)
    for warp in _whole(lanes, 32, op):
        touched = hopper.stmatrix(cta.smem, address[warp], registers[warp], "trans" in op)
        if cta.proxies is not None:
            cta.proxies.where = str(instruction)
            cta.proxies.generic_write(int(lanes[warp[0]]) // 32, touched)


_RUN = (
    ("wgmma.mma_async", _mma),
    ("wgmma.commit_group", _mma_commit),
    ("wgmma.wait_group", _mma_wait),
    ("wgmma.fence", _mma_fence),
    ("mbarrier.init", _mbarrier_init),
    ("mbarrier.inval", _mbarrier_inval),
    ("mbarrier.try_wait", _mbarrier_wait),
    ("mbarrier.test_wait", _mbarrier_wait),
    ("mbarrier.arrive", _mbarrier_arrive),
    ("mbarrier.expect_tx", _mbarrier_arrive),
    ("fence.proxy.", _fence_proxy),
    ("fence.mbarrier_init", _nothing),
    ("cp.async.bulk.tensor", _bulk_tensor),
    ("cp.reduce.async.bulk.tensor", _bulk_tensor),
    ("cp.async.bulk.commit_group", _nothing),
    ("cp.async.bulk.wait_group", _nothing),
    ("cp.async.bulk.prefetch.tensor", _nothing),
    ("elect.", _elect),
    ("stmatrix.", _stmatrix),
    ("setmaxnreg.", _nothing),
    ("tensormap.replace", _replace),
    ("tensormap.cp_fenceproxy", _copy_map),
    ("griddepcontrol", _nothing),
    ("prefetch.tensormap", _nothing),
)
