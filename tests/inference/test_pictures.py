import numpy as np
import pytest
import torch
from PIL import Image

from hrvlm.inference.pictures import (
    attention_picture,
    heat_colors,
    pca_colors,
    pca_picture,
    principal_components,
    sheet,
    unit_range,
)


@pytest.mark.parametrize("shape", [(50, 8), (12, 40)])
def test_principal_components_are_those_of_the_svd(shape, rng):
    x = torch.randn(shape, generator=rng) * torch.linspace(3, 0.5, shape[1]) + 7
    scores = principal_components(x)
    u, s, _ = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
    expected = u[:, :3] * s[:3]
    signs = (scores * expected).sum(0).sign()
    torch.testing.assert_close(scores, expected * signs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(50, 8), (12, 40)])
def test_the_sign_of_a_component_is_fixed(shape, rng):
    x = torch.randn(shape, generator=rng)
    order = torch.randperm(shape[0], generator=rng)
    scores = principal_components(x)
    assert torch.equal(scores, principal_components(x.clone()))
    torch.testing.assert_close(principal_components(x[order]), scores[order])
    # An image's mirror image has the features' negatives about the mean: the axes stay.
    torch.testing.assert_close(principal_components(-x), -scores)


def test_components_that_the_data_lack_are_zero(rng):
    assert torch.equal(principal_components(torch.randn(1, 5, generator=rng)), torch.zeros(1, 3))
    two = principal_components(torch.randn(2, 5, generator=rng))
    assert two[:, 0].abs().min() > 0 and torch.equal(two[:, 1:], torch.zeros(2, 2).double())
    line = torch.linspace(-1, 1, 9)[:, None] * torch.tensor([1.0, 2.0, 3.0, 4.0]) + 5
    assert principal_components(line)[:, 1:].abs().max() == 0
    constant = torch.full((6, 4), 0.1) + 1e-8 * torch.randn(6, 4, generator=rng)
    assert torch.equal(principal_components(constant), torch.zeros(6, 3).double())


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (1, 40), (3, 2)])
def test_colors_of_small_and_constant_maps_are_finite(grid, rng):
    for features in (torch.randn(16, *grid, generator=rng), torch.full((16, *grid), 3.0)):
        (colors,) = pca_colors([features])
        assert colors.shape == (3, *grid) and colors.dtype == torch.float32
        assert colors.isfinite().all() and colors.min() >= 0 and colors.max() <= 1
    assert torch.equal(colors, torch.full((3, *grid), 0.5))


def test_colors_show_where_features_differ(rng):
    features = torch.randn(32, 1, 1, generator=rng).repeat(1, 6, 8)
    features[:, :, 4:] += torch.randn(32, 1, 1, generator=rng)
    (colors,) = pca_colors([features])
    left, right = colors[:, :, :4].flatten(1), colors[:, :, 4:].flatten(1)
    assert left.std(1).max() < 1e-6 and right.std(1).max() < 1e-6
    assert (left.mean(1) - right.mean(1)).abs().max() == 1


def test_joint_colors_agree_across_images_and_single_ones_use_the_full_range(rng):
    shared = torch.randn(16, 2, 2, generator=rng)
    first = torch.cat([shared, torch.randn(16, 2, 5, generator=rng)], dim=2)
    second = torch.cat([shared, 4 * torch.randn(16, 2, 1, generator=rng)], dim=2)
    joint, single = pca_colors([first, second], joint=True), pca_colors([first, second])
    torch.testing.assert_close(joint[0][:, :, :2], joint[1][:, :, :2])
    assert (single[0][:, :, :2] - single[1][:, :, :2]).abs().max() > 0.05
    for colors, features in zip(single, (first, second), strict=True):
        assert colors.shape == (3, *features.shape[1:])
        assert colors.amin((1, 2)).max() == 0 and colors.amax((1, 2)).min() == 1
    assert pca_colors([], joint=True) == []


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(0, 3), "n >= 1"),
        (torch.zeros(3), r"\[n, C\]"),
        (torch.full((4, 3), float("nan")), "not finite"),
    ],
)
def test_features_that_have_no_components(features, message):
    with pytest.raises(ValueError, match=message):
        principal_components(features)


def test_unit_range_clips_outliers_and_keeps_constants_dark():
    values = torch.cat([torch.linspace(0, 1, 400), torch.tensor([1000.0])])
    scaled = unit_range(values)
    assert scaled.max() == 1 and scaled[200] == pytest.approx(0.5, abs=0.02)
    assert torch.equal(unit_range(torch.full((3, 4), 0.25)), torch.zeros(3, 4))
    assert torch.equal(unit_range(torch.zeros(2)), torch.zeros(2))
    spike = torch.zeros(20, 20)
    spike[3, 5] = 2.0
    assert unit_range(spike)[3, 5] == 1 and unit_range(spike).sum() == 1


