"""Seeded bugs in varlen_attention's kernels: the tests notice each one."""

import pytest
import torch

from hrvlm_kernels.triton_kernels.tilings import Tiling
from tests.kernels import test_varlen_attention as forward
from tests.kernels import test_varlen_attention_backward as backward
from tests.kernels.attention_cases import (
    below_zero,
    check,
    check_kernel,
    make_case,
    reference_results,
)
from tests.kernels.helpers import interpreter_only, seeded_in_sources
from tests.kernels.mutations import caught, plant, source_of

pytestmark = [interpreter_only, seeded_in_sources]

FORWARD = {
    "wrong segment": ("p_ends = cu_seqlens + tl.load(p_tile)", "p_ends = cu_seqlens"),
    "last row not stored": (
        "x.to(p_head.dtype.element_ty), mask=(rows < n)[:, None]",
        "x.to(p_head.dtype.element_ty), mask=(rows < n - 1)[:, None]",
    ),
    "last column not loaded": (
        "mask=(rows < n)[:, None] & (i_d < D)[None, :], other=0.0",
        "mask=(rows < n)[:, None] & (i_d < D - 1)[None, :], other=0.0",
    ),
    "a key too many": ("qk = tl.where((i_n < n)", "qk = tl.where((i_n <= n)"),
    "no tail where blocks fit": ("last = ((n - 1) // BN) * BN", "last = (n // BN) * BN"),
    "accumulator not rescaled": (
        "    acc = scaled_columns(acc, fade, TAIL)\n    b_v = load",
        "    b_v = load",
    ),
    "total not rescaled": ("total * fade + tl.sum(p, 1)", "total + tl.sum(p, 1)"),
    "natural base": ("qk_scale = scale * LOG2_E", "qk_scale = scale"),
    "shared heads interleaved": ("i_hk = i_h // GROUP", "i_hk = i_h % (H // GROUP)"),
    "v of the first block": ("(acc, fade, p, p_v, s + i_n", "(acc, fade, p, p_v, i_n"),
    "lse without its sum": ("peak + tl.log2(total)", "peak"),
    "halves mixed up": ("left * cos - right * sin", "left * cos + right * sin"),
    "cos for sin": ("tl.load(p_cos + HALF", "tl.load(p_cos"),
    "positions of another image": ("(first + rows)[:, None] * (2", "rows[:, None] * (2"),
}

# What all kernels do with the last columns of a head.
COLUMNS = {
    "the first columns again": ("D, TAIL, MASKED, BD)", "D, TAIL, MASKED, 0)"),
    "not in the scores": ("s = tl.dot(a[1], b[1].T, s,", "s = tl.dot(a[1] * 0, b[1].T, s,"),
    "not added up": ("tl.dot(s, b[1], acc[1],", "tl.dot(s, b[1], acc[1] * 0,"),
    "stored over the first columns": ("acc[1], D, TAIL, BD)", "acc[1], D, TAIL, 0)"),
}

FORWARD_TAIL = {
    "the first columns of k": ("D, TAIL, MASKED, BD)", "D, TAIL, MASKED, 0)"),
    "not in the scores": ("tl.dot(b_q[1], b_k.T, qk,", "tl.dot(b_q[1] * 0, b_k.T, qk,"),
    "by TMA the first columns": ("tails.load([row, head, BD])", "tails.load([row, head, 0])"),
    "not added up ahead": ("tl.dot(p, b_v[1], acc[1],", "tl.dot(p, b_v[1], acc[1] * 0,"),
}

AHEAD = {
    "k of the first block": ("v_tails, row + s, head", "v_tails, row, head"),
    "v of the same block": ("v_tails, row - BN, head", "v_tails, row, head"),
    "the first block not masked": (
        "_last_step(scores(b_q, b_k, TAIL), i_n, n,",
        "_last_step(scores(b_q, b_k, TAIL), i_n, BN,",
    ),
    "the last block left out": ("if last > 0:", "if last > BN:"),
    "the loop starts late": ("for s in range(BN, last, BN)", "for s in range(2 * BN, last, BN)"),
    "accumulator not rescaled": (
        "            acc = scaled_columns(acc, fade, TAIL)\n        if",
        "        if",
    ),
    "nor before the last block": (
        "            acc = scaled_columns(acc, fade, TAIL)\n        b_v",
        "        b_v",
    ),
    "the neighbour's keys": ("qk = tl.where((i_n < n)", "qk = tl.where((i_n < n + 128)"),
    "k of another image": ("row, head = first", "row, head = 0 * first"),
}

