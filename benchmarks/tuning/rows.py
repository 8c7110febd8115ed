"""A row of the tile tables: its candidates, gate and timed calls, and what came of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton import CompilationError

from benchmarks.case import CaseResult, RivalResult
from benchmarks.ceilings import Ceilings
from benchmarks.compiled import jobs
from benchmarks.suite import now
from benchmarks.tuning import table_file
from benchmarks.tuning.table_file import Table
from hrvlm.measuring.timing import Timing, median_ratio
from hrvlm.verification.cases import CASES, Random
from hrvlm_kernels import replay
from hrvlm_kernels.triton_kernels import tile_tables
from hrvlm_kernels.triton_kernels.tilings import GemmConfig

HEADS, TOKENS = 16, 16_384  # of what is timed
MISSING = object()  # None is a candidate

Key = tuple[Any, ...]
Run = Callable[[], object]


class Call(NamedTuple):
    """What is timed: useful `flops`, None where memory decides."""

    label: str
    run: Run
    flops: int | None = None


@dataclass(frozen=True)
class TunedOp:
    """One table and how to choose its rows; keys are those of the table.

    A candidate of None means no row: what runs instead is timed like the others. Where that is
    the library's own product, `counted` is False: bounds don't know it, and can't choose.
    """

    table: str
    keys: Callable[[str], Sequence[Key]]
    candidates: Callable[[Key], Sequence[Any]]
    gate: Callable[[Key, str], None]  # raises AssertionError
    calls: Callable[[Key, str], Sequence[Call]]
    job: Callable[[Key, Any], jobs.Job]
    counted: bool = True


def candidates_of(op: TunedOp, key: Key) -> list[Any]:
    """What is in the table now, then the op's other candidates."""
    current = getattr(tile_tables, op.table).get(key, ())
    return list(dict.fromkeys((*current, *op.candidates(key))))


@contextmanager
def row(table: str, key: Key, config: Any) -> Iterator[None]:
    """Let the kernels see one row as `config`, or not at all when None; no Triton spills it.

    Calls that were seen with other tiles are not replayed.
    """
    rows: Table = getattr(tile_tables, table)
    before, spills = dict(rows), dict(tile_tables.SPILLS)
    tile_tables.SPILLS.clear()
    rows.pop(key, None)
    if config is not None:
        rows[key] = (config,)
    replay.forget()
    try:
        yield
    finally:
        replay.forget()
        rows.clear()
        rows.update(before)
        tile_tables.SPILLS.update(spills)


def verified(op: str, dtype: torch.dtype, device: str, **sizes: Any) -> None:
    """Raise AssertionError where the kernels of an op break a rule of ``hrvlm verify``.

    Args:
        op: Its name.
        dtype: Of the tensors.
        device: Where.
        **sizes: Of the op's case in :mod:`hrvlm.verification.cases`.
    """
    for what, run in CASES[op](Random(torch.device(device), dtype, seed=0), **sizes):
        for tensor in run("triton"):
            for f in tensor.findings:
                assert f.passed, f"{what}: {tensor.name}, {f.part}: {f.error:.3e} > {f.limit:.3e}"


def reason(error: Exception) -> str:
    """One line for an error; those of Triton's language show the code first."""
    lines = str(error).strip().splitlines() or ["no message"]
    line = lines[-1] if isinstance(error, CompilationError) else lines[0]
    return f"{type(error).__name__}: {line}"[:200]


def dtype_of(key: Key) -> torch.dtype:
    """The dtype that the rows with this key are tuned in; those of norms serve every dtype."""
    return torch.float32 if key[-1] == 4 else torch.bfloat16


def size_keys(chip: str) -> list[Key]:
    """The rows of the tables that go by the bytes of an element alone."""
    return [(chip, 2), (chip, 4)]


def gemm_candidates(key: Key) -> list[GemmConfig]:
    """Of matrix products."""
    if key[1] == 4:
        tiles = [(64, 64, 16), (64, 64, 32), (32, 32, 16)]
        return [GemmConfig(*tile, 4, s) for tile, s in product(tiles, (2, 3, 4))]
    tiles = [(128, 128, 64), (128, 128, 32), (128, 64, 64), (64, 64, 64), (64, 64, 32)]
    return [GemmConfig(*tile, w, s) for tile, w, s in product(tiles, (4, 8), (3, 4))]


