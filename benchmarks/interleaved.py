"""Timing of rivals side by side: one process, one round of each in turn, medians.

Machines differ and drift; the ratio of two medians taken in turns on one of them does not. Every
suite checks that the rivals agree before it times them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one rival."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.seconds)

    def quantile(self, q: float) -> float:
        """The round at the fraction `q` of the sorted ones."""
        ordered = sorted(self.seconds)
        return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def interleave(
    rivals: dict[str, Callable[[], object]], *, rounds: int, warmup: int = 1
) -> dict[str, Timing]:
    """Time every rival once a round, in turn.

    On a GPU each measurement ends with a synchronisation.
    """
    for _ in range(warmup):
        for run in rivals.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, run in rivals.items():
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def median_ratio(slow: Timing, fast: Timing) -> float:
    """Median over the rounds of ``slow / fast``: how many times faster the second is."""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