VIA_OUT = {
    "halves mixed up": ("left * cos - right * sin).to(kind)", "left * cos + right * sin).to(kind)"),
    "a half not turned": ("right * cos + left * sin).to(kind)", "right).to(kind)"),
    "positions of another image": (
        "table + (first + rows)[:, None] * D",
        "table + rows[:, None] * D",
    ),
    "columns left out": ("tl.static_range(0, HALF, STEP)", "tl.static_range(STEP, HALF, STEP)"),
    "q of another image": ("p_rotated, first + i_m, first + n", "p_rotated, i_m, first + n"),
}

SHORT = {
    "k not rotated": (
        "b_k = rotate(b_k, table, first, i_n, n, False).to",
        "b_k = b_k.to",
    ),
    "q rotated back": ("first, i_m, n, False)", "first, i_m, n, True)"),
    "a key too many": ("tl.where((i_n < n)", "tl.where((i_n <= n)"),
    "queries of one tile only": ("for s in range(0, n, BM)", "for s in range(0, BM, BM)"),
    "natural base": ("(scale * LOG2_E)", "scale"),
    "lse without its sum": ("peak + tl.log2(total)", "peak"),
    "shared heads interleaved": ("i_hk = i_h // GROUP", "i_hk = i_h % (H // GROUP)"),
    "another segment's length": ("tl.load(p_segment + 1)", "tl.load(segments + 1)"),
    "one segment too few": ("segments.shape[0] // 3 - 1", "segments.shape[0] // 3 - 2"),
}

BACKWARD = {
    "no delta in dq": ("ds = p * (dp - delta[:, None])", "ds = p * dp"),
    "no delta in dk": ("ds = p * (dp - delta[None, :])", "ds = p * dp"),
    "delta of the first head": ("p_row = i_h * T + first + i_m", "p_row = first + i_m"),
    "dq and dk not scaled": ("a = acc[0] * scale", "a = acc[0]"),
    "dq without its tail": ("p_k, p_v, last + i_n, n", "p_k, p_v, last + BN + i_n, n"),
    "dk without its tail": ("p_delta, last + i_m", "p_delta, last + BM + i_m"),
    "keys past the end in dq": ("p = tl.where((i_n < n)[None, :], p, 0.0)", "p = p"),
    "dv of ds": (
        "dv = add_product(dv, p.to(",
        "dv = add_product(dv, (p * dp).to(",
    ),
    "dq's loop starts late": ("for s in range(0, last, BN)", "for s in range(BN, last, BN)"),
    "dk's loop starts late": ("for s in range(0, last, BM)", "for s in range(BM, last, BM)"),
    "dq and dk rotated twice": ("first, rows, n, True)", "first, rows, n, False)"),
    "shared heads not added": (".sum(2))", "[:, :, 0])"),
}

TAIL = {
    "not in delta": ("b_delta += tl.sum(b_o[1]", "b_delta += 0 * tl.sum(b_o[1]"),
    "not scaled": ("return a, acc[1] * scale", "return a, acc[1]"),
}


def ragged(**options):
    options = {"heads": 4, "kv_heads": 2, "head_dim": 16, "rope": True} | options
    return make_case((33, 192), **options)


def check_forward():
    forward.check_forward(ragged(), [Tiling(64, 64, 4, 1)])


def check_forward_tail():
    case = make_case((70, 5, 140), head_dim=72)
    forward.check_forward(case)
    forward.check_forward(case, [Tiling(128, 64, 8, 1, "ahead")])


def check_short():
    case = ragged()
    out, lse = forward.run_forward(case)
    check(case, [out], ["out"])
    forward.check_lse(case, lse)


def check_ahead():
    case = make_case((200, 130, 70, 30), head_dim=32)
    forward.check_forward(case, [Tiling(128, 64, 8, 1, "ahead")])


def check_via_out():
    case = make_case((130, 3), head_dim=128, rope=True)
    forward.check_forward(case, [Tiling(128, 32, 4, 1)])


def check_backward():
    check_kernel(ragged(heads=2, kv_heads=1))