def test_heat_gets_lighter_all_the_way():
    colors = heat_colors(torch.linspace(0, 1, 101))
    assert colors.shape == (101, 3) and colors.min() >= 0 and colors.max() <= 1
    luma = colors @ torch.tensor([0.299, 0.587, 0.114])
    assert (luma.diff() > 0).all()


def test_pca_picture_keeps_patches_sharp(rng):
    colors = torch.rand(3, 2, 3, generator=rng)
    pixels = np.asarray(pca_picture(colors, (20, 30)))
    expected = (colors * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, expected.repeat(10, 0).repeat(10, 1))


def test_attention_lies_over_the_right_place():
    image = Image.new("RGB", (80, 40), (200, 30, 30))
    attention = torch.zeros(2, 4)
    attention[1, 3] = 1.0
    pixels = np.asarray(attention_picture(image, attention)).astype(int)
    assert pixels.shape == (40, 80, 3)
    brightest = np.unravel_index(pixels.sum(-1).argmax(), (40, 80))
    assert brightest[0] >= 20 and brightest[1] >= 60
    assert np.ptp(pixels[:20, :], axis=(0, 1)).max() == 0  # blocks: nothing runs over an edge
    assert np.ptp(pixels[20:, 60:], axis=(0, 1)).max() == 0
    even = np.asarray(attention_picture(image, torch.full((2, 4), 0.125)))
    assert np.ptp(even, axis=(0, 1)).max() == 0


@pytest.mark.parametrize(
    ("size", "panel"),
    [((60, 40), (60, 40)), ((40, 90), (40, 90)), ((300, 20), (150, 10)), ((20, 2000), (1, 90))],
)
def test_sheet_holds_three_panels_of_the_images_shape(size, panel, rng):
    image = Image.new("RGB", size, (10, 200, 60))
    grid = torch.randn(4, 2, 3, generator=rng)
    page = sheet(
        image, pca_colors([grid])[0], grid[0].softmax(-1), title="a title", notes="n", panel=90
    )
    pixels = np.asarray(page)
    shown = (pixels == (10, 200, 60)).all(-1)
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    assert (columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1) == panel
    assert shown.sum() == panel[0] * panel[1]
    below = page.height - rows[-1] > 2 * panel[1]
    assert below == (size[0] > 2 * size[1])


@pytest.mark.parametrize("size", [(8, 16), (10, 50)])
def test_small_images_are_enlarged_without_blur(size, rng):
    noise = torch.randint(0, 256, (*size, 3), generator=rng, dtype=torch.uint8).numpy()
    flat = torch.zeros(4, 2, 3)
    page = sheet(Image.fromarray(noise), pca_colors([flat])[0], flat[0], title="t", panel=90)
    times = 3 if size[1] > 2 * size[0] else 5
    large = noise.repeat(times, 0).repeat(times, 1)
    top, left = 12 + 26 + 24, 12
    shown = np.asarray(page)[top : top + large.shape[0], left : left + large.shape[1]]
    assert np.array_equal(shown, large)


def test_the_scale_beside_the_heat_has_its_colours_in_order(rng):
    features = torch.randn(4, 5, 5, generator=rng)
    attention = torch.zeros(5, 5)
    attention[2, 2] = 0.5
    page = sheet(Image.new("RGB", (200, 200)), pca_colors([features])[0], attention, title="t")
    pixels = np.asarray(page)
    lightest = (pixels == (252, 255, 164)).all(-1)
    bar = int(np.flatnonzero(lightest.sum(0) == 1)[0])  # in the heat a block is that light
    rows = np.flatnonzero(np.abs(np.diff(pixels[:, bar].astype(int), axis=0)).sum(-1))
    top, height = rows[0] + 1, 600
    scale = heat_colors(torch.linspace(1, 0, height)).numpy() * 255
    assert np.abs(pixels[top : top + height, bar] - scale).max() <= 1
    assert (pixels[top - 2 : top + 20, bar + 12 : bar + 60] != 250).any()  # 12.50x


def test_sheet_of_one_patch():
    features = torch.ones(8, 1, 1)
    image = Image.new("RGB", (16, 16))
    page = sheet(image, pca_colors([features])[0], torch.ones(1, 1), title="one")
    assert page.size[0] > 3 * 720


def test_sheet_refuses_maps_of_two_grids():
    with pytest.raises(ValueError, match=r"one grid, got \(2, 3\) and \(3, 2\)"):
        sheet(Image.new("RGB", (4, 4)), torch.zeros(3, 2, 3), torch.zeros(3, 2), title="t")
