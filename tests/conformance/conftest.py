"""Collects the tests of this folder for `make conformance` only.

Those that do not apply (``not_applicable.json``) have to fail: one that passes, or that is not
there, fails the run. The outcome of whole classes goes into the file that CONFORMANCE names.
"""

import datetime
import json
import os
import platform
from collections import Counter, defaultdict
from contextlib import nullcontext
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
found = {}  # of each test: passed, failed, skipped, does not apply
met = set()


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


def pytest_collection_modifyitems(items):
    for item in items if OUTCOME is not None else ():
        name = f"{item.cls.__name__}::{item.name}" if getattr(item, "cls", None) else ""
        for pattern, why in listed().items():
            if fnmatchcase(name, pattern):
                item.add_marker(pytest.mark.xfail(reason=f"[{pattern}] {why}", strict=True))


@pytest.fixture(autouse=True)
def listed_tests_have_no_parts(request):
    """Where a part may fail by itself, pytest takes the rest for a test that passes."""
    if request.node.get_closest_marker("xfail") and hasattr(request.instance, "subTest"):
        request.instance.subTest = lambda *_, **__: nullcontext()


def pytest_runtest_logreport(report):
    """Note the outcome; a failure of a part of a test, or of what is around it, is the test's."""
    if OUTCOME is None or "::" not in report.nodeid:
        return
    name = "::".join(report.nodeid.split("::")[1:])
    kind = report.outcome
    if hasattr(report, "wasxfail") and report.skipped:
        kind = "does not apply"
        met.add(report.wasxfail.partition("]")[0].removeprefix("["))
    subtest = type(report).__name__ == "SubtestReport"
    tells = kind == "failed" if subtest else report.when == "call" or kind != "passed"
    if tells and found.get(name) != "failed":
        found[name] = kind


def pytest_sessionfinish(session):
    """Keep what all tests of some classes showed, in the process that has all reports."""
    if OUTCOME in (None, "-") or hasattr(session.config, "workerinput"):
        return
    counts = defaultdict(Counter)
    for name, kind in found.items():
        counts[name.partition("::")[0]][kind] += 1
    failed = sorted(name for name, kind in found.items() if kind == "failed")
    failed += [f"{pattern}: no test of that name fails" for pattern in sorted(unmet(counts))]
    path = Path(OUTCOME)
    before = json.loads(path.read_text()) if path.exists() else {}
    classes = before.get("classes", {}) | {n: dict(sorted(counts[n].items())) for n in counts}
    kept = {
        "date": datetime.date.today().isoformat(),
        "transformers": version("transformers"),
        "torch": version("torch").partition("+")[0],
        "Python": platform.python_version(),
        "classes": dict(sorted(classes.items())),
    }
    listed_here = sorted(name for name, kind in found.items() if kind == "does not apply")
    for key, names in (("failed", failed), ("does not apply", listed_here)):
        others = [n for n in before.get(key, []) if n.partition("::")[0] not in counts]
        kept[key] = sorted(others + names)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=2) + "\n")
    if failed:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def unmet(classes):
    """Entries of the list for these classes that no test has met."""
    named = {pattern for pattern in listed() if pattern not in met}
    return {p for p in named if any(fnmatchcase(c, p.partition("::")[0]) for c in classes)}


def pytest_terminal_summary(terminalreporter):
    if OUTCOME not in (None, "-"):
        for pattern in sorted(unmet({name.partition("::")[0] for name in found})):
            terminalreporter.write_line(f"{LIST.name}: no test fails that is named {pattern}")