def check_one_head():
    check_kernel(make_case((65, 40), heads=2, head_dim=16))


def check_tail():
    check_kernel(make_case((70, 5), heads=1, head_dim=72))


def check_far_below_zero():
    backward.test_scores_far_below_zero()


def plant_below(monkeypatch, tmp_path, name, bug, user, *, users=()):
    """A bug in a module, and the kernel that uses it imported again over it."""
    plant(monkeypatch, tmp_path, name, *bug)
    unchanged = ("from __future__", "from __future__")
    plant(monkeypatch, tmp_path, user, *unchanged, users=users)


@pytest.mark.parametrize("bug", FORWARD)
def test_forward(bug, monkeypatch, tmp_path):
    users = [(forward, "kernels")]
    if FORWARD[bug][0] in source_of("attention_tiles"):
        plant_below(
            monkeypatch, tmp_path, "attention_tiles", FORWARD[bug], "varlen_attention", users=users
        )
    else:
        plant(monkeypatch, tmp_path, "varlen_attention", *FORWARD[bug], users=users)
    assert caught(check_forward)


@pytest.mark.parametrize("bug", FORWARD_TAIL)
def test_the_last_columns_of_72_forward(bug, monkeypatch, tmp_path):
    users = [(forward, "kernels")]
    plant(monkeypatch, tmp_path, "varlen_attention", *FORWARD_TAIL[bug], users=users)
    assert caught(check_forward_tail)


@pytest.mark.parametrize("bug", VIA_OUT)
def test_via_out(bug, monkeypatch, tmp_path):
    users = [(forward, "kernels")]
    plant(monkeypatch, tmp_path, "varlen_attention", *VIA_OUT[bug], users=users)
    assert caught(check_via_out)


@pytest.mark.parametrize("bug", AHEAD)
def test_ahead(bug, monkeypatch, tmp_path):
    users = [(forward, "kernels")]
    plant(monkeypatch, tmp_path, "varlen_attention", *AHEAD[bug], users=users)
    assert caught(check_ahead)


@pytest.mark.parametrize("bug", SHORT)
def test_short_images(bug, monkeypatch, tmp_path):
    users = [(forward, "kernels")]
    plant_below(
        monkeypatch, tmp_path, "varlen_attention_short", SHORT[bug], "varlen_attention", users=users
    )
    assert caught(check_short)


@pytest.mark.parametrize("bug", BACKWARD)
def test_backward(bug, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, "varlen_attention_backward", *BACKWARD[bug])
    assert caught(check_one_head, check_backward, check_far_below_zero)


@pytest.mark.parametrize("bug", COLUMNS)
def test_columns_of_all_kernels(bug, monkeypatch, tmp_path):
    users = [(forward, "kernels")]
    for user, check_it in (
        ("varlen_attention", check_forward_tail),
        ("varlen_attention_backward", check_tail),
    ):
        with monkeypatch.context() as patch:
            plant_below(patch, tmp_path, "attention_tiles", COLUMNS[bug], user, users=users)
            assert caught(check_it), user
        users = []


@pytest.mark.parametrize("bug", TAIL)
def test_the_last_columns_of_72(bug, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, "varlen_attention_backward", *TAIL[bug])
    assert caught(check_tail)


def test_a_rotation_that_is_never_inverse(monkeypatch, tmp_path):
    bug = ("sin = -sin", "sin = sin")
    plant_below(monkeypatch, tmp_path, "attention_tiles", bug, "varlen_attention_backward")
    assert caught(check_backward)


def test_the_checks_pass_without_a_bug():
    checks = check_forward, check_short, check_ahead, check_backward, check_one_head, check_tail
    assert not caught(*checks, check_forward_tail)


def test_of_a_lone_token_p_may_be_off_by_the_roundings_of_its_exponent_only():
    case = below_zero(make_case((1,), head_dim=32, dtype=torch.float32))
    exact = reference_results(case)[3].double()
    score = (case.q * case.k).sum() * 32**-0.5
    allowed = score.abs() * torch.finfo(torch.float32).eps
    check(case, [(exact * (1 + 0.9 * allowed)).float()], ["dv"])
    with pytest.raises(AssertionError, match="segment 0"):
        check(case, [(exact * (1 + 1.1 * allowed)).float()], ["dv"])
