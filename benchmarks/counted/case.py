"""A kernel to count, on sampled programs, and what comes of it as a row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.counted import sass
from benchmarks.counted.rates import SM_COUNT, Work, limit, microseconds
from ptx_machine import PtxDriver
from ptx_machine.counters import LaunchCounts
from ptx_machine.pipes import PIPES

Grid = tuple[int, int, int]
Weighted = tuple[LaunchCounts, float]
Part = tuple[Sequence[int], float]  # programs, and for how many of the grid each stands
Sample = Callable[[Grid], Sequence[Part]]


def whole(grid: Grid) -> list[Part]:
    """Every program."""
    return [(range(grid[0] * grid[1] * grid[2]), 1.0)]


def spread(count: int) -> Sample:
    """`count` programs from the first to the last, each for as many."""

    def choose(grid: Grid) -> list[Part]:
        total = grid[0] * grid[1] * grid[2]
        if total <= count:
            return whole(grid)
        chosen = sorted({round(i * (total - 1) / (count - 1)) for i in range(count)})
        return [(chosen, total / len(chosen))]

    return choose


def first(grid: Grid) -> list[Part]:
    """The first one, for all: where all execute the same."""
    return [([0], float(grid[0] * grid[1] * grid[2]))]


@dataclass(frozen=True)
class Case:
    """What is counted.

    Attributes:
        op: And direction, e.g. "attention forward".
        size: E.g. "n=577 D=64".
        variant: "shipped", the name of a candidate, or that of a peer.
        start: Launches the kernels.
        unit: Of useful work, e.g. "score".
        units: How much of it all programs do.
        samples: By a part of a kernel's name; kernels that fit none are not counted.
        flops: Useful ones of the tensor cores, of all programs.
        least: Bytes that have to be moved once, of all programs.
        sharing: Of kernels whose programs share what they read, by a part of the name: the bytes
            that each has to move once, since sampled sectors would count them again and again.
        plain: Launches the first kernel without its epilogue. What the epilogue adds to the need of
            each unit then counts as if nothing happened beside it: its largest need comes on top.
        epilogue_alone: Of that kernel nothing else counts.
        alone: Nothing else runs on the chip, so that multiprocessors without a program are idle:
            the one with most programs says what each unit needs, but for device memory.
        role: "ours", "candidate" or "peer".
        check: Raises AssertionError if the sampled programs computed something else.
    """

    op: str
    size: str
    variant: str
    start: Callable[[], object]
    unit: str
    units: float
    samples: Mapping[str, Sample]
    flops: float = 0
    least: float = 0
    sharing: Mapping[str, float] = field(default_factory=dict)
    plain: Callable[[], object] | None = None
    epilogue_alone: bool = False
    alone: bool = False
    role: str = "ours"
    check: Callable[[], None] | None = field(default=None, compare=False)

    @property
    def name(self) -> tuple[str, str, str]:
        """What tells it from others."""
        return self.op, self.size, self.variant


@dataclass(frozen=True)
class Later:
    """A case that is made when it is called for: its name is known without its tensors."""

    name: tuple[str, str, str]
    make: Callable[[], Case]

    def __call__(self) -> Case:
        """The case."""
        return self.make()


@dataclass
class Launch:
    """One launch of a case: its sampled programs, weighted to stand for all."""

    kernel: str
    grid: Grid
    programs: int
    work: Work
    pipes: dict[str, float]  # as PTX has them
    machine: dict[str, float] | None  # as SASS has them
    loop: int  # instructions of a turn of its main loop
    flops: float
    asked: float
    sectors: float
    conflicts: float


def count(case: Case, gpu: PtxDriver, chip: int) -> dict[str, Any]:
    """Run a case's samples and describe what all programs would execute."""
    launches = _launches(case, gpu)
    if case.check is not None:
        case.check()
    kernels = [_described(launch, case, chip) for launch in launches]
    if case.plain is not None:
        _count_epilogue(kernels[0], case, gpu, chip)
    bound = sum(kernel["bound"] for kernel in kernels)
    return {
        "op": case.op, "size": case.size, "variant": case.variant, "role": case.role,
        "unit": case.unit, "units": case.units,
        "bound": bound,
        "bound_us": microseconds(bound * case.units / 1000, chip),
        "limits": [kernel["limit"] for kernel in kernels],
        "instructions": sum(kernel["instructions"] for kernel in kernels),
        "kernels": kernels,
    }  # fmt: skip


def _count_epilogue(kernel: dict[str, Any], case: Case, gpu: PtxDriver, chip: int) -> None:
    assert case.plain is not None
    (launch,) = _launches(replace(case, start=case.plain), gpu)
    before = _described(launch, case, chip)
    more = {n: c - before["clocks"][n] for n, c in kernel["clocks"].items()}
    name, need = limit(more)
    if case.epilogue_alone:
        less = {n: kernel[n] - before[n] for n in ("instructions", "ptx_instructions")}
        nothing = dict.fromkeys(("flops_per_useful", "sectors_per_asked", "moved_per_least"))
        kernel |= {"bound": need, "limit": name, "clocks": more, "loop": 0, **less, **nothing}
        kernel["kernel"] += ", what its epilogue adds"
        return
    kernel["bound"] = before["bound"] + need
    kernel["limit"] = f"{before['limit']}, then {need:.4g} {name}"


