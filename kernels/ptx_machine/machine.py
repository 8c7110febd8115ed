"""Run translated kernels: groups of threads, barriers, asynchronous copies, atomics.

All threads of several CTAs run as one *group*, one numpy operation per instruction. Where they take
different ways the group is cut in two, and groups that meet at the same block become one again: the
group at the lowest block runs first. Registers are held only where they are live.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .mbarrier import Mbarriers
from .memory import (
    PARAM_BASE,
    PARAM_STEP,
    Clocks,
    ExecutionError,
    GlobalMemory,
    Report,
    SharedMemory,
)
from .proxies import Proxies
from .syntax import Instruction, Kernel
from .tma import Bulk
from .translate import Program
from .values import UNSIGNED
from .wgmma import InFlight

WARP = 32


@dataclass
class Options:
    """How to run; see the README."""

    check: bool = True  # initcheck and racecheck of shared memory
    check_global: bool = True  # racecheck of global memory
    lanes: int = 2048  # threads that run as one numpy operation, whole CTAs
    shuffle_warps: bool = False  # warps one by one, in a random order, from barrier to barrier
    shuffle_ctas: bool = False
    seed: int = 0
    max_steps: int = 50_000_000  # blocks run for one launch
    ctas: Callable[[str, tuple[int, int, int]], Sequence[int]] | None = None
    """Which CTAs to run, given the kernel's name and grid; all if None."""


@dataclass
class Copy:
    """An issued cp.async: data read, not yet visible."""

    lanes: np.ndarray  # thread numbers over all slots
    where: np.ndarray  # byte positions in shared memory
    data: np.ndarray  # [n, bytes] uint8
    instruction: Instruction

    def of(self, lanes: np.ndarray) -> Copy | None:
        keep = np.isin(self.lanes, lanes)
        if not keep.any():
            return None
        return Copy(self.lanes[keep], self.where[keep], self.data[keep], self.instruction)


