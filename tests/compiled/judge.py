"""Run a check on ptx_machine: how near to its limits it came, and what the machine found."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.compiled.page import COPIES
from ptx_machine import ExecutionError, Finding, MemcheckError, PtxDriver, Report
from ptx_machine.global_memory import IN_PLACE
from tests import numerics


def findings_of(report: Report) -> dict[str, int]:
    """How often the machine found what, by kind; what `notes_of` has is left out."""
    kinds: Counter[str] = Counter()
    for finding, count in report.findings.items():
        if not _is_copy(finding):
            kinds[finding.kind] += count
    return dict(kinds)


def notes_of(report: Report) -> dict[str, int]:
    """What does no harm: the machine's own notes, and rope_2d's copies.

    Where rope_2d writes in place, its warps that hold copies of elements of others read what those
    may have overwritten, and drop it: the cases "in place, warps in random order" show that they
    do. Into tensors of its own it writes no byte that it reads: there it would be a finding.
    """
    copies = sum(count for finding, count in report.findings.items() if _is_copy(finding))
    return report.notes | ({COPIES: copies} if copies else {})


def _is_copy(finding: Finding) -> bool:
    return (finding.kernel, finding.kind) == ("rope_2d", IN_PLACE)


@dataclass(frozen=True)
class Outcome:
    """What a check did.

    Attributes:
        used: largest share of an allowed error.
        at: where that was; "equal bits" of a check that measures no error.
        problem: the exception, if one was raised.
        findings: of the machine, by kind.
        notes: what it saw that does no harm.
        launches: of each kernel.
        instructions: executed, by all threads.
        seconds: of everything.
    """

    used: float
    at: str
    problem: str
    findings: dict[str, int]
    notes: dict[str, int]
    launches: dict[str, int]
    instructions: int
    seconds: float
    report: str = field(repr=False, default="")

    @property
    def noticed(self) -> list[str]:
        """What noticed a fault; nothing if all is well."""
        return [*([self.problem.partition(":")[0]] if self.problem else []), *self.findings]

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["report"], fields["seconds"]
        return fields


def judge(machine: PtxDriver, run: Callable[[], object]) -> Outcome:
    """Run it; nothing is raised but what has nothing to do with the kernels."""
    machine.report.clear()
    machine.launches.clear()
    before, begin, problem = machine.instructions, time.perf_counter(), ""
    with numerics.recorded() as measured:
        try:
            run()
        except MemcheckError as error:
            problem = f"memcheck: {error}"
        except ExecutionError as error:
            problem = f"can't go on: {error}"
        except AssertionError as error:
            problem = f"wrong numbers: {error}"
    worst = max(measured, key=lambda finding: finding.used, default=None)
    return Outcome(
        used=worst.used if worst else 0.0,
        at=worst.part if worst else "equal bits",
        problem=problem,
        findings=findings_of(machine.report),
        notes=notes_of(machine.report),
        launches=dict(Counter(name for name, _ in machine.launches)),
        instructions=machine.instructions - before,
        seconds=time.perf_counter() - begin,
        report=str(machine.report),
    )


def assert_clean(outcome: Outcome) -> None:
    """Right by the rules, and no finding."""
    assert not outcome.problem, outcome.problem
    assert not outcome.findings, outcome.report
    assert outcome.launches, "no kernel ran"
