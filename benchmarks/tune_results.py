"""What came of tuning a row, for the terminal and for the result file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import tile_table_file
from benchmarks.case import CaseResult, RivalResult
from benchmarks.suite import now
from benchmarks.tune_row import Call, Key, dtype_of
from hrvlm.measuring.timing import Ceilings, Timing, median_ratio

MISSING = object()  # None is a candidate


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
    return "no row" if config is None else tile_table_file.text(config)


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
