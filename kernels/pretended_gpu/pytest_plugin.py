"""Run tests marked gpu, or suites of benchmarks, on the pretended GPU; see ``make pretended``.

    python -m pytest -p pretended_gpu.pytest_plugin -m gpu tests --not-carried FILE --report FILE

`--not-carried` names a JSON file of what the pretence can't carry:

    {"reasons": {"kind": "explanation"}, "tests": {"test id, * for anything": "kind"}}

A test listed there has to fail: one that passes fails the run, as does a pattern that no test of
the run's files has. Where the explanation begins with "not run" it is not run.

`--report` has the counts by file; a run of some files renews theirs. Processes that a test starts
with this one's environment have a pretended GPU too.
"""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import pretended_gpu

pretended_gpu.install()


def pytest_addoption(parser: Any) -> None:
    """The options."""
    group = parser.getgroup("pretended GPU")
    group.addoption("--not-carried", type=Path, help="what the pretended GPU can't carry, and why")
    group.addoption("--report", type=Path, help="JSON file of the counts by file")
    group.addoption("--commit-of-report", help="commit to name in it")
    group.addoption(
        "--eager-compile",
        action="store_true",
        help="torch.compile hands its function back: a pretended tensor can't be traced",
    )


def pytest_configure(config: Any) -> None:
    """Pretend in processes to come, and take torch.compile away where that was asked for."""
    here = Path(__file__).parent
    paths = [
        str(here / "everywhere"),
        str(here.parent),
        *os.environ.get("PYTHONPATH", "").split(":"),
    ]
    os.environ["PYTHONPATH"] = ":".join(filter(None, paths))
    if config.getoption("--report"):
        config.pluginmanager.register(Report(config.getoption("--report"), config))
    if config.getoption("--eager-compile"):
        import torch

        torch.compile = _hand_back
        torch.compiler.reset = lambda: None


def _hand_back(model: Any = None, **options: Any) -> Any:
    return (lambda function: function) if model is None else model


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Expect the failures that are listed."""
    path = config.getoption("--not-carried")
    if path is None:
        return
    listed = json.loads(path.read_text())
    patterns: dict[str, str] = listed["tests"]
    unused = set(patterns)
    for item in items:
        for pattern, kind in patterns.items():
            if matches(item.nodeid, pattern):
                unused.discard(pattern)
                why = listed["reasons"][kind]
                marker = pytest.mark.xfail(
                    reason=f"not carried ({kind}): {why}",
                    run=not why.startswith("not run"),
                    strict=True,
                )
                item.add_marker(marker)
    files = {item.nodeid.partition("::")[0] for item in items}
    unused = {pattern for pattern in unused if pattern.partition("::")[0] in files}
    if unused and not config.option.keyword:
        raise pytest.UsageError(f"{path}: no test of this run is {sorted(unused)}")


def matches(test_id: str, pattern: str) -> bool:
    """Whether `pattern`, in which only ``*`` is special, stands for the test."""
    return fnmatchcase(test_id, pattern.replace("[", "[[]"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: Any) -> Any:
    """Leave no mode of one test to the next."""
    record = pretended_gpu.RECORD
    record.clear()
    record.sync_mode, record.captured = "default", None
    try:
        return (yield)
    finally:
        record.sync_mode, record.captured = "default", None


class Report:
    """The counts of each file of tests, written after each test.

    Those of files that the run does not have stay, so that a report can be made in pieces; each
    has its commit.
    """

    def __init__(self, path: Path, config: Any):
        self.path, self.config = path, config
        known = json.loads(path.read_text())["files"] if path.exists() else {}
        self.files: dict[str, Any] = {
            name: counts for name, counts in known.items() if (config.rootpath / name).exists()
        }
        self.begun: set[str] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count the outcome of a test, and the kernels that it launched."""
        name = report.nodeid.partition("::")[0]
        if name not in self.begun:
            self.begun.add(name)
            commit = self.config.getoption("--commit-of-report")
            self.files[name] = {"commit": commit, **dict.fromkeys(_OUTCOMES, 0), "kernels": []}
        counts = self.files[name]
        outcome = self.config.hook.pytest_report_teststatus(report=report, config=self.config)[0]
        if outcome in _OUTCOMES:
            counts[outcome] += 1
        if report.when == "call":
            launched = {launch.kernel for launch in pretended_gpu.RECORD.launches}
            counts["kernels"] = sorted(launched.union(counts["kernels"]))
            counts["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.write()

    def write(self) -> None:
        """All of it, in the order of the names of the files."""
        files = dict(sorted(self.files.items()))
        document = {
            "device": "none: a pretended H200, on which no kernel runs",
            "versions": {name: version(name) for name in _PACKAGES},
            "outcomes": {o: sum(counts[o] for counts in files.values()) for o in _OUTCOMES},
            "files": files,
        }
        self.path.write_text(json.dumps(document, indent=1) + "\n")


_OUTCOMES = ("passed", "failed", "error", "xfailed", "skipped")
_PACKAGES = ("torch", "triton", "transformers", "numpy")