def _launches(case: Case, gpu: PtxDriver) -> list[Launch]:
    """Each part of the samples is a run of its own; launch for launch they belong together."""
    parts: dict[int, list[Weighted]] = {}
    turn, more = 0, True
    while more:
        weighted, more = _turn(case, gpu, turn)
        for number, (counts, weight) in enumerate(weighted):
            if counts.programs:
                parts.setdefault(number, []).append((counts, weight))
        turn += 1
    return [_joined(weighted, case) for _, weighted in sorted(parts.items())]


def _turn(case: Case, gpu: PtxDriver, turn: int) -> tuple[list[Weighted], bool]:
    """Counts of the launches with this part of each sample, and whether there are more parts."""
    weights, more = [], []

    def choose(name: str, grid: Grid) -> Sequence[int]:
        sample = next((s for key, s in case.samples.items() if key in name), None)
        chosen = list(sample(grid)) if sample else []
        programs, weight = chosen[turn] if turn < len(chosen) else ((), 0.0)
        weights.append(weight)
        more.append(turn + 1 < len(chosen))
        return programs

    gpu.counts.clear()
    gpu.options.ctas = choose
    try:
        case.start()
    finally:
        gpu.options.ctas = None
    return list(zip(gpu.counts, weights, strict=True)), any(more)


def _joined(parts: list[Weighted], case: Case) -> Launch:
    metadata = parts[0][0].metadata
    code = sass.code_of(metadata.hash, metadata.name)
    total: Counter[str] = Counter()
    machine: Counter[str] | None = Counter()
    for counts, weight in parts:
        for name, n in counts.pipes().items():
            total[name] += n * weight
        executed = sass.executed(counts, code)
        if executed is None or machine is None:
            machine = None
        else:
            for name, n in executed.items():
                machine[name] += n * weight
        traffic, flops = counts.traffic(), counts.flops()
        for name, n in {**traffic, **flops}.items():
            total[f"bytes {name}" if name in traffic else name] += n * weight
        total["waves"] += counts.wavefronts()[0] * weight
        total["phases"] += counts.wavefronts()[1] * weight
        copied = counts.copies["load shared bytes"] + counts.copies["store shared bytes"]
        total["shared bytes"] += (counts.operand_bytes() + copied) * weight
    counts = parts[0][0]
    sectors = total["bytes load"] + total["bytes store"]
    touched = total["bytes load distinct"] + total["bytes store distinct"]
    touched = next((n for name, n in case.sharing.items() if name in counts.name), touched)
    by_pipe = {name: total[name] for name in PIPES}
    arithmetic = _arithmetic(by_pipe, machine)
    work = Work(
        instructions=arithmetic,
        flops={"wgmma": total["wgmma"], "mma": total["mma"]},
        wavefronts=total["waves"],
        shared_bytes=total["shared bytes"],
        l2_bytes=sectors,
        dram_bytes=touched,
    )
    return Launch(
        kernel=counts.name,
        grid=counts.grid,
        programs=sum(c.programs for c, _ in parts),
        work=work,
        pipes=by_pipe,
        machine=None if machine is None else dict(machine),
        loop=sum(sass.main_loop(code).values()),
        flops=total["wgmma"] + total["mma"],
        asked=total["bytes load asked"] + total["bytes store asked"],
        sectors=sectors,
        conflicts=total["waves"] / total["phases"] if total["phases"] else 1.0,
    )


def _arithmetic(pipes: dict[str, float], machine: Counter[str] | None) -> dict[str, float]:
    """What a bound is made of: the machine's instructions where they are known."""
    names = ("fma", "alu", "mufu", "convert", "shuffle")
    if machine is None:
        issue = sum(pipes.values()) - pipes["move"]
        return {name: pipes[name] for name in names} | {"issue": issue}
    return {name: machine[name] for name in names} | {"issue": sum(machine.values())}


def share_of_the_busiest(grid: Grid, chip: int) -> float:
    """Programs of the multiprocessor that has most of them, for each that all have on average."""
    programs = grid[0] * grid[1] * grid[2]
    return math.ceil(programs / SM_COUNT[chip]) * SM_COUNT[chip] / programs


def _described(launch: Launch, case: Case, chip: int) -> dict[str, Any]:
    per = 1000 / case.units
    clocks = {name: need * per for name, need in launch.work.clocks(chip).items()}
    if case.alone:
        more = share_of_the_busiest(launch.grid, chip)
        clocks = {name: need * (1 if name == "dram" else more) for name, need in clocks.items()}
    name, bound = limit(clocks)
    ptx = sum(launch.pipes.values()) - launch.pipes["move"]
    machine = launch.machine
    return {
        "kernel": launch.kernel,
        "grid": launch.grid,
        "sampled": launch.programs,
        "limit": name,
        "bound": bound,
        "clocks": clocks,
        "instructions": 32 * launch.work.instructions["issue"] / case.units,
        "ptx": {pipe: 32 * n / case.units for pipe, n in launch.pipes.items()},
        "ptx_instructions": 32 * ptx / case.units,
        "sass": machine and {name: 32 * n / case.units for name, n in machine.items()},
        "loop": launch.loop,
        "flops_per_useful": launch.flops / case.flops if case.flops and launch.flops else None,
        "sectors_per_asked": launch.sectors / launch.asked if launch.asked else None,
        "moved_per_least": launch.work.dram_bytes / case.least if case.least else None,
        "conflicts": launch.conflicts,
    }