class Group:
    """Threads at the same place of the program. What translated code calls `g`."""

    def __init__(self, machine: Machine, lanes: np.ndarray, block: int) -> None:
        self.machine, self.kernel, self.report = machine, machine.kernel, machine.report
        self.block = block
        self.regs: dict[str, np.ndarray] = {}
        self.open: list[Copy] = []  # issued, in no group yet
        self.groups: list[list[Copy]] = []  # committed, oldest first
        self.barrier = (0, 0)  # where it waits: number, threads (0 for all)
        self.blocked: np.ndarray | None = None  # threads that an mbarrier keeps
        self.waits_for: np.ndarray | None = None  # byte positions of those mbarriers
        self.in_flight = InFlight()  # products of wgmma
        self.take(lanes)

    def take(self, lanes: np.ndarray) -> None:
        """Be these threads, numbered over all slots in ascending order."""
        machine = self.machine
        self.lanes = lanes
        self.n = len(lanes)
        self.warp = lanes // WARP  # over all slots
        self.slot = lanes // machine.threads
        self.thread = lanes % machine.threads
        self.cta = (
            machine.first_cta + self.slot
            if machine.order is None
            else (machine.order[machine.first_cta + self.slot])
        )
        self.base = self.slot.astype(np.int64) * machine.shared.stride
        self._whole: bool | None = None
        self._special: dict[str, np.ndarray] = {}

    def who(self, lane: int) -> str:
        x, y, z = self.machine.grid
        c = int(self.cta[lane])
        thread = int(self.thread[lane])
        return (
            f"CTA ({c % x}, {c // x % y}, {c // (x * y)}), warp {thread // WARP}, "
            f"lane {thread % WARP}"
        )

    # Called by translated code

    def full(self, value) -> np.ndarray:
        return np.full(self.n, value)

    def param(self, index: int, offset: int, kind) -> np.ndarray:
        raw = self.machine.params[index][offset : offset + np.dtype(kind).itemsize]
        return np.full(self.n, np.frombuffer(raw, kind)[0])

    def special(self, name: str) -> np.ndarray:
        found = self._special.get(name)
        if found is None:
            found = self._special[name] = self._make_special(name)
        return found

    def _make_special(self, name: str) -> np.ndarray:
        x, y, _ = self.machine.grid
        made = {
            "%tid.x": lambda: self.thread,
            "%tid.y": lambda: self.thread * 0,
            "%tid.z": lambda: self.thread * 0,
            "%ntid.x": lambda: self.thread * 0 + self.machine.threads,
            "%laneid": lambda: self.thread % WARP,
            "%warpid": lambda: self.thread // WARP,
            "%ctaid.x": lambda: self.cta % x,
            "%ctaid.y": lambda: self.cta // x % y,
            "%ctaid.z": lambda: self.cta // (x * y),
            **{
                f"%nctaid.{axis}": (lambda k: lambda: self.thread * 0 + self.machine.grid[k])(k)
                for k, axis in enumerate("xyz")
            },
        }
        if name not in made:
            raise NotImplementedError(f"{self.kernel.name}: special register {name}")
        return made[name]().astype(np.uint32)

    def whole_warps(self, instruction: Instruction) -> None:
        """Raise unless every warp of the group is complete: what a collective needs."""
        if self._whole is None:
            full = self.n % WARP == 0 and (self.lanes[::WARP] % WARP == 0).all()
            self._whole = bool(full and (self.warp[::WARP] == self.warp[WARP - 1 :: WARP]).all())
        if not self._whole:
            raise ExecutionError(
                f"{self.kernel.name}: {instruction}: some threads of a warp are elsewhere"
            )

    # Global memory

    def load_global(self, instruction, address, width, items, guard):
        lanes = self._active(guard)
        out = [np.zeros(self.n, UNSIGNED[width]) for _ in range(items)]
        if lanes is not None:
            if not len(lanes):
                return out
            address = address[lanes]
        memory = self.machine.memory
        total = width * items
        region, offset = memory.locate(self, instruction, address, lanes, total)
        if memory.check:
            memory.note(self, instruction, region, offset, total, lanes, write=False)
        view, first = region.views[width], offset // width
        for k in range(items):
            got = view[first + k]
            if lanes is None:
                out[k] = got
            else:
                out[k][lanes] = got
        return out

    def store_global(self, instruction, address, width, data, guard) -> None:
        lanes = self._active(guard)
        if lanes is not None:
            if not len(lanes):
                return
            address, data = address[lanes], [d[lanes] for d in data]
        memory = self.machine.memory
        total = width * len(data)
        region, offset = memory.locate(self, instruction, address, lanes, total)
        view, first = region.views[width], offset // width
        if memory.check:
            same = np.ones(len(first), bool)
            for k, values in enumerate(data):
                same &= view[first + k] == values
            memory.note(self, instruction, region, offset, total, lanes, write=True, same=same)
        for k, values in enumerate(data):
            view[first + k] = values

    def atomic(self, instruction, name, address, kind, data, guard, result):
        lanes = self._active(guard)
        width = np.dtype(kind).itemsize
        out = [np.zeros(self.n, kind) for _ in data]
        if lanes is not None:
            if not len(lanes):
                return out
            address, data = address[lanes], [d[lanes] for d in data]
        region, offset = self.machine.memory.locate(
            self, instruction, address, lanes, width * len(data)
        )
        view, first = region.views[width].view(kind), offset // width
        for k, values in enumerate(data):
            at = first + k
            old = view[at].copy()
            if name == "add":
                if result and len(np.unique(at)) != len(at):
                    for j, cell in enumerate(at):
                        old[j] = view[cell]
                        view[cell] += values[j]
                else:
                    np.add.at(view, at, values)
            elif name in ("max", "min"):
                function = np.maximum if name == "max" else np.minimum
                function.at(view, at, values)
            else:
                view[at] = values
            if lanes is None:
                out[k] = old
            else:
                out[k][lanes] = old
        return out

    def _active(self, guard) -> np.ndarray | None:
        """Threads of the group that take part; None for all."""
        if guard is None or guard.all():
            return None
        return np.flatnonzero(guard)

    # Shared memory

    def load_shared(self, instruction, address, width, items, guard):
        lanes = self._active(guard)
        out = [np.zeros(self.n, UNSIGNED[width]) for _ in range(items)]
        base, warp = self.base, self.warp
        if lanes is not None:
            if not len(lanes):
                return out
            address, base, warp = address[lanes], base[lanes], warp[lanes]
        shared = self.machine.shared
        total = width * items
        where = shared.locate(self, instruction, address, base, total, total)
        shared.note_read(self, instruction, where, warp, total)
        view, first = shared.views[width], where // width
        for k in range(items):
            if lanes is None:
                out[k] = view[first + k]
            else:
                out[k][lanes] = view[first + k]
        return out

    def store_shared(self, instruction, address, width, data, guard) -> None:
        lanes = self._active(guard)
        base, warp = self.base, self.warp
        if lanes is not None:
            if not len(lanes):
                return
            address, base, warp = address[lanes], base[lanes], warp[lanes]
            data = [d[lanes] for d in data]
        shared = self.machine.shared
        total = width * len(data)
        where = shared.locate(self, instruction, address, base, total, total)
        shared.note_write(self, instruction, where, warp, total, np.stack(data, axis=-1))
        view, first = shared.views[width], where // width
        for k, values in enumerate(data):
            view[first + k] = values

    def load_matrix(self, instruction, address, count, transposed):
        """ldmatrix: the threads 8j..8j+7 of a warp give the rows of matrix j."""
        self.whole_warps(instruction)
        shared = self.machine.shared
        given = np.arange(self.n).reshape(-1, WARP)[:, : 8 * count].ravel()
        where = shared.locate(self, instruction, address[given], self.base[given], 16, 16)
        shared.note_read(self, instruction, where, self.warp[given], 16)
        rows = shared.views[2][where[:, None] // 2 + np.arange(8)].reshape(-1, count, 8, 8)
        if transposed:
            rows = np.ascontiguousarray(rows.swapaxes(2, 3))
        words = rows.view(np.uint32).reshape(-1, count, WARP)
        return [np.ascontiguousarray(words[:, j]).ravel() for j in range(count)]

    # Asynchronous copies

    def copy_async(self, instruction, target, source, size, read, guard) -> None:
        lanes = self._active(guard)
        chosen = np.arange(self.n) if lanes is None else lanes
        if not len(chosen):
            return
        shared, memory = self.machine.shared, self.machine.memory
        base, warp = self.base[chosen], self.warp[chosen]
        where = shared.locate(self, instruction, target[chosen], base, size, size)
        data = np.zeros((len(chosen), size), np.uint8)
        wanted = np.full(len(chosen), size) if read is None else read[chosen].astype(np.int64)
        if ((wanted != 0) & (wanted != size)).any():
            raise NotImplementedError(f"{self.kernel.name}: {instruction}: reads part of its bytes")
        full = np.flatnonzero(wanted)
        if len(full):
            picked = chosen[full]
            region, offset = memory.locate(self, instruction, source[picked], picked, size)
            if memory.check:
                memory.note(self, instruction, region, offset, size, picked, write=False)
            words = region.views[4][(offset // 4)[:, None] + np.arange(size // 4)]
            data.view(np.uint32)[full] = words
        shared.note_write(self, instruction, where, warp, size, data, in_flight=True)
        self.open.append(Copy(self.lanes[chosen], where, data, instruction))

    def async_commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def async_wait(self, newest: int) -> None:
        """Everything but the `newest` newest groups has landed."""
        done = self.groups[: len(self.groups) - newest] if newest else self.groups
        self.groups = self.groups[len(done) :]
        for copies in done:
            self._land(copies)

    def async_wait_all(self) -> None:
        self.async_commit()
        self.async_wait(0)

    def _land(self, copies: list[Copy]) -> None:
        shared = self.machine.shared
        for copy in copies:
            width = copy.data.shape[1]
            warp = copy.lanes // WARP
            shared.landed(copy.where, warp, width)
            at = (copy.where // 4)[:, None] + np.arange(width // 4)
            shared.views[4][at] = copy.data.view(np.uint32)

    # Across the threads of a warp

    def shuffle(self, instruction, mode, a, b, c):
        self.whole_warps(instruction)
        lane = np.arange(WARP)
        b = (b & np.uint32(31)).astype(np.int64).reshape(-1, WARP)
        c = c.astype(np.int64).reshape(-1, WARP)
        clamp, segment = c & 31, (c >> 8) & 31
        top = (lane & segment) | (clamp & ~segment)
        if mode == "bfly":
            source = lane ^ b
            valid = source <= top
        elif mode == "idx":
            source = (lane & segment) | (b & ~segment & 31)
            valid = source <= top
        elif mode == "down":
            source = lane + b
            valid = source <= top
        elif mode == "up":
            source = lane - b
            valid = source >= top
        else:
            raise NotImplementedError(f"{self.kernel.name}: {instruction}")
        source = np.where(valid, source, lane)
        moved = np.take_along_axis(a.reshape(-1, WARP), source, axis=1)
        return moved.ravel(), valid.ravel()

    # Cutting and joining

    def part(self, keep: np.ndarray, block: int) -> Group:
        """The threads where `keep` holds, as a group of their own at `block`."""
        other = Group(self.machine, self.lanes[keep], block)
        live = self.machine.program.live_in[block]
        other.regs = {name: self.regs[name][keep] for name in live}
        other.open = [c for c in (copy.of(other.lanes) for copy in self.open) if c]
        for copies in self.groups:
            other.groups.append([c for c in (copy.of(other.lanes) for copy in copies) if c])
        if self.in_flight:
            other.in_flight = self.in_flight.part(keep)
        return other

    def join(self, other: Group) -> Group:
        """Both groups, which are at the same block, as one."""
        lanes = np.concatenate((self.lanes, other.lanes))
        order = np.argsort(lanes, kind="stable")
        joined = Group(self.machine, lanes[order], self.block)
        for name, reg in self.machine.program.live_in[self.block].items():
            a, b = self.regs[name], other.regs[name]
            if reg.bits != 1:
                kind = UNSIGNED[reg.bits // 8]
                a, b = a.view(kind), b.view(kind)
            joined.regs[name] = np.concatenate((a, b))[order]
        joined.open = self.open + other.open
        longest = max(len(self.groups), len(other.groups))
        for k in range(longest, 0, -1):  # counted from the newest
            mine = self.groups[-k] if k <= len(self.groups) else []
            theirs = other.groups[-k] if k <= len(other.groups) else []
            joined.groups.append(mine + theirs)
        if self.in_flight or other.in_flight:
            joined.in_flight = self.in_flight.join(other.in_flight, (self.n, other.n), order)
        return joined


@dataclass
class Machine:
    """One launch of one kernel."""

    program: Program
    grid: tuple[int, int, int]
    threads: int
    shared_size: int
    params: list[bytes]
    memory: GlobalMemory
    report: Report
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        self.kernel: Kernel = self.program.kernel
        self.steps = 0
        self.random = random.Random(self.options.seed)
        if self.threads % WARP:
            raise ExecutionError(f"{self.threads} threads are no whole warps")
        self.granule = _smallest_access(self.kernel)
        self.order = None
        if self.options.shuffle_ctas:
            count = self.grid[0] * self.grid[1] * self.grid[2]
            self.order = np.random.default_rng(self.options.seed).permutation(count)

    def run(self) -> None:
        """Run the CTAs, as many at a time as `options.lanes` allows."""
        count = self.grid[0] * self.grid[1] * self.grid[2]
        if self.options.ctas is not None:
            self.order = np.asarray(self.options.ctas(self.kernel.name, self.grid), np.int64)
            count = len(self.order)
        at_once = max(1, self.options.lanes // self.threads)
        with np.errstate(all="ignore"):
            for first in range(0, count, at_once):
                self._run_ctas(first, min(at_once, count - first))

    def _run_ctas(self, first: int, slots: int) -> None:
        self.first_cta = first
        warps = self.threads // WARP
        self.clocks = Clocks(slots, warps)
        self.shared = SharedMemory(
            slots, self.shared_size, warps, self.granule, self.clocks, self.options.check
        )
        self.alive = np.full(slots, self.threads)
        self.proxies = Proxies(self.kernel, self.shared, self.clocks)
        self.mbarriers = Mbarriers(self.shared)
        self.bulk = Bulk(self)
        self.products = np.zeros(slots * warps, np.int64)  # groups of wgmma that warps committed
        group = Group(self, np.arange(slots * self.threads), 0)
        for name, reg in self.program.live_in[0].items():  # read before written: poison
            kind = np.bool_ if reg.bits == 1 else UNSIGNED[reg.bits // 8]
            group.regs[name] = np.full(group.n, 0 if reg.bits == 1 else np.iinfo(kind).max, kind)
        self.waiting: list[Group] = []
        self.ready: list[Group] = []
        self.stalled: list[tuple[Group, int]] = []  # behind an mbarrier; state when they tried
        self._add(group)
        while self.ready or self.waiting or self.stalled:
            if not self.ready:
                self._wake()
            self._step(self._next())

    def _wake(self) -> None:
        """Let those try again whose mbarriers may have changed."""
        stalled, self.stalled = self.stalled, []
        for group, changes in stalled:
            if self.mbarriers.changes != changes:
                self._add(group)
            else:
                self.stalled.append((group, changes))
        if not self.ready:
            self._deadlock()

    def _add(self, group: Group) -> None:
        if not self.options.shuffle_warps:
            for k, other in enumerate(self.ready):
                if other.block == group.block:
                    self.ready[k] = other.join(group)
                    return
        elif len(np.unique(group.warp)) > 1:
            for warp in np.unique(group.warp):
                self.ready.append(group.part(group.warp == warp, group.block))
            return
        self.ready.append(group)

    def _next(self) -> Group:
        if self.options.shuffle_warps:
            k = self.random.randrange(len(self.ready))
        else:
            k = min(range(len(self.ready)), key=lambda i: self.ready[i].block)
        return self.ready.pop(k)

    def _step(self, group: Group) -> None:
        """Run one block and see where its threads go."""
        self.steps += 1
        if self.steps > self.options.max_steps:
            raise ExecutionError(f"{self.kernel.name}: {self.steps} blocks without an end")
        number = group.block
        block = self.kernel.blocks[number]
        before = group.regs
        taken = self.program.functions[number](group)
        if group.blocked is not None:
            blocked, group.blocked = group.blocked, None
            after, group.regs = group.regs, before
            stalled = group.part(blocked, number)
            stalled.waits_for = group.waits_for
            self.stalled.append((stalled, self.mbarriers.changes))
            if blocked.all():
                return
            group.regs = after
            group = group.part(~blocked, number + 1)
        last = block.instructions[-1] if block.instructions else None
        base = last.parts[0] if last else ""
        if base == "bra":
            target = self.program.successors[number][0]
            if last.guard is None or taken.all():
                self._goto(group, target)
            elif not taken.any():
                self._goto(group, number + 1)
            else:
                self._add(group.part(taken, target))
                self._add(group.part(~taken, number + 1))
        elif base == "brx":
            for index in np.unique(taken):
                target = self.program.successors[number][int(index)]
                self._add(group.part(taken == index, target))
        elif base in ("ret", "exit"):
            gone = np.ones(group.n, bool) if last.guard is None else taken
            self.bulk.end(group, gone)
            np.subtract.at(self.alive, group.slot[gone], 1)
            if not gone.all():
                self._add(group.part(~gone, number + 1))
            self._release()
        elif base in ("bar", "barrier") and "warp" not in last.parts:
            self._barrier(group, last)
        else:
            self._goto(group, number + 1)

    def _goto(self, group: Group, block: int) -> None:
        group.block = block
        self._add(group)

    def _barrier(self, group: Group, last: Instruction) -> None:
        """`bar.sync id` waits for all of the CTA, ``bar.sync id, count`` for so many threads."""
        numbers = [getattr(o, "value", None) for o in last.operands]
        if None in numbers or len(numbers) > 2:
            raise NotImplementedError(f"{self.kernel.name}: {last}: numbers in registers")
        group.block += 1
        group.barrier = (numbers[0], numbers[1] if len(numbers) == 2 else 0)
        self.waiting.append(group)
        self._release()

    def _release(self) -> None:
        """Let those threads go on whose barrier is complete."""
        for number in {g.barrier[0] for g in self.waiting}:
            here = [g for g in self.waiting if g.barrier[0] == number]
            if len({g.barrier[1] for g in here}) > 1:
                raise ExecutionError(f"{self.kernel.name}: barrier {number} with two counts")
            count = here[0].barrier[1]
            arrived = np.zeros_like(self.alive)
            for group in here:
                np.add.at(arrived, group.slot, 1)
            needed = np.full_like(self.alive, count) if count else self.alive
            if (arrived > needed).any():
                raise ExecutionError(f"{self.kernel.name}: too many threads at barrier {number}")
            free = (arrived == needed) & (arrived > 0)
            if free.any():
                self._meet(here, free)

    def _meet(self, groups: list[Group], free: np.ndarray) -> None:
        warps = np.unique(np.concatenate([g.warp[free[g.slot]] for g in groups]))
        per_cta = self.threads // WARP
        if len(warps) == per_cta * int(free.sum()):
            self.clocks.full_barrier(np.flatnonzero(free))
        else:
            self.clocks.barrier(warps, warps // per_cta)
        for group in groups:
            self.waiting.remove(group)
            go = free[group.slot]
            if go.all():
                self._add(group)
                continue
            rest = group
            if go.any():
                self._add(group.part(go, group.block))
                rest = group.part(~go, group.block)
                rest.barrier = group.barrier
            self.waiting.append(rest)

    def _deadlock(self) -> None:
        places = [
            f"{g.n} threads before {self.kernel.blocks[g.block].instructions[0]}"
            for g in [*self.waiting, *(g for g, _ in self.stalled)]
        ]
        for where in {int(w) for g, _ in self.stalled for w in g.waits_for}:
            parity, arrivals, bytes_ = self.mbarriers.pending(where)
            places.append(
                f"the mbarrier at {where % self.shared.stride:#x} is in a phase of parity {parity}, "
                f"{arrivals} arrivals and {bytes_} bytes pending"
            )
        raise ExecutionError(f"{self.kernel.name}: nobody can go on: {'; '.join(places)}")

    def generic(self, address: int, count: int) -> np.ndarray:
        """Bytes at a generic address: of a parameter, or of global memory."""
        number, offset = divmod(address - PARAM_BASE, PARAM_STEP)
        if 0 <= number < len(self.params):
            return np.frombuffer(self.params[number], np.uint8)[offset : offset + count]
        region = self.memory.region_of(address, address + count)
        return region.data[address - region.base : address - region.base + count]


def _smallest_access(kernel: Kernel) -> int:
    """Bytes of the smallest piece of shared memory that an instruction touches, at most 4."""
    smallest = 4
    for i in kernel.instructions:
        parts = i.parts
        if parts[0] in ("ld", "st") and "shared" in parts:
            smallest = min(smallest, int(parts[-1][1:]) // 8)
    return smallest
