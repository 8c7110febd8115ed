"""What the checks say: findings that are collected, and errors that end the launch."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


class MemcheckError(AssertionError):
    """An access outside every tensor of the kernel, or misaligned.

    An AssertionError, so that tests that seed bugs count it as noticed.
    """


class ExecutionError(RuntimeError):
    """The kernel can't go on: a deadlock, or what the hardware leaves undefined."""


@dataclass(frozen=True)
class Finding:
    """A defect seen while a kernel ran."""

    kind: str  # "uninitialised", "race", "in flight", "global race", ...
    kernel: str
    instruction: str
    detail: str  # of its first occurrence


class Report:
    """Collects findings: each kind and instruction once, with how often it was seen.

    An empty report is false. `notes` counts what was seen and does no harm, such as two warps that
    write the same value.
    """

    def __init__(self) -> None:
        self.findings: OrderedDict[Finding, int] = OrderedDict()
        self.notes: dict[str, int] = {}
        self._first: dict[tuple[str, str, str], Finding] = {}

    def add(self, kind: str, kernel: str, instruction: object, detail: str, count: int = 1) -> None:
        """Count a finding; the detail of the first is kept."""
        key = (kind, kernel, str(instruction))
        finding = self._first.setdefault(key, Finding(*key, detail))
        self.findings[finding] = self.findings.get(finding, 0) + count

    def note(self, what: str, count: int = 1) -> None:
        """Count something that does no harm."""
        self.notes[what] = self.notes.get(what, 0) + count

    def clear(self) -> None:
        """Forget everything."""
        self.findings.clear()
        self.notes.clear()
        self._first.clear()

    def kinds(self) -> dict[str, int]:
        """How often each kind of finding was seen."""
        kinds: dict[str, int] = {}
        for finding, count in self.findings.items():
            kinds[finding.kind] = kinds.get(finding.kind, 0) + count
        return kinds

    def __bool__(self) -> bool:
        return bool(self.findings)

    def __str__(self) -> str:
        return "\n".join(
            f"{f.kind} x{n}: {f.kernel}: {f.instruction}\n    {f.detail}"
            for f, n in self.findings.items()
        )
