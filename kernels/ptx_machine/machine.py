"""Runs one launch: CTAs, as many at a time as `options.lanes` allows, until all have ended."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from .clocks import WARP, WGMMA, Clocks
from .counters import LaunchCounts
from .global_memory import PARAM_BASE, PARAM_STEP, GlobalMemory
from .group import Group
from .mbarrier import Mbarriers
from .options import Options
from .proxies import Proxies
from .report import ExecutionError, Report
from .scheduler import Scheduler
from .shared_memory import SharedMemory, smallest_access
from .syntax import Kernel
from .tma import Bulk
from .translate import Program
from .values import UNSIGNED


@dataclass
class Machine:
    """One launch of one kernel.

    While it runs, `clocks`, `shared` and the like are those of the CTAs in the slots: slot s holds
    CTA ``order[first + s]``.
    """

    program: Program
    grid: tuple[int, int, int]
    threads: int
    shared_size: int
    params: list[bytes]
    memory: GlobalMemory
    report: Report
    options: Options = field(default_factory=Options)
    counts: LaunchCounts | None = None

    def __post_init__(self) -> None:
        self.kernel: Kernel = self.program.kernel
        self.steps = 0  # blocks run by groups
        self.instructions = 0  # executed, by each thread; predicated off counts too
        self.first = 0
        if self.threads % WARP or not 0 < self.threads <= WARP * WGMMA:
            raise ExecutionError(f"{self.kernel.name}: a CTA of {self.threads} threads")
        self.memory.add_constants(self.kernel.data)
        self.granule = smallest_access(self.kernel)
        count = self.grid[0] * self.grid[1] * self.grid[2]
        self.order = np.arange(count)
        if self.options.ctas is not None:
            self.order = np.asarray(self.options.ctas(self.kernel.name, self.grid), np.int64)
        if self.options.shuffle_ctas:
            self.order = np.random.default_rng(self.options.seed).permutation(self.order)

    def run(self) -> None:
        """Run the CTAs.

        Raises:
            MemcheckError: an access outside every tensor, or misaligned.
            ExecutionError: a deadlock, or what the hardware leaves undefined.
        """
        rng = random.Random(self.options.seed)
        at_once = max(1, self.options.lanes // self.threads)
        with np.errstate(all="ignore"):
            for first in range(0, len(self.order), at_once):
                self._start(first, min(at_once, len(self.order) - first))
                Scheduler(self, rng).run(self._all_threads())
                self.bulk.finish()

    def _start(self, first: int, slots: int) -> None:
        self.first, self.slots = first, slots
        if self.counts is not None:
            self.counts.programs += slots
        self.clocks = Clocks(slots, self.threads // WARP)
        self.shared = SharedMemory(self.shared_size, self.granule, self.clocks, self.options.check)
        self.local = np.full(slots * self.threads * self.kernel.local_size, 0xFF, np.uint8)
        self.alive = np.full(slots * self.threads // WARP, WARP)  # threads not gone, by warp
        self.proxies = Proxies(self.kernel, self.shared, self.clocks)
        self.mbarriers = Mbarriers(self.shared)
        self.bulk = Bulk(self)
        # Groups of wgmma that each warp committed.
        self.products = np.zeros(len(self.clocks.epoch), np.int64)

    def _all_threads(self) -> Group:
        start = self.program.order.moved((), 0)
        group = Group(self, np.arange(self.slots * self.threads), 0, start)
        for name, reg in self.program.live.into[0].items():  # read before written: poison
            if reg.bits == 1:
                group.regs[name] = np.zeros(group.n, bool)
            else:
                group.regs[name] = ~np.zeros(group.n, UNSIGNED[reg.bits // 8])
        return group

    def parameter(self, address: int, count: int) -> bytes | None:
        """Bytes of a parameter at a generic address; None where there are not so many of one."""
        number, offset = divmod(address - PARAM_BASE, PARAM_STEP)
        if not 0 <= number < len(self.params) or offset + count > len(self.params[number]):
            return None
        return self.params[number][offset : offset + count]

    def generic(self, address: int, count: int) -> np.ndarray:
        """Bytes at a generic address: of a parameter, or of global memory."""
        if (raw := self.parameter(address, count)) is not None:
            return np.frombuffer(raw, np.uint8)
        region = self.memory.region_of(address, address + count)
        return region.data[address - region.base : address - region.base + count]

    def count(self, instructions: int) -> None:
        """A block of so many instructions ran, all threads together."""
        self.steps += 1
        self.instructions += instructions
        if self.steps > self.options.max_steps:
            raise ExecutionError(f"{self.kernel.name}: {self.steps} blocks without an end")
