"""Options and fixtures of ``python -m pytest benchmarks``.

Each suite is a module with a name, a device, a time budget and its cases:

    SUITE = "rope_2d"        # of the result file
    DEVICE = "cuda"          # or "cpu"
    BUDGET_S = 30            # without --full
    def cases(settings): ... # what is compared

    def bench_rope_2d(run_case, case):
        run_case(case)
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.case import RESULTS, Settings
from benchmarks.suite import SuiteRun


def pytest_addoption(parser):
    """The options of the benchmarks."""
    group = parser.getgroup("benchmarks of hrvlm")
    group.addoption("--full", action="store_true", help="all models, peers and sizes: hours")
    group.addoption("--small", action="store_true", help="tiny inputs, to see that they run")
    group.addoption("--budget", type=float, help="seconds for each suite; default: its own")
    group.addoption("--seconds", type=float, default=1.0, help="for the rounds of each case")
    group.addoption("--rounds", type=int, help="so many in each case, whatever they take")
    group.addoption("--results", type=Path, default=RESULTS, help="directory of the JSON files")
    group.addoption("--commit", help="commit to name in them, where there is no git")


def pytest_configure(config):
    """Refuse what no case can have."""
    rounds = config.getoption("--rounds")
    if rounds is not None and rounds < 1:
        raise pytest.UsageError(f"--rounds must be at least 1, got {rounds}")


def settings_of(config, module) -> Settings:
    """How the suite in `module` is run."""
    return Settings(
        device=torch.device(module.DEVICE),
        full=config.getoption("--full"),
        small=config.getoption("--small"),
        round_s=config.getoption("--seconds"),
        rounds=config.getoption("--rounds"),
        results=config.getoption("--results"),
        commit=config.getoption("--commit"),
    )


def pytest_generate_tests(metafunc):
    """A test for each case of the suite."""
    if "case" in metafunc.fixturenames:
        cases = list(metafunc.module.cases(settings_of(metafunc.config, metafunc.module)))
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture(scope="module")
def suite_run(request):
    """The run of the suite that the test belongs to."""
    module = request.module
    if module.DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{module.SUITE} is measured on a GPU, and torch sees none")
    budget = request.config.getoption("--budget")
    run = SuiteRun(
        module.SUITE,
        settings_of(request.config, module),
        budget_s=module.BUDGET_S if budget is None else budget,
    )
    yield run
    print(f"\n{run.path}")


@pytest.fixture
def run_case(suite_run, benchmark):
    """A function that runs a case, gives pytest-benchmark ours, and fails on a red gate."""

    def run(case):
        benchmark.group = f"{suite_run.suite}: {case.group}"
        result = suite_run.measure(
            case, on_ours=lambda ours: benchmark.pedantic(ours, rounds=5, warmup_rounds=0)
        )
        benchmark.extra_info["rivals"] = {
            r.name: f"{r.ratio:.2f}x our time" if r.ratio else r.status for r in result.rivals
        }
        if result.status == "left out":
            pytest.skip(result.reason)
        if result.status != "measured":
            pytest.fail(f"{result.status}: {result.reason}", pytrace=False)

    return run
