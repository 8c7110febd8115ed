"""Collects the tests of this folder for `make conformance` only.

Those that do not apply (``not_applicable.json``) have to fail: one that passes, or that is not
there, fails the run. The outcome of a run of all tests goes into the file that CONFORMANCE names.
"""

import datetime
import json
import os
import platform
from collections import Counter, defaultdict
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path

import pytest

OUTCOME = os.environ.get("CONFORMANCE")  # "-" keeps none
collect_ignore_glob = ["test_*.py"] if OUTCOME is None else []
LIST = Path(__file__).with_name("not_applicable.json")
# Marks of transformers' own conftest.py.
MARKS = (
    "accelerate_tests bitsandbytes flash_attn_test flash_attn_3_test flash_attn_4_test "
    "flash_attn_kernels_test flash_attn_kernels_mps_test fsdp_test generate is_fsdp_test "
    "is_pipeline_test is_tensor_parallel_test is_training_test run_first torch_compile_test "
    "torch_export_test training_ci"
)
counts = defaultdict(Counter)
failed = []
unmet = set()


def listed():
    """Patterns of tests that do not apply here, and why: some only with the newest release."""
    kept = json.loads(LIST.read_text())
    tests = kept["tests"] | (kept["newest"] if is_newest() else {})
    return {pattern: kept["reasons"][key]["why"] for pattern, key in tests.items()}


def is_newest():
    constraints = (Path(__file__).parents[2] / "constraints.txt").read_text()
    return f"transformers=={version('transformers')}\n" not in constraints


def pytest_configure(config):
    for mark in MARKS.split():
        config.addinivalue_line("markers", f"{mark}: of transformers' tests")
    if OUTCOME is not None:
        unmet.update(listed())


def pytest_collection_modifyitems(items):
    for item in items if OUTCOME is not None else ():
        name = f"{item.cls.__name__}::{item.name}" if getattr(item, "cls", None) else ""
        for pattern, why in listed().items():
            if fnmatchcase(name, pattern):
                item.add_marker(pytest.mark.xfail(reason=f"[{pattern}] {why}", strict=True))


def pytest_runtest_logreport(report):
    """Count by class; a test that is skipped before it runs has no call."""
    if OUTCOME is None or (report.when != "call" and report.passed):
        return
    name, test = report.nodeid.split("::")[1:3]
    kind = report.outcome
    if hasattr(report, "wasxfail") and report.skipped:
        kind = "does not apply"
        unmet.discard(report.wasxfail.partition("]")[0].removeprefix("["))
    counts[name][kind] += 1
    if report.failed:
        failed.append(f"{name}::{test}")


def pytest_sessionfinish(session):
    """Keep what a run of all tests showed, in the process that has all reports."""
    if OUTCOME in (None, "-") or hasattr(session.config, "workerinput"):
        return
    kept = {
        "date": datetime.date.today().isoformat(),
        "transformers": version("transformers"),
        "torch": version("torch").partition("+")[0],
        "Python": platform.python_version(),
        "classes": {name: dict(sorted(counts[name].items())) for name in sorted(counts)},
        "failed": sorted(failed + [f"{pattern}: no test fails" for pattern in unmet]),
    }
    Path(OUTCOME).parent.mkdir(exist_ok=True)
    Path(OUTCOME).write_text(json.dumps(kept, indent=2) + "\n")
    if unmet:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if OUTCOME not in (None, "-") and unmet:
        terminalreporter.write_line(f"{LIST.name}: no test fails that {sorted(unmet)} names")
