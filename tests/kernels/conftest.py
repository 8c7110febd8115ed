"""What torch.empty hands out is full of NaN here: an element no kernel wrote shows up.

The kernels run in Triton's interpreter, or, with KERNELS_ON=sm_80 or sm_90, as compiled for that
chip on ptx_machine. Then a test fails if the machine has findings, and with COMPILED_OUT=FOLDER
how many passed is written there at the end.
"""

import os
from collections import Counter
from pathlib import Path

import pytest

CHIP, OUT = os.environ.get("KERNELS_ON"), os.environ.get("COMPILED_OUT")
MACHINE = None
OUTCOMES = Counter()
if CHIP:
    import ptx_machine
    from benchmarks.compiled import results

    MACHINE = ptx_machine.install(int(CHIP.removeprefix("sm_")))
    from tests.compiled.judge import findings_of

from tests.kernels import helpers  # noqa: E402  (asks whether there is a machine)


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    helpers.poison_empty(monkeypatch)


@pytest.fixture(autouse=True)
def no_findings(request):
    """Of ptx_machine; kernels with a seeded bug may have some."""
    if MACHINE is None:
        yield
        return
    MACHINE.report.clear()
    yield
    if "mutations" not in request.node.nodeid and "seeded" not in request.node.name:
        assert not findings_of(MACHINE.report), MACHINE.report


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        OUTCOMES[report.outcome] += 1


def pytest_sessionfinish(session):
    """Write the outcomes once, not in the workers of xdist."""
    if CHIP and OUT and OUTCOMES and not hasattr(session.config, "workerinput"):
        results.write_tests(Path(OUT), CHIP, OUTCOMES)
