import pytest
import torch

from hrvlm.explore.reduction import COMPONENTS, reduce_features


def features(n, width, rank, rng, noise=0.0, offset=3.0):
    mixed = torch.randn(n, rank, generator=rng) @ torch.randn(rank, width, generator=rng)
    return mixed + offset + noise * torch.randn(n, width, generator=rng)


def cosines(x):
    x = torch.nn.functional.normalize(x.double(), dim=1)
    return x @ x.T


def test_features_of_few_dimensions_keep_their_similarities(rng):
    x = features(300, 96, 20, rng)
    reduced = reduce_features(x)
    coordinates = reduced.coordinates()
    assert coordinates.shape == (300, COMPONENTS) and reduced.values.dtype == torch.int8
    error = (coordinates @ coordinates.T - cosines(x)).abs().max()
    assert error < 0.01  # what int8 costs
    assert reduced.variance_kept == pytest.approx(1) and reduced.width == 96


@pytest.mark.parametrize("components", [4, 16])
def test_what_is_lost_is_said(components, rng):
    x = features(400, 48, 48, rng)
    reduced = reduce_features(x, components)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    v = torch.linalg.svd(unit, full_matrices=False).Vh[:components].T
    around = unit - unit.mean(0)
    kept = (around @ v).square().sum() / around.square().sum()
    assert reduced.variance_kept == pytest.approx(kept.item(), abs=1e-5)
    z = reduced.coordinates().double()
    lost = (z @ z.T).clamp(-1, 1) - cosines(x)
    lost.fill_diagonal_(0)
    assert reduced.compared == 400
    assert reduced.largest_error == pytest.approx(lost.abs().max().item(), abs=1e-5) and kept < 0.9


def test_of_many_patches_some_are_compared_with_all(rng):
    x = features(9000, 8, 8, rng)
    reduced = reduce_features(x, 4)
    assert reduced.compared == 2**25 // 9000
    some = torch.arange(reduced.compared) * 9000 // reduced.compared
    z = reduced.coordinates()
    lost = (z[some] @ z.T).clamp(-1, 1) - cosines(x)[some].float()
    lost[torch.arange(len(some)), some] = 0
    assert reduced.largest_error == pytest.approx(lost.abs().max().item(), abs=1e-5)


def test_constant_single_and_zero_features():
    for x in (torch.full((5, 70), 2.0), torch.ones(1, 70), torch.zeros(3, 70)):
        reduced = reduce_features(x)
        assert reduced.coordinates().isfinite().all() and reduced.variance_kept == 1
        assert reduced.largest_error < 1e-2


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 4), r"\[n, C\] with n >= 1"),
        (torch.zeros(4), r"\[n, C\]"),
        (torch.tensor([[1.0, float("nan")]]), "not finite"),
    ],
)
def test_what_can_not_be_reduced(x, message):
    with pytest.raises(ValueError, match=message):
        reduce_features(x)
