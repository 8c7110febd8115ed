"""Ops and whole models as compiled for sm_90: right by the rules, and nothing found."""

import pytest

from tests.compiled.cases import check_launchers, selected
from tests.compiled.models import model_cases
from tests.compiled.towers import tower_cases

CHIP = 90
pytestmark = pytest.mark.parametrize("chip", [CHIP], ids="sm_{}".format)


@pytest.mark.parametrize(
    "case", selected(CHIP, (*model_cases(), *tower_cases())), ids=lambda case: case.name
)
def test_case(run_case, case):
    run_case(case)


def test_the_launchers_know_the_chip(machine, chip):
    check_launchers(chip)
