"""Order between warps, in vector clocks.

``seen[w, v]`` is the newest epoch of warp v whose effects warp w is guaranteed to see; a barrier
joins the clocks of those who met there. A *tag* is ``epoch << AGENT_BITS | agent``: it says who did
something, and when. An agent is a warp, or what it left running in the async proxy (see
``proxies.py``). Warps are numbered over all slots (the CTAs that run together), except in tags.
Threads of one warp are never reported against each other.
"""

from __future__ import annotations

import numpy as np

WARP = 32
AGENT_BITS = 7
WGMMA, BULK, MBARRIER = 32, 64, 96  # the first agents that are no warps; a CTA has 32 warps at most
AGENT = (1 << AGENT_BITS) - 1
OWN = np.int64(1) << 33  # a warp sees all that it did itself; epochs are smaller
IN_FLIGHT = (
    OWN + 1
) << AGENT_BITS  # the tag of bytes being copied by cp.async: nobody may touch them
TAG_BITS = 42  # tags are smaller than 1 << TAG_BITS


class Clocks:
    """Who has seen whom, for all warps of the CTAs that run together."""

    def __init__(self, slots: int, warps: int) -> None:
        self.slots, self.warps = slots, warps
        self.epoch = np.ones(slots * warps, np.int64)
        self.seen = np.zeros((slots * warps, 1 << AGENT_BITS), np.int64)
        self.fenced = np.zeros((slots * warps, WGMMA), np.int64)  # see proxies.py
        self.met = np.zeros(slots * warps, np.int64)  # newest epoch that all lanes of a warp see
        self._own()

    def _own(self) -> None:
        rows = np.arange(self.slots * self.warps)
        self.seen[rows, rows % self.warps] = OWN

    def tag(self, warp: np.ndarray) -> np.ndarray:
        """The tag of what these warps do now."""
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
            self.warp_barrier(met)
        self._own()

    def full_barrier(self, slots: np.ndarray) -> None:
        """All warps of these slots met."""
        epoch = self.epoch.reshape(self.slots, self.warps)
        seen = self.seen.reshape(self.slots, self.warps, -1)
        seen[slots, :, : self.warps] = epoch[slots][:, None, :]
        seen[slots, :, WGMMA:] = seen[slots, :, WGMMA:].max(axis=1, keepdims=True)
        fenced = self.fenced.reshape(self.slots, self.warps, -1)
        fenced[slots] = fenced[slots].max(axis=1, keepdims=True)
        self.met.reshape(self.slots, self.warps)[slots] = epoch[slots]
        epoch[slots] += 1
        self._own()

    def warp_barrier(self, warps: np.ndarray) -> None:
        """All lanes of these warps met, each with those of its own warp."""
        self.met[warps] = self.epoch[warps]
        self.epoch[warps] += 1

    def fence(self, warps: np.ndarray, whole: np.ndarray) -> None:
        """A fence.proxy.async by these warps.

        If not by the whole warp, it orders of its own warp what was before the last barrier.
        """
        known = self.seen[warps, :WGMMA].copy()
        known[np.arange(len(warps)), warps % self.warps] = np.where(
            whole, self.epoch[warps], self.met[warps]
        )
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
        """Which of these tags ([warps, any]; 0 for nobody) the warps are not sure to see."""
        return (tags >> AGENT_BITS) > self.seen[warp[:, None], tags & AGENT]
