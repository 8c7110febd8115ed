"""Ops and whole models as compiled for sm_90: right by the rules, and nothing found."""

import pytest
import torch

from tests.compiled.cases import check_columns, check_launchers, selected
from tests.compiled.models import model_cases
from tests.compiled.towers import tower_cases
from tests.kernels.mutations import plant

CHIP = 90
pytestmark = pytest.mark.parametrize("chip", [CHIP], ids="sm_{}".format)


@pytest.mark.parametrize(
    "case", selected(CHIP, (*model_cases(), *tower_cases())), ids=lambda case: case.name
)
def test_case(run_case, case):
    run_case(case)


@pytest.mark.parametrize("head_dim", [72, 80])
def test_no_columns_are_computed_for_nothing(machine, chip, head_dim):
    check_columns(machine, head_dim)


def test_the_launchers_know_the_chip(machine, chip):
    check_launchers(chip)


def test_versions_of_the_package_share_a_cache_folder(machine, chip, monkeypatch, tmp_path, rng):
    """Triton keeps a kernel by its source and that of all it calls: here a function elsewhere."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    x, weight = torch.randn(3, 32, generator=rng), torch.ones(32)

    def norm_in(folder, factor):
        folder = tmp_path / folder
        folder.mkdir()
        normed = torch.empty_like(x)
        with monkeypatch.context() as patch:
            called = "layer_norm_pixel_shuffle", "rstd[:, None], rstd\n"
            plant(patch, folder, *called, f"rstd[:, None] * {factor}, rstd\n")
            same = "residual_layer_norm", '"""The Triton kernels of', '"""The Triton kernels of'
            version = plant(patch, folder, *same)
            version.forward_shifted(x, None, weight, None, 1e-5, normed)
        return normed

    old, new = norm_in("old", 1.0), norm_in("new", 2.0)
    torch.testing.assert_close(old, torch.nn.functional.layer_norm(x, (32,)))
    torch.testing.assert_close(new, 2 * old)
    kept = sorted(cache.rglob("*"))
    assert kept
    assert torch.equal(norm_in("old again", 1.0), old)
    assert torch.equal(norm_in("new again", 2.0), new)
    assert sorted(cache.rglob("*")) == kept  # found there, not compiled again
