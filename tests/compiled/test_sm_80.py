"""Ops and whole models as compiled for sm_80: right by the rules, and nothing found."""

from itertools import product

import pytest

from hrvlm_kernels.backends import OPS
from tests.compiled.cases import DTYPES, all_cases, check_columns, check_launchers, selected
from tests.compiled.models import model_cases
from tests.compiled.towers import tower_cases

CHIP = 80
pytestmark = pytest.mark.parametrize("chip", [CHIP], ids="sm_{}".format)


@pytest.mark.parametrize(
    "case", selected(CHIP, (*model_cases(), *tower_cases())), ids=lambda case: case.name
)
def test_case(run_case, case):
    run_case(case)


def test_every_op_has_cases_of_every_dtype(chip):
    cases = list(all_cases())
    assert set(product(OPS, DTYPES)) <= {(case.op, case.dtype) for case in cases}
    assert {case.op for case in cases if case.core} >= set(
        OPS
    )  # in `make test`, on a chip at least


@pytest.mark.parametrize("head_dim", [72, 80])
def test_no_columns_are_computed_for_nothing(machine, chip, head_dim):
    check_columns(machine, head_dim)


def test_the_launchers_know_the_chip(machine, chip):
    check_launchers(chip)
