"""Installs the PTX machine for one chip or the other, and fails a test that it has findings for."""

import pytest

import ptx_machine


@pytest.fixture(params=[80, 90], ids="sm_{}".format)
def gpu(request):
    """The machine of each chip; a test must leave no finding."""
    machine = ptx_machine.install(request.param)
    yield machine
    assert not machine.report, machine.report
