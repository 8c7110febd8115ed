"""``hrvlm doctor``."""

import json

import torch

import hrvlm
from hrvlm.verification.cases import CASES
from hrvlm_kernels.backends import OPS
from tests.commands.helpers import run


def test_doctor_reports_versions_and_backends():
    document = json.loads(run("doctor", "--json").stdout)
    assert document["packages"]["torch"] == torch.__version__.partition("+")[0] or (
        document["packages"]["torch"] == torch.__version__
    )
    assert document["hrvlm"] == hrvlm.__version__ and document["problems"] == []
    assert set(document["backends"]) == {"auto", "triton", "flash_attn", "sdpa", "eager"}
    for ops in document["backends"].values():
        assert [*ops] == [*OPS]
    table = run("doctor")
    assert table.exit_code == 0 and "torch" in table.stdout and "varlen_attention" in table.stdout


def test_doctor_lists_what_verify_checks():
    """Beside the encoder, which is no op but runs them."""
    backends = json.loads(run("doctor", "--json").stdout)["backends"]
    checked = [name for name in CASES if name != "encoder"]
    assert all([*ops] == checked for ops in backends.values())


def test_doctor_finds_a_package_that_does_not_import(monkeypatch):
    from hrvlm.commands import doctor

    def import_module(name):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    result = run("doctor")
    assert result.exit_code == 1
    assert "PROBLEM: torchvision" in result.stdout and "nms does not exist" in result.stdout
