"""How kernels are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass
class Options:
    """How to run; fields may be changed between launches."""

    check: bool = True  # shared memory: races, unwritten bytes, order of the async proxy
    check_global: bool = True  # races in global memory
    lanes: int = 2048  # threads that run as one numpy operation, whole CTAs
    shuffle_warps: bool = False  # warps one by one, in a random order, from barrier to barrier
    shuffle_ctas: bool = False  # CTAs in a random order
    seed: int = 0  # of both
    count: bool = False  # keep what each launch executes: PtxDriver.counts
    max_steps: int = 50_000_000  # blocks run for one launch
    ctas: Callable[[str, tuple[int, int, int]], Sequence[int]] | None = None
    """Which CTAs to run, given the kernel's name and grid; all if None."""
