"""The order of the async proxy: wgmma and TMA against ordinary accesses to shared memory.

Sources: PTX ISA, "Memory Consistency Model" (proxies, "proxy-preserved base causality order"),
"Async proxy" and "membar/fence" (fence.proxy.async). wgmma.mma_async and cp{.reduce}.async.bulk
work in the async proxy, everything else, cp.async without bulk too, in the generic one.

What an instruction leaves running is an *agent* of the vector clocks in ``clocks.py``, beside the
warps, with an epoch of its own that a wait makes visible and barriers carry on:

    WGMMA + w       products of warp w; its epochs are commit groups; wgmma.wait_group
    BULK + w        bulk stores of warp w, which read shared memory; cp.async.bulk.wait_group
    MBARRIER + k    bulk loads that report to the k-th mbarrier; its epochs are phases; try_wait

So a TMA load is an ordinary write by its mbarrier: who touches the bytes without having seen the
end of the phase is reported, by whatever way he could have seen it. Besides the clocks ``seen``
there are ``fenced``: ``fenced[w, v]`` is the newest epoch of warp v whose generic accesses are
ordered, through a fence.proxy.async on the way, before what the async proxy does for warp w. A
product or a store that reads what is seen but not fenced lacks a fence. A fence by part of a warp
orders of that warp what was before its last barrier, bar.warp.sync too, and nothing since: whether
the fencing threads themselves wrote it is not known.

Not followed: fences between an ordinary access and a later TMA load into the same bytes (compilers,
NVIDIA's own CUTLASS too, rely on the barrier alone there), and the proxies of global memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .clocks import AGENT, AGENT_BITS, BULK, IN_FLIGHT, MBARRIER, WARP, WGMMA, Clocks
from .shared_memory import SharedMemory

if TYPE_CHECKING:
    from .group import Group
    from .syntax import Instruction, Kernel

CP_ASYNC_NOTE = "no fence.proxy.async between cp.async and wgmma (Triton 3.6, fixed in 3.7)"


class Proxies:
    """What the CTAs that run together have in flight in the async proxy."""

    def __init__(self, kernel: Kernel, shared: SharedMemory, clocks: Clocks) -> None:
        self.shared, self.clocks = shared, clocks
        self.warps = clocks.warps
        ops = {i.op for i in kernel.instructions}
        wgmma = any(op.startswith("wgmma.mma_async") for op in ops)
        stores = any(".bulk_group" in op for op in ops)
        self.groups = self.warps // 4 if wgmma else 0
        self.checks = shared.check
        self.watches = shared.check and (wgmma or stores)
        self.mbarriers: dict[int, int] = {}  # address in shared memory -> agent
        shared.proxies = self
        if self.watches:
            columns = self.groups + (self.warps if stores else 0)
            # [granules, warpgroups and then warps]: the newest epoch that reads the bytes.
            self.taken = np.zeros((len(shared.writer), columns), np.int64)
            self.copied = np.zeros(len(shared.writer), bool)  # written by cp.async

    def limits(self) -> np.ndarray:
        """[warps, columns of `taken`]: the epochs that the warps know to be over."""
        seen = self.clocks.seen
        parts = []
        if self.groups:  # over for all four warps
            mine = seen[:, WGMMA : WGMMA + 4 * self.groups]
            parts.append(mine.reshape(len(seen), self.groups, 4).min(-1))
        if self.taken.shape[1] > self.groups:
            parts.append(seen[:, BULK : BULK + self.warps])
        return np.concatenate(parts, axis=1)

    # Ordinary accesses

    def before_write(
        self,
        g: Group,
        instruction: Instruction,
        at: np.ndarray,
        where: np.ndarray,
        warp: np.ndarray,
    ) -> None:
        """Check an ordinary write of granules `at` [n, granules] by these warps [n]."""
        if not self.watches:
            return
        busy = self.taken[at] > self.limits()[warp][:, None, :]
        if busy.any():
            lane, k, column = (int(i[0]) for i in np.nonzero(busy))
            byte = int(where[lane]) % self.shared.stride + k * self.shared.granule
            g.report.add(
                "in flight", g.kernel.name, instruction,
                f"overwrites what {self.reader(column)} may still read: shared byte {byte}; "
                f"warp {int(warp[lane]) % self.warps}",
                int(busy.any(axis=(1, 2)).sum()),
            )  # fmt: skip
        self.copied[at] = False

    def landed(self, at: np.ndarray) -> None:
        """cp.async has written granules `at`."""
        if self.watches:
            self.copied[at] = True

    # Products

    def products_read(
        self, g: Group, instruction: Instruction, where: np.ndarray, unit: int
    ) -> None:
        """Each unit of so many threads reads 16-byte chunks [units, n] until its wait."""
        if not self.watches:
            return
        warps = g.warp.reshape(len(where), unit)[:, ::WARP]
        at = self.shared.granules(where.ravel(), 16).reshape(len(where), -1)
        self._read(g, instruction, at, warps, np.arange(0, g.n, unit), "a product")
        group = warps[:, :1] % self.warps // 4
        self.taken[at, group] = g.machine.products[warps[:, :1]] + 1

    def products_done(self, warps: np.ndarray, newest: np.ndarray) -> None:
        """These warps waited for their products up to these groups."""
        column = WGMMA + warps % self.warps
        seen = self.clocks.seen
        seen[warps, column] = np.maximum(seen[warps, column], newest)

    def _read(
        self, g: Group, instruction: Instruction, at: np.ndarray, warps: np.ndarray,
        lanes: np.ndarray, what: str,
    ) -> None:  # fmt: skip
        """Check reads of granules [n, any] by the async proxy for warps [n, warps of a unit].

        All warps of a unit have to see what it reads. `lanes` are the units' first threads.
        """
        tags = self.shared.writer[at]
        if not tags.all():
            self._report(g, instruction, "uninitialised", at, tags == 0, lanes, "never written")
        seen = self.clocks.seen[warps].min(1)
        bound = seen.copy()
        bound[:, :WGMMA] = self.clocks.fenced[warps].min(1)
        row, agent, epoch = np.arange(len(at))[:, None], tags & AGENT, tags >> AGENT_BITS
        late = epoch > bound[row, agent]
        if not late.any():
            return
        unseen = late & (epoch > seen[row, agent])
        if unseen.any():
            kind, deed = self.writer(int(tags[unseen][0]))
            self._report(g, instruction, kind, at, unseen, lanes, f"{what} reads what {deed}")
        bare = late & ~unseen
        copied = bare & self.copied[at] & (what == "a product")
        if copied.any():
            g.report.note(CP_ASYNC_NOTE)
        bare &= ~copied
        if bare.any():
            detail = (
                f"{what} reads what warp {int(agent[bare][0])} wrote, ordered by barriers, but "
                "with no fence.proxy.async on the way"
            )
            self._report(g, instruction, "no proxy fence", at, bare, lanes, detail)

    # Bulk copies

    def stores_read(
        self, g: Group, instruction: Instruction, where: np.ndarray, lane: int, epoch: int
    ) -> None:
        """A bulk store of the thread `lane` reads 16-byte chunks until it is waited for."""
        if not self.checks:
            return
        warp = int(g.warp[lane])
        at = self.shared.granules(where, 16).reshape(1, -1)
        self._read(g, instruction, at, np.array([[warp]]), np.array([lane]), "a bulk store")
        self.taken[at, self.groups + warp % self.warps] = epoch

    def stores_done(self, warp: int, epoch: int) -> None:
        """All bulk stores of the warp up to this epoch have read their bytes."""
        if self.checks:
            column = BULK + warp % self.warps
            self.clocks.seen[warp, column] = max(self.clocks.seen[warp, column], epoch)

    def load_writes(
        self, g: Group, instruction: Instruction, where: np.ndarray, lane: int, mbarrier: int,
        phase: int,
    ) -> None:  # fmt: skip
        """A bulk load issued by `lane` writes chunks, up to the end of a phase of its mbarrier."""
        if not self.checks:
            return
        shared, known = self.shared, self.clocks.seen[int(g.warp[lane])]
        at = shared.granules(where, 16).reshape(1, -1)
        lanes, verb = np.array([lane]), "a bulk load overwrites what"
        tags = shared.writer[at]
        late = (tags >> AGENT_BITS) > known[tags & AGENT]
        if late.any():
            kind, deed = self.writer(int(tags[late][0]))
            self._report(g, instruction, kind, at, late, lanes, f"{verb} {deed}")
        for others, deed in ((shared.readers, "read"), (shared.changers, "changed")):
            if others is None:
                continue
            early = others[at] > known[: others.shape[1]]
            if early.any():
                detail = f"{verb} warp {int(np.nonzero(early)[2][0])} {deed}, no barrier between"
                self._report(g, instruction, "race", at, early.any(axis=2), lanes, detail)
        if self.watches:
            busy = self.taken[at] > self.limits()[int(g.warp[lane])]
            if busy.any():
                detail = f"{verb} {self.reader(int(np.nonzero(busy)[2][0]))} may still read"
                self._report(g, instruction, "in flight", at, busy.any(axis=2), lanes, detail)
            self.copied[at] = False
        self.load_arrives(where, mbarrier, phase)

    def load_arrives(self, where: np.ndarray, mbarrier: int, phase: int) -> None:
        """These bytes are there at the end of that phase of the mbarrier."""
        if self.checks:
            at = self.shared.granules(where, 16)
            self.shared.writer[at] = phase << AGENT_BITS | self.agent(mbarrier)

    def agent(self, mbarrier: int) -> int:
        """The agent of the loads that report to the mbarrier at this byte position."""
        inside = mbarrier % self.shared.stride
        if inside not in self.mbarriers:
            if MBARRIER + len(self.mbarriers) > AGENT:
                raise NotImplementedError("more than 32 places of mbarriers for bulk loads")
            self.mbarriers[inside] = MBARRIER + len(self.mbarriers)
        return self.mbarriers[inside]

    # Reports

    def reader(self, column: int) -> str:
        """Who a column of ``taken`` is."""
        if column < self.groups:
            return f"a product of warpgroup {column} that was not waited for"
        return f"a bulk store of warp {column - self.groups} that was not waited for"

    def writer(self, tag: int, verb: str = "wrote") -> tuple[str, str]:
        """(kind of finding, deed) of a write that was not seen."""
        agent = tag & AGENT
        if tag >= IN_FLIGHT:
            return "in flight", f"a cp.async of warp {agent} that was not waited for writes"
        if agent >= MBARRIER:
            place = next((p for p, a in self.mbarriers.items() if a == agent), 0)
            return "in flight", (
                f"a bulk load writes, the phase of its mbarrier at {place} not waited for"
            )
        return "race", f"warp {agent} {verb}, no barrier between"

    def _report(
        self, g: Group, instruction: Instruction, kind: str, at: np.ndarray, bad: np.ndarray,
        lanes: np.ndarray, detail: str,
    ) -> None:  # fmt: skip
        """A finding about the granules `at` [n, any] that are `bad`, by threads [n]."""
        i, k = (int(x[0]) for x in np.nonzero(bad))
        byte = int(at[i, k]) * self.shared.granule % self.shared.stride
        g.report.add(
            kind, g.kernel.name, instruction,
            f"{detail}: shared byte {byte}; {g.who(int(lanes[i]))}", int(bad.sum()),
        )  # fmt: skip


# Called by translated code


def fence_async(g: Group, guard: np.ndarray | None) -> None:
    """fence.proxy.async of shared memory."""
    warps, counts = np.unique(g.warp if guard is None else g.warp[guard], return_counts=True)
    g.machine.clocks.fence(warps, counts == g.machine.alive[warps])
