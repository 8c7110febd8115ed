from types import SimpleNamespace

import pytest
import torch

from hrvlm.images.geometry import image_token_count
from hrvlm.vlm.modality_projector import (
    ModalityProjector,
    pixel_shuffle,
    pixel_unshuffle,
)
from hrvlm_kernels import PackedGrids
from tests.numerics import relative_error
from tests.tiny import config_of, vision_config_of

GRIDS = [(2, 2), (4, 6), (6, 4), (2, 14)]


def coordinates(hp, wp):
    """[hp*wp, 2]: each patch holds its own (row, column)."""
    return torch.tensor([[float(i), float(j)] for i in range(hp) for j in range(wp)])


def expected_order(hp, wp, s):
    """The order of nanoVLM, by loops: which patch is where in which token."""
    tokens = []
    for i in range(hp // s):
        for j in range(wp // s):
            token = []
            for dy in range(s):
                for dx in range(s):
                    token += [float(i * s + dy), float(j * s + dx)]
            tokens.append(token)
    return torch.tensor(tokens)


def nanovlm_square(x, s):
    """nanoVLM's order for squares, from its description: rows of blocks, rows in a block."""
    side = round(len(x) ** 0.5)
    rows = []
    for block_row in range(0, side, s):
        for block_column in range(0, side, s):
            block = [
                x[(block_row + dy) * side + block_column + dx] for dy in range(s) for dx in range(s)
            ]
            rows.append(torch.cat(block))
    return torch.stack(rows)


def identity_projector(channels, s, **options):
    """A projector whose output is the shuffled input itself."""
    projector = ModalityProjector(
        vit_hidden_dim=channels,
        lm_hidden_dim=s * s * channels,
        mp_pixel_shuffle_factor=s,
        **options,
    )
    with torch.no_grad():
        projector.proj.weight.copy_(torch.eye(s * s * channels))
    return projector


@pytest.mark.parametrize("grid", GRIDS)
def test_the_order_is_dy_dx_channel(grid):
    x = coordinates(*grid)
    expected = expected_order(*grid, 2)
    assert torch.equal(pixel_shuffle(x, grid, 2), expected)
    projector = identity_projector(2, 2)
    assert torch.equal(projector(x[None], *grid)[0], expected)
    packed = PackedGrids.from_grids([grid])
    assert torch.equal(projector(x, packed=packed), expected)


@pytest.mark.parametrize("s", [1, 2, 4])
def test_squares_without_a_grid_are_as_in_nanovlm(rng, s):
    x = torch.randn(3, 64, 5, generator=rng)
    out = identity_projector(5, s)(x)
    assert torch.equal(out, torch.stack([nanovlm_square(image, s) for image in x]))
    assert torch.equal(out, identity_projector(5, s)(x, 8, 8))


@pytest.mark.parametrize("grid", [*GRIDS, (12, 8)])
@pytest.mark.parametrize("s", [1, 2])
def test_unshuffling_restores_the_input(rng, grid, s):
    x = torch.randn(2, grid[0] * grid[1], 3, generator=rng)
    shuffled = pixel_shuffle(x, grid, s)
    assert shuffled.shape == (2, grid[0] * grid[1] // s**2, 3 * s**2)
    assert torch.equal(pixel_unshuffle(shuffled, grid, s), x)


def test_weights_are_as_in_nanovlm():
    projector = ModalityProjector(
        vit_hidden_dim=32, lm_hidden_dim=48, mp_pixel_shuffle_factor=4, num_prefix_tokens=5
    )
    assert {n: tuple(p.shape) for n, p in projector.named_parameters()} == {
        "proj.weight": (48, 512)
    }
    assert 0.019 < projector.proj.weight.std().item() < 0.021


@pytest.mark.parametrize(
    ("prefix", "append_cls"), [(0, False), (1, False), (5, False), (1, True), (5, True)]
)
def test_a_batch_is_as_packed_images_are(rng, prefix, append_cls):
    projector = ModalityProjector(
        vit_hidden_dim=6,
        lm_hidden_dim=7,
        mp_pixel_shuffle_factor=2,
        num_prefix_tokens=prefix,
        mp_append_cls=append_cls,
    )
    grids = [(2, 4), (6, 2), (4, 4)]
    images = [torch.randn(prefix + hp * wp, 6, generator=rng) for hp, wp in grids]
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=prefix)
    together = projector(torch.cat(images), packed=packed)
    counts = [image_token_count(grid, 2, append_cls) for grid in grids]
    assert len(together) == sum(counts)
    for out, image, grid in zip(together.split(counts), images, grids, strict=True):
        alone = projector(image[None], *grid)[0]
        assert relative_error(out, alone) < 1e-6
        expected = pixel_shuffle(image[prefix:], grid, 2) @ projector.proj.weight.T
        assert relative_error(alone[: len(expected)], expected) < 1e-6
        if append_cls:
            assert relative_error(alone[-1], projector.cls_proj.weight @ image[0]) < 1e-6


def test_prefix_tokens_leave_no_trace(rng):
    projector = identity_projector(3, 2, num_prefix_tokens=5)
    patches = torch.randn(2, 24, 3, generator=rng)
    prefix = torch.randn(2, 5, 3, generator=rng)
    out = projector(torch.cat([prefix, patches], dim=1), 4, 6)
    assert torch.equal(out, projector(patches, 4, 6))
    square = torch.randn(2, 5 + 16, 3, generator=rng)
    assert torch.equal(projector(square), projector(square[:, 5:], 4, 4))


def test_gradients_reach_patches_cls_and_weights_and_nothing_else(rng):
    projector = ModalityProjector(
        vit_hidden_dim=3,
        lm_hidden_dim=5,
        mp_pixel_shuffle_factor=2,
        num_prefix_tokens=3,
        mp_append_cls=True,
    ).double()
    grids = [(2, 4), (4, 2)]
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=3)
    x = torch.randn(22, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: projector(x, packed=packed), x)
    out = projector(x, packed=packed)
    out.backward(torch.randn(out.shape, generator=rng, dtype=out.dtype))
    registers = torch.tensor([1, 2, 12, 13])
    assert (x.grad[registers] == 0).all()
    others = [i for i in range(22) if i not in registers]
    assert (x.grad[others] != 0).all()
    assert projector.proj.weight.grad.norm() > 0 and projector.cls_proj.weight.grad.norm() > 0


@pytest.mark.parametrize("prefix", [0, 5])
def test_the_token_grid_given_by_mistake_is_recognised(prefix):
    projector = ModalityProjector(
        vit_hidden_dim=4, lm_hidden_dim=4, mp_pixel_shuffle_factor=4, num_prefix_tokens=prefix
    )
    x = torch.zeros(1, prefix + 40 * 60, 4)
    message = r"gh=10, gw=15.*you passed the token grid; expected the patch grid gh=40, gw=60"
    with pytest.raises(ValueError, match=message):
        projector(x, 10, 15)
    assert projector(x, 40, 60).shape == (1, 150, 4)


def test_wrong_shapes_are_refused():
    projector = ModalityProjector(
        vit_hidden_dim=4, lm_hidden_dim=4, mp_pixel_shuffle_factor=2, num_prefix_tokens=5
    )
    with pytest.raises(ValueError, match=r"x has 20 rows an image.*24 or 5 \+ 24"):
        projector(torch.zeros(1, 20, 4), 4, 6)
    with pytest.raises(ValueError, match=r"image 0: patch grid 3x8 is not divisible.*factor 2"):
        projector(torch.zeros(1, 24, 4), 3, 8)
    with pytest.raises(ValueError, match=r"x must be \[B, n, C\]"):
        projector(torch.zeros(24, 4), 4, 6)
    with pytest.raises(ValueError, match="gh and gw both"):
        projector(torch.zeros(1, 24, 4), 4)
    with pytest.raises(ValueError, match="24 rows an image, which is not a square"):
        projector(torch.zeros(1, 24, 4))
    with pytest.raises(ValueError, match="packed, not both"):
        projector(torch.zeros(24, 4), 4, 6, packed=PackedGrids.from_grids([(4, 6)]))
    with pytest.raises(ValueError, match="two positive ints"):
        projector(torch.zeros(1, 24, 4), 4.0, 6.0)
    packed = PackedGrids.from_grids([(4, 6), (3, 4)])
    with pytest.raises(ValueError, match="image 1: patch grid 3x4"):
        projector(torch.zeros(36, 4), packed=packed)


def test_a_length_that_makes_two_squares_is_refused():
    projector = ModalityProjector(
        vit_hidden_dim=2, lm_hidden_dim=2, mp_pixel_shuffle_factor=1, num_prefix_tokens=5
    )
    with pytest.raises(ValueError, match=r"9 rows.*more than one square"):
        projector(torch.zeros(1, 9, 2))


def test_special_tokens_left_to_the_caller():
    projector = ModalityProjector(
        vit_hidden_dim=4,
        lm_hidden_dim=4,
        mp_pixel_shuffle_factor=2,
        num_prefix_tokens=5,
        mp_handle_special_tokens=False,
    )
    assert projector(torch.zeros(2, 24, 4), 4, 6).shape == (2, 6, 4)
    with pytest.raises(ValueError, match="prefix tokens, and mp_handle_special_tokens is False"):
        projector(torch.zeros(2, 29, 4), 4, 6)


def test_the_config_gives_all_sizes():
    config = config_of(vision_config_of(num_register_tokens=2, backend="eager"), mp_append_cls=True)
    projector = ModalityProjector(config)
    assert (projector.factor, projector.num_prefix_tokens, projector.backend) == (2, 3, "eager")
    assert projector.proj.weight.shape == (48, 128) and projector.cls_proj.weight.shape == (48, 32)
    nanovlm = SimpleNamespace(vit_hidden_dim=8, lm_hidden_dim=6, mp_pixel_shuffle_factor=2)
    assert ModalityProjector(nanovlm)(torch.zeros(1, 16, 8)).shape == (1, 4, 6)
    with pytest.raises(ValueError, match="not both"):
        ModalityProjector(config, vit_hidden_dim=3)
    with pytest.raises(ValueError, match="give config, or both"):
        ModalityProjector(vit_hidden_dim=3)
    with pytest.raises(ValueError, match="needs a CLS token"):
        ModalityProjector(vit_hidden_dim=3, lm_hidden_dim=3, mp_append_cls=True)


def test_an_empty_batch_gives_an_empty_output():
    projector = ModalityProjector(vit_hidden_dim=4, lm_hidden_dim=6, mp_pixel_shuffle_factor=2)
    assert projector(torch.zeros(0, 24, 4), 4, 6).shape == (0, 6, 6)


def test_features_of_another_dtype_take_that_of_the_weights(rng):
    projector = ModalityProjector(
        vit_hidden_dim=4, lm_hidden_dim=6, mp_pixel_shuffle_factor=2
    ).bfloat16()
    x = torch.randn(1, 24, 4, generator=rng)
    out = projector(x, 4, 6)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, projector(x.bfloat16(), 4, 6))
