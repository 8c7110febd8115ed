"""Seeded bugs in rope_2d, pixel_shuffle_linear and layer_norm_pixel_shuffle: each one is caught."""

import pytest

from tests.kernels import test_layer_norm_pixel_shuffle as norm
from tests.kernels import test_pixel_shuffle_linear as shuffle
from tests.kernels import test_rope_2d as rope
from tests.kernels.helpers import interpreter_only, seeded_in_sources
from tests.kernels.mutations import caught, plant

pytestmark = [interpreter_only, seeded_in_sources]

ROPE = {
    "last pair not rotated": ("mask=i_d < 2 * QUARTER", "mask=i_d < 2 * QUARTER - 1"),
    "x and y swapped": ("y[:, None], x[:, None])", "x[:, None], y[:, None])"),
    "frequencies interleaved": ("(i_d % QUARTER) * stride_f", "(i_d // 2) * stride_f"),
    "2 pi in half precision": ("6.2831854820251465", "6.28125"),
    "quadrant ignored": ("(quadrant & 1) != 0", "(quadrant & 4) != 0"),
    "sign of the cosine": ("((quadrant + 1) & 2) != 0", "(quadrant & 2) != 0"),
    "coarse pi": ("r = r - k * HALF_PI_MIDDLE", "r = r"),
    "cos in half precision": ("cos[:, None, :],", "cos[:, None, :].to(tl.float16),"),
    "backward not inverse": ("sin = -sin", "sin = sin"),
    "wrong half": ("second * cos + first * sin", "second * cos - first * sin"),
    "last token missing": (
        "m_t = i_t < T\n    cos, sin, still",
        "m_t = i_t < T - 1\n    cos, sin, still",
    ),
    "last head missing": ("(i_h < H)[None", "(i_h < H - 1)[None"),
    "prefix computed": ("tl.where(m_keep, b_first, o_first)", "o_first"),
    "k's second block of heads": ("for h in range(0, H, BH)", "for h in range(0, 1, BH)"),
}

SHUFFLE = {
    "dy and dx swapped": (
        "(patch // S) * o_step + (patch % S) * stride_xt",
        "(patch % S) * o_step + (patch // S) * stride_xt",
    ),
    "step of a row of patches": ("tl.load(p_index + S)", "tl.load(p_index + 1)"),
    "last block of K missing": ("S * S * BLOCKS))", "S * S * BLOCKS - 1))"),
    "last output token missing": ("m_m, m_n = i_m < M, i_n", "m_m, m_n = i_m < M - 1, i_n"),
    "tail of C": ("mask=(i_c < C)[None, :], other", "mask=(i_c < C - 1)[None, :], other"),
    "bias forgotten": ("tl.load(bias + i_n * stride_b", "0 * tl.load(bias + i_n * stride_b"),
    "tiles twice": ("(pid % per_group) // height", "(pid % per_group) // GROUP"),
    "last part not added": ("range(0, n_parts)", "range(0, n_parts - 1)"),
    "bias of another column": ("(i % N) * stride_b", "(i % 2) * stride_b"),
}

SHUFFLE_BACKWARD = {
    "dx in a neighbour's row": (
        "patch, mask=m_m, other=0).to(tl.int64)\n    p_dx",
        "0, mask=m_m, other=0).to(tl.int64)\n    p_dx",
    ),
    "tail of N in dx": ("mask=(i_n < N)[None, :], other", "mask=(i_n < N - 1)[None, :], other"),
    "last prefix row not zeroed": ("range(0, PREFIX)", "range(0, PREFIX - 1)"),
    "wrong dweight tile": ("(patch * C + i_c)[None, :]", "((patch ^ 1) * C + i_c)[None, :]"),
    "dweight gathers another patch": (
        "patch, mask=m_m, other=0).to(tl.int64)\n        p_y",
        "0, mask=m_m, other=0).to(tl.int64)\n        p_y",
    ),
    "last tokens missing in dweight": ("tl.cdiv(M, BK))", "tl.cdiv(M, BK) - 1)"),
    "parts overlap": ("i_k + step * BK", "i_k + (step - begin) * BK"),
}

NORM = {
    "eps forgotten": ("/ C + eps)", "/ C)"),
    "mean kept": ("rest - (tl.sum(rest, 1) / C)[:, None]", "b_x"),
    "rounding of the mean kept": ("rest - (tl.sum(rest, 1) / C)[:, None]", "rest"),
    "columns past C": ("tl.where(m_c[None, :], b_x - mean[:, None], 0.0)", "b_x - mean[:, None]"),
    "last row missing": ("m_r, m_c = i_r < rows", "m_r, m_c = i_r < rows - 1"),
    "weight forgotten": ("b_out *= tl.load(weight + i_c", "b_out *= tl.load(weight + 0 * i_c"),
    "gradient's mean kept": ("(grad - mean[:, None] - xhat", "(grad - xhat"),
    "projection kept": (" - xhat * projection[:, None]", ""),
    "dweight without xhat": ("dw += b_y * xhat", "dw += b_y"),
    "dbias with weight": ("db += b_y", "db += b_y * b_w"),
    "patch ignored in the cotangent": ("(i_r % PATCHES) * C", "(i_r % 1) * C"),
    "blocks not advanced": ("i_r += BR", "i_r += 0"),
}


@pytest.mark.parametrize("bug", ROPE)
def test_rope_2d(bug, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, "rope_2d", *ROPE[bug])

    def many_heads():
        rope.check_forward(8, grids=[(2, 2)], heads=6)

    assert caught(rope.check_forward, rope.check_backward, rope.check_prefix, many_heads)


@pytest.mark.parametrize("bug", [*SHUFFLE, *SHUFFLE_BACKWARD])
def test_pixel_shuffle_linear(bug, monkeypatch, tmp_path):
    if bug in SHUFFLE:
        name, change, user = "pixel_shuffle_linear", SHUFFLE[bug], "kernels"
    else:
        name, change = "pixel_shuffle_linear_backward", SHUFFLE_BACKWARD[bug]
        user = "backward_kernels"
    plant(monkeypatch, tmp_path, name, *change, users=[(shuffle, user)])

    def three_tiles():
        shuffle.check_all(2, 16, 65, grids=[(5, 7), (5, 7)])

    assert caught(three_tiles, shuffle.check_order, shuffle.check_parts, shuffle.check_all)


@pytest.mark.parametrize("bug", NORM)
def test_layer_norm_pixel_shuffle(bug, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, "layer_norm_pixel_shuffle", *NORM[bug])
    assert caught(norm.check_all, norm.test_rows_that_are_nearly_constant)


def test_the_checks_pass_without_a_bug():
    assert not caught(rope.check_forward, rope.check_backward, rope.check_prefix)
    assert not caught(norm.check_all, norm.test_rows_that_are_nearly_constant)
    assert not caught(shuffle.check_order, shuffle.check_parts, shuffle.check_all)
