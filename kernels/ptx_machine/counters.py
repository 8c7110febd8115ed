"""What a launch executes, counted by warp: instructions by pipe, sectors, bank conflicts, FLOPs.

    gpu.options.count = True
    kernel[grid](...)
    print(gpu.counts[-1].pipes(), gpu.counts[-1].traffic())

A warp counts once for each instruction that any of its threads reaches, predicated off or not: it
takes an issue slot either way. Memory is counted as the hardware serves it:

    global  the distinct sectors of 32 bytes of one warp instruction, against the distinct bytes
            that its active threads ask for
    shared  wavefronts: 4-byte accesses in one phase of 32 threads, 8 bytes in two of 16, 16 bytes
            in four of 8, ldmatrix and stmatrix one phase for each matrix; a phase takes as many
            wavefronts as the worst of its 32 banks has distinct words. The operands of wgmma and
            what TMA writes are counted in bytes: their layouts are swizzled against conflicts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .clocks import WARP
from .pipes import PIPES, operand_bytes, pipes_of, tensor_flops
from .syntax import Instruction, Kernel

SECTOR, BANKS = 32, 32
_REGION_BITS = 36  # of an address inside a region of global memory


@dataclass
class Access:
    """All accesses of one instruction to one memory."""

    requests: int = 0  # warp instructions with an active thread
    sectors: int = 0
    bytes: int = 0  # distinct within a warp instruction
    wavefronts: int = 0
    phases: int = 0  # wavefronts without a conflict


@dataclass
class LaunchCounts:
    """Counts of one launch; those of the programs that were run."""

    kernel: Kernel
    threads: int
    grid: tuple[int, int, int]
    metadata: Any = None  # Triton's, of the compiled kernel
    programs: int = 0  # that were run
    loads: dict[int, Access] = field(default_factory=dict)  # by instruction, of global memory
    stores: dict[int, Access] = field(default_factory=dict)
    shared: dict[int, Access] = field(default_factory=dict)
    copies: Counter[str] = field(default_factory=Counter)  # TMA: "load bytes", "load sectors", ...

    def __post_init__(self) -> None:
        self._warps = np.zeros(len(self.kernel.blocks), np.int64)
        self._touched: dict[tuple[str, int], np.ndarray] = {}
        self._pipes = [pipe for block in self.kernel.blocks for pipe in pipes_of(block)]

    # Called by the machine

    def block(self, number: int, warp: np.ndarray) -> None:
        """Threads of these warps (ascending) ran a block."""
        self._warps[number] += 1 + np.count_nonzero(warp[1:] != warp[:-1])

    def global_access(
        self, i: Instruction, warp: np.ndarray, address: np.ndarray, width: int, store: bool
    ) -> None:
        """`warp` and `address` are those of the active threads; `width` bytes each."""
        entry = (self.stores if store else self.loads).setdefault(i.index, Access())
        key = warp.astype(np.int64) << 48
        address = address.astype(np.int64)
        # An access is aligned to its width: only one wider than a sector touches two.
        starts = address[:, None] + np.arange(0, width, SECTOR)
        sectors = np.unique(key[:, None] | starts // SECTOR)
        step = min(width, 4)
        pieces = (address[:, None] + np.arange(0, width, step)) // step
        entry.requests += len(np.unique(warp))
        entry.sectors += len(sectors)
        entry.bytes += len(np.unique(key[:, None] | pieces)) * step
        self._touch("store" if store else "load", np.unique(sectors & ((1 << 48) - 1)))

    def shared_access(
        self, i: Instruction, thread: np.ndarray, address: np.ndarray, width: int
    ) -> None:
        """`thread` numbers the active threads over all programs, `address` is each one's byte."""
        lanes = min(WARP, 128 // max(width, 4))  # of a phase
        self._shared(i, thread // WARP, thread // lanes, address, width)

    def matrix_access(self, i: Instruction, warp: np.ndarray, address: np.ndarray) -> None:
        """Ldmatrix and stmatrix: rows of 16 bytes, eight to a matrix."""
        self._shared(i, warp, np.arange(len(address)) // 8, address, 16)

    def tensor_copy(self, box_bytes: int, rows: np.ndarray, width: int, load: bool) -> None:
        """TMA moves a box; inside the tensor lie `width` bytes from each address of `rows` on."""
        name = "load" if load else "store"
        count = (width + SECTOR - 1) // SECTOR + 1
        sectors = rows[:, None] // SECTOR + np.arange(count)
        sectors = np.unique(sectors[sectors * SECTOR < rows[:, None] + width])
        self.copies.update({
            f"{name} boxes": 1, f"{name} shared bytes": box_bytes,
            f"{name} bytes": len(rows) * width, f"{name} sectors": len(sectors),
        })  # fmt: skip
        self._touch(name, sectors)

    def _shared(
        self, i: Instruction, warp: np.ndarray, phase: np.ndarray, address: np.ndarray, width: int
    ) -> None:
        entry = self.shared.setdefault(i.index, Access())
        words = (address.astype(np.int64)[:, None] + np.arange(0, max(width, 4), 4)) // 4
        pairs = np.unique(phase.astype(np.int64)[:, None] << 32 | words)
        _, place = np.unique(pairs >> 32, return_inverse=True)
        in_bank = np.bincount(place * BANKS + pairs % BANKS, minlength=(place[-1] + 1) * BANKS)
        entry.requests += len(np.unique(warp))
        entry.bytes += 4 * len(pairs)
        entry.wavefronts += int(in_bank.reshape(-1, BANKS).max(axis=1).sum())
        entry.phases += int(place[-1]) + 1

    def _touch(self, what: str, sectors: np.ndarray) -> None:
        """Remember which sectors the launch needs at all: what has to come from the device."""
        if not len(sectors):
            return  # a box that lies outside its tensor
        bits = _REGION_BITS - 5
        region = int(sectors[0]) >> bits
        local = sectors - (region << bits)
        seen = self._touched.get((what, region))
        end = int(local[-1]) + 1
        if seen is None or len(seen) < end:
            grown = np.zeros(2 * end, bool)
            if seen is not None:
                grown[: len(seen)] = seen
            seen = self._touched[what, region] = grown
        seen[local] = True

    # Results

    @property
    def name(self) -> str:
        """Of the kernel."""
        return self.kernel.name

    @property
    def runs(self) -> list[int]:
        """How many warps ran each block."""
        return [int(n) for n in self._warps]

    def executed(self) -> Iterator[tuple[Instruction, int]]:
        """(instruction, warps that ran it), for all that were run."""
        for number, block in enumerate(self.kernel.blocks):
            if self._warps[number]:
                for i in block.instructions:
                    yield i, int(self._warps[number])

    def pipes(self) -> dict[str, int]:
        """Warp instructions by pipe."""
        counts = dict.fromkeys(PIPES, 0)
        for i, warps in self.executed():
            name, weight = self._pipes[i.index]
            counts[name] += weight * warps
        return counts

    def lines(self, *pipes: str) -> Counter[str]:
        """Warp instructions of some pipes by line of Triton source."""
        found: Counter[str] = Counter()
        for i, warps in self.executed():
            if self._pipes[i.index][0] in pipes:
                found[i.where] += self._pipes[i.index][1] * warps
        return found

    def flops(self) -> dict[str, int]:
        """FLOPs that the tensor cores executed, by the instruction: "mma" or "wgmma"."""
        found = {"mma": 0, "wgmma": 0}
        for i, warps in self.executed():
            if self._pipes[i.index][0] == "tensor":
                found[i.base] += tensor_flops(i) * warps
        return found

    def operand_bytes(self) -> int:
        """Bytes of shared memory that products of warpgroups read."""
        asynchronous = ((i, w) for i, w in self.executed() if i.op.startswith("wgmma.mma_async"))
        return sum(operand_bytes(i) * warps for i, warps in asynchronous)

    def traffic(self) -> dict[str, int]:
        """Bytes of global memory, for "load" and "store" alike.

        "load" counts the sectors that warps ask L1 for, "load asked" the bytes of them that are
        wanted, "load distinct" those sectors that the launch touches at all, each once.
        """
        found = {}
        for name, accesses in (("load", self.loads), ("store", self.stores)):
            sectors = sum(a.sectors for a in accesses.values()) + self.copies[f"{name} sectors"]
            asked = sum(a.bytes for a in accesses.values()) + self.copies[f"{name} bytes"]
            touched = (seen for (what, _), seen in self._touched.items() if what == name)
            found[name] = SECTOR * sectors
            found[f"{name} asked"] = asked
            found[f"{name} distinct"] = SECTOR * sum(int(seen.sum()) for seen in touched)
        return found

    def wavefronts(self) -> tuple[int, int]:
        """Of shared memory, and how many they would be without bank conflicts."""
        every = self.shared.values()
        return sum(a.wavefronts for a in every), sum(a.phases for a in every)

    def worst_conflict(self) -> float:
        """Wavefronts of the worst instruction for one without conflicts; 1 is best."""
        return max((a.wavefronts / a.phases for a in self.shared.values()), default=1.0)
