"""What torch.empty hands out is full of NaN here: an element no kernel wrote shows up.

The kernels run in Triton's interpreter, or, with KERNELS_ON=sm_80 or sm_90, as compiled for that
chip on ptx_machine. Then a test fails if the machine has findings.
"""

import os

import pytest

CHIP = os.environ.get("KERNELS_ON")
MACHINE = None
if CHIP:
    import ptx_machine

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
