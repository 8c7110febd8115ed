"""What a multiprocessor can do in a clock, and the bound that follows from counts.

The rates of arithmetic are those of the CUDA C++ Programming Guide, "Arithmetic Instructions"
(results per clock of a multiprocessor, here divided by the 32 lanes of a warp). Tensor cores and
memory are those of the data sheets: H100 SXM 989.4 TFLOP/s dense in bfloat16 = 132 x 1.83 GHz x
4096, 3.35 TB/s; A100 SXM 40 GB 312 TFLOP/s = 108 x 1.41 GHz x 2048, 1.555 TB/s. `mma` on an H100
reaches about 0.62 of the peak (Luo et al. 2024, "Benchmarking and Dissecting the Nvidia Hopper GPU
Architecture via Microbenchmarking"). Four schedulers issue an instruction each; shared memory gives
128 bytes a clock. Least certain, for no document of the vendor has them: 64 bytes of L2 a clock and
multiprocessor, conversions to bfloat16, and that the operands of wgmma take 128 bytes a clock.

A bound is the largest of these needs, as if everything else happened beside it. It is not a time:
latency, occupancy, dependences and launches are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

SM_COUNT = {80: 108, 90: 132}
CLOCK_GHZ = {80: 1.41, 90: 1.83}


@dataclass(frozen=True)
class Rates:
    """Of one multiprocessor and clock: warp instructions, FLOPs or bytes."""

    wgmma: float
    mma: float
    fma: float
    alu: float = 2
    mufu: float = 0.5
    convert: float = 2
    shuffle: float = 1
    issue: float = 4
    shared: float = 128
    l2: float = 64
    dram: float = 0


RATES = {
    80: Rates(wgmma=2048, mma=2048, fma=2, convert=0.5, dram=1555 / 108 / 1.41),
    90: Rates(wgmma=4096, mma=2560, fma=4, dram=3350 / 132 / 1.83),
}


@dataclass(frozen=True)
class Work:
    """What has to be done, in warp instructions, FLOPs, wavefronts and bytes."""

    instructions: dict[str, float]  # by pipe, "issue" for all that take an issue slot
    flops: dict[str, float]
    wavefronts: float
    shared_bytes: float  # operands of wgmma, boxes of TMA
    l2_bytes: float  # sectors that were asked for
    dram_bytes: float  # sectors that have to come or go at all

    def clocks(self, chip: int) -> dict[str, float]:
        """Clocks of one multiprocessor that each unit needs."""
        r = RATES[chip]
        arithmetic = ("fma", "alu", "mufu", "convert", "shuffle", "issue")
        return {
            "tensor": self.flops["wgmma"] / r.wgmma + self.flops["mma"] / r.mma,
            **{name: self.instructions[name] / getattr(r, name) for name in arithmetic},
            "shared": self.wavefronts + self.shared_bytes / r.shared,
            "l2": self.l2_bytes / r.l2,
            "dram": self.dram_bytes / r.dram,
        }


def limit(clocks: dict[str, float]) -> tuple[str, float]:
    """The unit that needs most, and how much: the bound."""
    name = max(clocks, key=clocks.__getitem__)
    return name, clocks[name]


def microseconds(clocks: float, chip: int) -> float:
    """Of the whole chip, all multiprocessors sharing the work evenly."""
    return clocks / SM_COUNT[chip] / CLOCK_GHZ[chip] / 1e3
