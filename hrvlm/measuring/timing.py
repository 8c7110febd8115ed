"""Timing rivals against each other.

Machines differ and drift. What does not is the ratio of two rivals that took turns in one process:
round by round, each starting a round in its turn, and the median over the rounds. On a GPU a
measurement lies between two events of the device, after a read that pushes all else out of the L2
cache (what a write leaves there would be written back while the clock runs), and after a wait of
the device for as long as the host takes to queue what is timed: small ops would be timed by the
host's pace otherwise. On the CPU it is the host's clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..machine import synchronize

FLUSH_BYTES = 512 * 2**20  # more than the last-level cache of any GPU so far
QUEUEING = 2.0  # times what the host took to queue a run the first time,
QUEUEING_S = 100e-6  # and this much, the device waits before it begins
LONGEST_WAIT_S = 0.25  # a run that takes the host longer waits for the device itself
_CALIBRATION_CYCLES = 10_000_000

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one rival, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.seconds)

    def quantile(self, q: float) -> float:
        """The round at the fraction `q` of the sorted ones."""
        ordered = sorted(self.seconds)
        return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def take_turns(
    rivals: Mapping[str, Run],
    device: torch.device,
    *,
    budget_s: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 30,
) -> dict[str, Timing]:
    """Time every rival once a round; each round another one starts.

    Args:
        rivals: Functions without arguments, already warm.
        device: Where they run.
        budget_s: Seconds that the rounds should take together, by the time of a first one that
            does not count.
        min_rounds: Not fewer, whatever they take.
        max_rounds: Not more.
    """
    watch = _Stopwatch(device)
    start = time.perf_counter()
    queueing = {}
    for name, run in rivals.items():
        begun = time.perf_counter()
        run()
        queueing[name] = time.perf_counter() - begun
    synchronize(device)
    round_s = max(time.perf_counter() - start, 1e-9)
    rounds = min(max(int(budget_s / round_s), min_rounds), max_rounds)
    names, marks = list(rivals), []
    for i in range(rounds):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            marks.append((name, watch.time(rivals[name], queueing[name])))
    synchronize(device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name, mark in marks:
        seconds[name].append(mark())
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def median_ratio(slow: Timing, fast: Timing) -> float:
    """Median over the rounds of ``slow / fast``: how many times faster the second is."""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


class _Stopwatch:
    """Starts a run and returns a function that tells its seconds once the device is done."""

    def __init__(self, device: torch.device):
        self.device = device
        self.flush = None
        if device.type == "cuda":
            self.flush = torch.zeros(FLUSH_BYTES // 4, device=device)
            self.cycles_per_second = self._calibrate()

    def _calibrate(self) -> float:
        torch.cuda._sleep(1)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.cuda._sleep(_CALIBRATION_CYCLES)
        end.record()
        synchronize(self.device)
        return _CALIBRATION_CYCLES / (begin.elapsed_time(end) / 1e3)

    def time(self, run: Run, queueing_s: float) -> Callable[[], float]:
        if self.flush is None:
            synchronize(self.device)
            start = time.perf_counter()
            run()
            synchronize(self.device)
            seconds = time.perf_counter() - start
            return lambda: seconds
        wait_s = min(QUEUEING * queueing_s + QUEUEING_S, LONGEST_WAIT_S)
        self.flush.sum()
        torch.cuda._sleep(int(wait_s * self.cycles_per_second))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        return lambda: begin.elapsed_time(end) / 1e3


def peak_memory(run: Run, device: torch.device) -> int | None:
    """Bytes that `run` allocates at most beyond what is there before it; None without a GPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
