"""What every suite shares: a case, its rivals, the gate before any number, and the result file.

A case is one comparison: some inputs, ours, its peers, and bounds that nothing beats. Running it
means, in this order:

1. the gate: the op forward and backward against float64 by the rules of ``hrvlm verify``. A red
   gate leaves "gate failed" and no number;
2. every rival is made, warmed up and compared with the case's reference on the very inputs that are
   timed. Ours off by more than the tolerance is a red gate too; a peer that is gets no number, and
   one that can't run is recorded with the reason;
3. the rivals take turns (:mod:`hrvlm.measuring.timing`).

The file is written after each case, so that a run that is cut short leaves what it has.
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor

from benchmarks.case import (
    RESULTS,
    Case,
    CaseResult,
    Outputs,
    Rival,
    RivalResult,
    Run,
    Settings,
    Unavailable,
)
from benchmarks.ceilings import Ceilings, measure_ceilings
from hrvlm.files import write_text
from hrvlm.machine import describe_device, synchronize
from hrvlm.measuring.attention_kernel import sdpa_of
from hrvlm.measuring.timing import (
    Timing,
    median_ratio,
    peak_memory,
    take_turns,
)
from hrvlm.verification.verify import verify

SCHEMA = 1
# Compiling takes most of the time; the cases at the end of a suite should have some of it left.
COMPILING_SHARE = 0.6
# Largest relative difference of an op's result from its reference in float32: a few roundings.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


class SuiteRun:
    """Runs the cases of one suite on one device and keeps their results.

    Args:
        suite: Its name.
        settings: How.
        budget_s: Seconds after which cases are left out unless ``settings.full``; rivals that
            compile are after :data:`COMPILING_SHARE` of them.
    """

    def __init__(self, suite: str, settings: Settings, *, budget_s: float):
        self.suite, self.settings = suite, settings
        if settings.full:
            budget_s = math.inf
        start = time.monotonic()
        self.deadline = start + budget_s
        self.compiling_deadline = start + COMPILING_SHARE * budget_s
        self.machine = describe_device(settings.device) | {
            "commit": settings.commit or commit_here(),
            "date": now(),
        }
        self.ceilings: Ceilings = measure_ceilings(settings.device, small=settings.small)
        self.cases: list[CaseResult] = []
        self._gates: dict[tuple[str, torch.dtype], str | None] = {}

    @property
    def path(self) -> Path:
        """Result file: suite, device, torch, Triton, commit."""
        m = self.machine
        parts = (self.suite, m["device"], m["torch"], m["triton"] or "none", m["commit"])
        return self.settings.results / ("-".join(slug(str(part)) for part in parts) + ".json")

    def measure(
        self, case: Case, on_ours: Callable[[Callable[[], None]], None] | None = None
    ) -> CaseResult:
        """Run one case and write the file.

        Args:
            case: What to run.
            on_ours: Called with our rival, warm and waiting for the device, once it passed.
        """
        result = CaseResult(
            case.name, case.group, case.parameters, str(case.dtype).removeprefix("torch."),
            case.flops, case.bytes, now(), "measured",
        )  # fmt: skip
        self.cases.append(result)
        if case.full_only and not self.settings.full:
            result.status, result.reason = "left out", "runs with --full"
        elif time.monotonic() > self.deadline:
            result.status, result.reason = "left out", "the suite's time was used up"
        elif failure := self.gate(case.op, case.dtype):
            result.status, result.reason = "gate failed", failure
        else:
            self._run_within_memory(case, result, on_ours)
            self._release()
        self.write()
        return result

    def gate(self, op: str, dtype: torch.dtype) -> str | None:
        """Why an op is not right on this device; None when it is."""
        key = (op, dtype)
        if op and key not in self._gates:
            name = str(dtype).removeprefix("torch.")
            backend = "triton" if self.settings.device.type == "cuda" else None
            ran = verify(
                self.settings.device,
                dtypes=[name],
                backends=[backend] if backend else self._cpu_backends(op),
                ops=[op],
            )
            failed = [
                f"{c.op} {c.what}, {c.backend} {c.dtype}: {c.message or c.where}"
                for c in ran.checks
                if not c.passed
            ]
            nothing = [] if ran.checks else [f"{op}: no check ran"]
            self._gates[key] = "; ".join(failed + nothing) or None
        return self._gates.get(key)

    @staticmethod
    def _cpu_backends(op: str) -> list[str]:
        return ["sdpa"] if op in ("varlen_attention", "encoder") else ["eager"]

    def _run_within_memory(self, case: Case, result: CaseResult, *args: Any) -> None:
        """Run a case; one that runs out of memory once its rivals take turns is left out."""
        try:
            with _threads(case.threads):
                self._run(case, result, *args)
        except torch.OutOfMemoryError:
            result.status, result.reason = "left out", "no memory for all its rivals at once"

    def _run(
        self,
        case: Case,
        result: CaseResult,
        on_ours: Callable[[Callable[[], None]], None] | None,
    ) -> None:
        prepared = case.prepare()
        outcomes = {
            r.name: RivalResult(r.name, r.role, "measured", weight_bytes=r.weight_bytes)
            for r in prepared.rivals
        }
        result.rivals = list(outcomes.values())
        expected = None
        if prepared.reference is not None:
            expected = [a.detach() for a in prepared.reference()]
        runs: dict[str, Run] = {}
        for rival in prepared.rivals:
            outcome = outcomes[rival.name]
            if not self._admitted(rival, outcome):
                continue
            made = self._made(rival, outcome)
            if made is None:
                continue
            run, outputs = made
            if rival.role in ("ours", "peer"):
                expected = outputs if expected is None else expected
                outcome.difference = worst_difference(outputs, expected)
                limit = case.tolerance or TOLERANCE[case.dtype]
                if math.isinf(outcome.difference) or outcome.difference > limit:
                    outcome.status = "differs"
                    outcome.reason = f"off by {outcome.difference:.1e}, the limit is {limit:.0e}"
                    continue
            if not rival.pooled:
                outcome.memory_bytes = peak_memory(run, self.settings.device)
            runs[rival.name] = run
        del expected
        ours = next(r.name for r in prepared.rivals if r.role == "ours")
        if ours not in runs:
            result.status = "gate failed"
            result.reason = f"{ours}: {outcomes[ours].reason}"
            return
        self._time(case, runs, ours, outcomes)
        if on_ours:
            on_ours(lambda: (runs[ours](), synchronize(self.settings.device))[1])

    def _admitted(self, rival: Rival, outcome: RivalResult) -> bool:
        if rival.full_only and not self.settings.full:
            outcome.status, outcome.reason = "left out", "runs with --full"
        elif rival.compiles and not self.settings.compiled:
            outcome.status, outcome.reason = "left out", "compiles, which was not asked for"
        elif rival.compiles and not rival.headline and time.monotonic() > self.compiling_deadline:
            outcome.status, outcome.reason = "left out", "the suite's time was used up"
        return outcome.status == "measured"

    def _made(self, rival: Rival, outcome: RivalResult) -> tuple[Run, list[Tensor]] | None:
        """The rival, warm, and what it computed."""
        try:
            run = rival.make()
            run()
            results, outcome.sdpa = sdpa_of(run)
            outputs = [a.detach() for a in results]
            synchronize(self.settings.device)
        except Unavailable as error:
            outcome.status, outcome.reason = "unavailable", str(error)
            return None
        except torch.OutOfMemoryError:
            outcome.status, outcome.reason = "out of memory", "the device has too little memory"
        except Exception as error:  # whatever a peer raises is its result, and the rest still runs
            message = (str(error).strip() or "no message").splitlines()[0]
            outcome.status, outcome.reason = "failed", f"{type(error).__name__}: {message}"[:300]
        else:
            return run, outputs
        self._free_memory()
        return None

    def _time(
        self, case: Case, runs: dict[str, Run], ours: str, outcomes: dict[str, RivalResult]
    ) -> None:
        s = self.settings
        fewest = s.min_rounds if case.min_rounds is None else min(s.min_rounds, case.min_rounds)
        timings = take_turns(
            runs,
            s.device,
            budget_s=s.round_s,
            min_rounds=s.rounds or fewest,
            max_rounds=s.rounds or s.max_rounds,
        )
        for name, timing in timings.items():
            self._record(outcomes[name], timing, timings[ours], case)

    def _record(self, outcome: RivalResult, timing: Timing, ours: Timing, case: Case) -> None:
        outcome.median_s = timing.median
        outcome.p20_s, outcome.p80_s = timing.quantile(0.2), timing.quantile(0.8)
        outcome.rounds = len(timing.seconds)
        if outcome.role != "ours":
            outcome.ratio = median_ratio(timing, ours)
        if case.flops:
            outcome.flops_per_second = case.flops / timing.median
            outcome.share_of_product = outcome.flops_per_second / self.ceilings.flops_per_second
        if case.bytes:
            outcome.bytes_per_second = case.bytes / timing.median
            outcome.share_of_copy = outcome.bytes_per_second / self.ceilings.copy_bytes_per_second

    def _release(self) -> None:
        """Give back what the last rivals held: graphs, compiled code, the device's memory.

        Between cases only: rivals of the same case would be compiled again while they are timed.
        """
        torch.compiler.reset()
        self._free_memory()

    def _free_memory(self) -> None:
        if self.settings.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def write(self) -> None:
        """Write the result file, complete or not at all."""
        s = self.settings
        document = {
            "schema": SCHEMA,
            "suite": self.suite,
            "machine": self.machine,
            "ceilings": self.ceilings._asdict(),
            "settings": {
                "full": s.full,
                "small": s.small,
                "round_s": s.round_s,
                "rounds": s.rounds,
            },
            "gates": [
                {"op": op, "dtype": str(dtype).removeprefix("torch."), "failure": failure}
                for (op, dtype), failure in self._gates.items()
            ],
            "cases": [asdict(case) for case in self.cases],
        }
        write_text(self.path, json.dumps(finite(document), indent=1, allow_nan=False) + "\n")


def worst_difference(outputs: Outputs, expected: Outputs) -> float:
    """Largest relative difference of the tensors; infinite where shapes do not fit, or NaN."""
    if len(outputs) != len(expected):
        return math.inf
    worst = 0.0
    for got, want in zip(outputs, expected, strict=True):
        if got.shape != want.shape:
            return math.inf
        difference = ((got.float() - want.float()).norm() / want.float().norm()).item()
        worst = math.inf if math.isnan(difference) else max(worst, difference)
    return worst


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit_here() -> str:
    """Short hash of the checkout, with "-dirty" where tracked files differ; else "unknown".

    Results that this run has written already are no difference.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=RESULTS.parent.parent, capture_output=True, text=True,
            timeout=20, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    try:
        commit = git("describe", "--always", "--exclude=*")
        changed = git("status", "--porcelain", "-uno", "--", ".", f":!benchmarks/{RESULTS.name}")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + "-dirty" * bool(changed) if commit else "unknown"


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """With so many threads, for what is compiled too; None: as many as there are.

    Inductor writes the number into its code, and its cache does not tell codes by it.
    """
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with inductor.patch({"cpp.threads": count}):
            yield
    finally:
        torch.set_num_threads(before)


def slug(text: str) -> str:
    """Letters, digits and dots, the rest as single underscores."""
    kept = "".join(c if c.isalnum() or c == "." else " " for c in text.lower())
    return "_".join(kept.split())


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON has no words for."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
