"""The instructions that sm_90 adds, for this executor: hands them to hopper_ops.py, CTA by CTA."""

from __future__ import annotations

import numpy as np

from . import hopper, hopper_ops
from .syntax import Imm, Mem, Reg, Sym, Vec
from .values import UNSIGNED

handles = hopper_ops.handles

# Where parameters lie in the generic address space (cvta.param): one every PARAM_STEP bytes.
PARAM_BASE = 0x7D00_0000_0000
PARAM_STEP = 256


class Hopper:
    """What the CTAs of a machine that run together keep for these instructions."""

    def __init__(self, machine, proxies: bool) -> None:
        self.machine = machine
        self.ctas: dict[int, hopper_ops.Cta] = {}
        self.proxies = proxies
        self.arrived: dict[tuple[int, int], np.ndarray] = {}  # clocks that mbarriers carry

    def cta(self, slot: int) -> hopper_ops.Cta:
        if slot not in self.ctas:
            machine = self.machine
            stride = machine.shared.stride
            smem = machine.shared.bytes[slot * stride : (slot + 1) * stride]
            proxies = hopper.Proxies(stride, machine.threads // 32) if self.proxies else None
            self.ctas[slot] = hopper_ops.Cta(
                smem, machine.threads, self._read, self._write, proxies
            )
        return self.ctas[slot]

    def changes(self, slots: np.ndarray) -> int:
        """A number that grows with everything that can end a wait of these CTAs."""
        return sum(self.cta(int(s)).changes for s in np.unique(slots))

    def execute(self, group, instruction, guard, registers: dict[str, np.ndarray]):
        """(new values of the registers, threads that have to wait or None)."""
        registers = dict(registers)
        fresh: set[str] = set()
        blocked = None
        active = np.ones(group.n, bool) if guard is None else guard
        for slot in np.unique(group.slot[active]):
            at = np.flatnonzero(active & (group.slot == slot))
            cta = self.cta(int(slot))

            def get(operand, at=at):
                return self._value(group, operand, registers, at)

            def put(register, values, at=at):
                if not isinstance(register, Reg):
                    return  # the sink "_"
                if register.name not in fresh:
                    fresh.add(register.name)
                    old = registers.get(register.name)
                    kind = np.bool_ if register.bits == 1 else UNSIGNED[register.bits // 8]
                    new = np.zeros(group.n, kind) if old is None else old.view(kind).copy()
                    registers[register.name] = new
                registers[register.name][at] = values

            self._before(group, instruction, get, at)
            result = hopper_ops.execute(cta, instruction, group.thread[at], get, put)
            self._after(group, instruction, get, at, int(slot), cta)
            if instruction.op.startswith("mbarrier."):
                ready = at if result is None else at[result[1]]
                self._order(group, instruction, get, at, ready, int(slot))
            if result is not None:
                if blocked is None:
                    blocked = np.zeros(group.n, bool)
                blocked[at[~result[1]]] = True
        return registers, blocked

    def generic(self, group, instruction, where, warp, width: int, write: bool) -> None:
        """Tell the order checker of the CTAs about an ordinary access to shared memory."""
        if not self.proxies:
            return
        stride, warps = self.machine.shared.stride, self.machine.threads // 32
        for w in np.unique(warp):
            proxies = self.cta(int(w) // warps).proxies
            proxies.where = str(instruction)
            note = proxies.generic_write if write else proxies.generic_read
            note(int(w) % warps, where[warp == w] % stride, width)

    def barrier(self, warps: np.ndarray) -> None:
        """These warps, numbered over all slots, met at a barrier of their CTA."""
        if self.proxies:
            each = self.machine.threads // 32
            for slot in np.unique(warps // each):
                met = warps[warps // each == slot] % each
                self.cta(int(slot)).proxies.bar_sync(met)

    def report(self) -> None:
        """Move what the order checkers found to the report of the machine."""
        for cta in self.ctas.values():
            for found in cta.proxies.reports if cta.proxies else ():
                self.machine.report.add(
                    f"proxy: {found.kind}", self.machine.kernel.name, found.where, str(found)
                )

    def _value(self, group, operand, registers, at):
        if isinstance(operand, Imm):
            return np.int64(operand.value) if operand.value < 1 << 63 else operand.value
        if isinstance(operand, Reg):
            value = registers[operand.name][at]
            return value if operand.bits == 1 else value.view(UNSIGNED[operand.bits // 8])
        if isinstance(operand, Mem):
            return self._value(group, operand.base, registers, at).astype(np.int64) + operand.offset
        if isinstance(operand, Sym):
            if operand.name in group.kernel.shared:
                return np.full(len(at), group.kernel.shared[operand.name], np.int64)
            names = [p.name for p in group.kernel.params]
            return np.full(len(at), PARAM_BASE + PARAM_STEP * names.index(operand.name), np.int64)
        raise NotImplementedError(f"{group.kernel.name}: operand {operand}")

    def _before(self, group, instruction, get, at) -> None:
        """Check the shared-memory writes that only this executor's checker follows."""
        if not instruction.op.startswith("stmatrix"):
            return
        memory, values = instruction.operands
        count = len(values.items) if isinstance(values, Vec) else 1
        rows = np.arange(len(at)).reshape(-1, 32)[:, : 8 * count].ravel()
        shared = self.machine.shared
        address = get(memory)[rows]
        where = shared.locate(group, instruction, address, group.base[at][rows], 16, 16)
        shared.note_write(group, instruction, where, group.warp[at][rows], 16, None)

    def _after(self, group, instruction, get, at, slot: int, cta) -> None:
        memories = [o for o in instruction.operands if isinstance(o, Mem)]
        if instruction.op.startswith("cp.async.bulk.tensor") and len(memories) == 3:
            target, source, _ = memories
            for start, mapped in zip(get(target), get(source), strict=True):
                size = cta.tensor_map(int(mapped)).box_bytes
                self.machine.shared.filled(slot, int(start), size)

    def _order(self, group, instruction, get, at, ready, slot: int) -> None:
        """What arrives at an mbarrier happened before what its waiters do then."""
        clocks = self.machine.clocks
        memory = next(o for o in instruction.operands if isinstance(o, Mem))
        address = get(memory)
        for place in np.unique(address):
            key = (slot, int(place))
            if "arrive" in instruction.op:
                warps = np.unique(group.warp[at[address == place]])
                known = clocks.seen[warps].copy()
                known[np.arange(len(warps)), warps % clocks.warps] = clocks.epoch[warps]
                old = self.arrived.get(key, 0)
                self.arrived[key] = np.maximum(old, known.max(axis=0))
                clocks.epoch[warps] += 1
            elif "wait" in instruction.op and key in self.arrived:
                mine = np.isin(at, ready) & (address == place)
                for warp in np.unique(group.warp[at[mine]]):
                    np.maximum(clocks.seen[warp], self.arrived[key], out=clocks.seen[warp])

    # Global memory and parameters, byte by byte

    def _read(self, addresses: np.ndarray) -> np.ndarray:
        data, offset = self._find(addresses)
        return data[offset]

    def _write(self, addresses: np.ndarray, values: np.ndarray) -> None:
        data, offset = self._find(addresses)
        data[offset] = values

    def _find(self, addresses: np.ndarray):
        addresses = np.asarray(addresses, np.int64)
        if not addresses.size:
            return np.zeros(0, np.uint8), addresses
        first = int(addresses.flat[0])
        number = (first - PARAM_BASE) // PARAM_STEP
        if 0 <= number < len(self.machine.params):
            data = np.frombuffer(self.machine.params[number], np.uint8)
            return data, addresses - (PARAM_BASE + PARAM_STEP * number)
        return self.machine.memory.bytes_at(addresses)
