"""Kernels as compiled for a chip, run on ptx_machine: the core of the cases, or all of them.

``COMPILED=all`` takes all cases; ``COMPILED_OUT=FOLDER`` writes a result file for each chip there
at the end. ``make compiled`` sets both. See own_process.py for how these files run.
"""

import functools
import json
import os
from pathlib import Path

import pytest
import torch
import triton

import ptx_machine
from benchmarks.compiled import results
from hrvlm_kernels.triton_kernels import launch
from tests.compiled.judge import assert_clean, judge
from tests.kernels import helpers

OUT = os.environ.get("COMPILED_OUT")
ROWS: list[dict] = []


@functools.cache
def machine_of(chip: int) -> ptx_machine.PtxDriver:
    """Made once: it keeps the programs that it has translated."""
    return ptx_machine.install(chip)


@pytest.fixture
def machine(chip):
    """The machine as `chip`, which the test is parametrized with."""
    driver = machine_of(chip)
    triton.runtime.driver.set_active(driver)
    for cached in (launch.architecture, launch.multiprocessors):
        cached.cache_clear()
    torch.set_num_threads(1)
    return driver


@pytest.fixture
def record(record_property):
    """Keep a row for the result file."""
    return lambda **row: record_property("compiled", json.dumps(row))


@pytest.fixture
def run_case(machine, chip, record):
    """Judge a case and keep what came of it; it has to be right, and without a finding."""

    def run(case):
        outcome = judge(machine, case.run)
        names = {"op": case.op, "dtype": case.dtype, "configuration": case.configuration}
        record(kind="case", chip=chip, **names, **outcome.to_json())
        assert_clean(outcome)

    return run


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    helpers.poison_empty(monkeypatch)


def pytest_runtest_logreport(report):
    if report.when == "call":
        ROWS.extend(json.loads(text) for name, text in report.user_properties if name == "compiled")


def pytest_sessionfinish(session):
    """Write the results once, not in the workers of xdist."""
    if OUT and ROWS and not hasattr(session.config, "workerinput"):
        results.write(Path(OUT), ROWS)