def attention_keys(chip: str, head_dims: Sequence[int] = (64, 128, 32)) -> list[Key]:
    """The rows of the tables that go by head_dim; first those of DINOv3, in 16 bits."""
    return [(chip, head_dim, size) for size in (2, 4) for head_dim in head_dims]


def attention_job(make: Callable[..., jobs.Job], **options: Any) -> Callable[..., jobs.Job]:
    """To compile a row of those."""
    return lambda key, config: make(key[1], dtype_of(key), config, **options)


@dataclass(frozen=True)
class RowResult:
    """All candidates of a row.

    Attributes:
        failures: Why a candidate does not work; None where it does.
        timings: The rounds of those that work, for each of the op's calls.
    """

    name: str
    table: str
    key: Key
    failures: Mapping[Any, str | None]
    timings: Mapping[Call, Mapping[Any, Timing]]

    @cached_property
    def scores(self) -> dict[Any, float]:
        """The geometric mean of each candidate that works, the smallest first."""
        times = {call.label: [t.median for t in ts.values()] for call, ts in self.timings.items()}
        working = [config for config, why in self.failures.items() if why is None]
        scores = zip(working, geometric_means(times), strict=True)
        return dict(sorted(scores, key=lambda pair: pair[1]))

    @property
    def best(self) -> Any:
        """The candidate to choose, or :data:`MISSING` where none works."""
        return next(iter(self.scores), MISSING)

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        for config, score in self.scores.items():
            ms = (
                f"{call.label} {1e3 * t[config].median:.3f} ms" for call, t in self.timings.items()
            )
            mark = "*" if config == self.best else " "
            yield "  ".join((mark, self.name, str(self.key), short(config), *ms, f"{score:.3f}"))

    def cases(self, ceilings: Ceilings) -> list[CaseResult]:
        """As the suites write theirs: a case for each call, or one without numbers.

        The candidate that is chosen has the role "ours", the others are its peers.
        """
        name = " ".join((self.name, *map(str, self.key)))
        parameters = {"op": self.name, "table": self.table, "key": list(self.key)}
        dtype = str(dtype_of(self.key)).removeprefix("torch.")
        failed = [
            RivalResult(short(config), "peer", "failed", reason=why)
            for config, why in self.failures.items()
            if why is not None
        ]
        if not self.timings:
            outcome = now(), "gate failed", "no candidate works"
            return [CaseResult(name, self.name, parameters, dtype, None, None, *outcome, failed)]
        return [
            CaseResult(
                f"{name}, {call.label}", self.name, parameters | {"call": call.label}, dtype,
                call.flops, None, now(), "measured", "", [*self._rivals(call, ceilings), *failed],
            )
            for call in self.timings
        ]  # fmt: skip

    def _rivals(self, call: Call, ceilings: Ceilings) -> Iterator[RivalResult]:
        timings = self.timings[call]
        for config, timing in timings.items():
            chosen = config == self.best
            rate = call.flops / timing.median if call.flops else None
            yield RivalResult(
                short(config),
                "ours" if chosen else "peer",
                "measured",
                median_s=timing.median,
                p20_s=timing.quantile(0.2),
                p80_s=timing.quantile(0.8),
                rounds=len(timing.seconds),
                ratio=None if chosen else median_ratio(timing, timings[self.best]),
                flops_per_second=rate,
                share_of_product=rate / ceilings.flops_per_second if rate else None,
            )


def geometric_means(times: dict[str, list[float]]) -> list[float]:
    """Of each candidate's times, each relative to the best candidate's."""
    relative = [[t / min(column) for t in column] for column in times.values()]
    return [math.exp(sum(map(math.log, ts)) / len(ts)) for ts in zip(*relative, strict=True)]


def short(config: Any) -> str:
    """A candidate in one line."""
    return "no row" if config is None else table_file.text(config)


def earlier(path: Path) -> list[CaseResult]:
    """What a run on the same device, versions and commit has measured."""
    if not path.exists():
        return []
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    return [
        CaseResult(**case | {"rivals": [RivalResult(**rival) for rival in case["rivals"]]})
        for case in cases
    ]


def replaced(old: Sequence[CaseResult], new: Iterable[CaseResult]) -> list[CaseResult]:
    """`old` with those of a row that was tuned again in place of its former ones."""
    new = list(new)
    rows = [(case.parameters["op"], case.parameters["key"]) for case in new]
    return [c for c in old if (c.parameters["op"], c.parameters["key"]) not in rows] + new
