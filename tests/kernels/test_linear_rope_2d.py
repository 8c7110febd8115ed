"""linear_rope_2d's kernel against float64; that it compiles: test_linear_gelu.py."""

import pytest
import torch

from hrvlm_kernels import PackedGrids
from hrvlm_kernels.ops.linear_rope_2d import linear_rope_2d
from hrvlm_kernels.ops.rope_2d import rope_table
from tests.kernels.helpers import DTYPES, assert_like_reference, interpreter_only, strided_copy
from tests.kernels.mutations import caught, plant
from tests.kernels.test_rope_2d import frequencies

PREFIX = 2


def make_inputs(
    tokens=21, channels=72, heads=3, head_dim=16, dtype=torch.float32, *, bias=True, seed=0
):
    """x, weight, a bias or none, and the positions of an image with two prefix tokens."""
    rng = torch.Generator().manual_seed(seed)
    width = 3 * heads * head_dim
    x = torch.randn(tokens, channels, generator=rng)
    weight = torch.randn(width, channels, generator=rng) * (2 / channels**0.5)
    b = torch.randn(width, generator=rng).to(dtype) if bias else None
    coords = torch.zeros(tokens, 2)
    if tokens > PREFIX:
        packed = PackedGrids.from_grids([(1, tokens - PREFIX)], num_prefix_tokens=PREFIX)
        coords = packed.coords.clone()  # layouts are kept: another test would get the change
        coords[PREFIX:, 0] = torch.rand(tokens - PREFIX, generator=rng)
    return x.to(dtype), weight.to(dtype), b, (coords, frequencies(head_dim))


def check(*args, layout=lambda a: a, table=False, **options):
    x, weight, bias, rope = make_inputs(*args, **options)
    given = [None if a is None else layout(a) for a in (x, weight, bias)]
    with torch.no_grad():
        more = (rope_table(*rope),) if table else ()
        got = linear_rope_2d(*given, (*rope, *more), backend="triton")
    wide = [None if a is None else a.double() for a in (x, weight, bias)]
    exact = linear_rope_2d(*wide, rope, backend="eager")
    assert got.is_contiguous() and got.dtype == x.dtype and got.shape == exact.shape
    plain = linear_rope_2d(x, weight, bias, rope, backend="eager")
    assert_like_reference(got.unbind(1), exact.unbind(1), plain.unbind(1))
    return got


@interpreter_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "channels", "heads", "head_dim", "bias"),
    [
        (1, 1, 1, 4, True), (70, 64, 2, 16, True), (21, 72, 1, 64, False), (33, 40, 3, 20, True),
        (35, 33, 1, 80, True),
    ],
)  # fmt: skip
def test_forward(tokens, channels, heads, head_dim, bias, dtype):
    """Heads that fill a tile of 32, share one, or end within one."""
    check(tokens, channels, heads, head_dim, dtype, bias=bias)


def any_strides(a):
    """Rows apart, and an address that is not a multiple of 16 bytes; vectors with gaps."""
    return strided_copy(a) if a.ndim == 2 else a.repeat_interleave(2)[::2]


@interpreter_only
@pytest.mark.parametrize("layout", [any_strides, lambda a: a.t().contiguous().t()])
def test_any_strides(layout):
    check(5, 40, 3, 20, layout=layout, table=True)


@interpreter_only
@pytest.mark.parametrize("head_dim", [16, 20])
def test_prefix_tokens_and_v_are_those_of_the_product_alone(head_dim):
    """Bit for bit, and what is infinite in one half of a head stays there."""
    x, weight, bias, (coords, inv_freq) = make_inputs(head_dim=head_dim)
    weight[3, 0] = weight[-head_dim // 2, 0] = torch.inf
    x[:, 0] = x[:, 0].abs()
    with torch.no_grad():
        got, plain = (
            linear_rope_2d(x, weight, bias, (c, inv_freq), backend="triton")
            for c in (coords, torch.zeros_like(coords))
        )
    assert torch.equal(got[:PREFIX], plain[:PREFIX]) and torch.equal(got[:, 2], plain[:, 2])
    assert torch.equal(plain.isinf().sum((0, 3)).sum(1), torch.tensor([len(x), 0, len(x)]))
    assert not plain.isnan().any() and not torch.equal(got[PREFIX:, 1], plain[PREFIX:, 1])


@interpreter_only
def test_nothing_to_do():
    with torch.no_grad():
        assert linear_rope_2d(*make_inputs(0), backend="triton").shape == (0, 3, 3, 16)


@interpreter_only
def test_it_has_no_gradient_and_says_so():
    x, weight, bias, rope = make_inputs()
    weight.requires_grad_()
    with pytest.raises(RuntimeError, match="linear_rope_2d: backend 'triton' can't run: it has"):
        linear_rope_2d(x, weight, bias, rope, backend="triton")
    assert linear_rope_2d(x, weight, bias, rope).requires_grad


@interpreter_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b, r: (x[0], w, b, r), r"x must be \[T, C\], got \(72,\)"),
        (lambda x, w, b, r: (x, w[1:], b, r), r"weight must be \[3 H D, C\] with D = 4 \* 4"),
        (lambda x, w, b, r: (x, w[:, 1:], b, r), r"weight must be \[F, C\] with C = 72"),
        (lambda x, w, b, r: (x, w, b[1:], r), r"bias must be \[144\], got \(143,\)"),
        (lambda x, w, b, r: (x, w, b, (r[0][1:], r[1])), r"coords must be float32 \[21, 2\]"),
        (lambda x, w, b, r: (x, w, b, (*r, r[0])), r"its table must be float32 \[21, 16\]"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_rope_2d(*change(*make_inputs()), backend="triton")


@interpreter_only
def test_opcheck(monkeypatch):
    monkeypatch.undo()  # opcheck compares what empty tensors hold
    x, weight, bias, rope = make_inputs(3, 8, 1)
    op = torch.ops.hrvlm_kernels.linear_rope_2d
    torch.library.opcheck(op, (x, weight, bias, rope_table(*rope)))


BUGS = {
    "turned the other way": ("left * cos - right * sin)", "left * cos + right * sin)"),
    "halves exchanged": ("left, right = tl.split", "right, left = tl.split"),
    "one bias for both": ("bias + i_left + HALF", "bias + i_left"),
    "v rotated": ("keep = keep | (i_p >= F // 3)", "keep = keep | (i_p > F // 3)"),
    "k not rotated": ("if first < F // 3:", "if first < F // 6:"),
    "angles of the neighbour": ("((first + i_j) % HALF)", "((first + i_j + 1) % HALF)"),
    "last row missing": ("m_t, first = i_t < T", "m_t, first = i_t < T - 1"),
    "last pair missing": ("m_p = i_p < F // 2", "m_p = i_p < F // 2 - 1"),
}  # fmt: skip


@interpreter_only
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, "linear_rope_2d", *BUGS[bug])
    assert caught(lambda: [check(33, 72, 3, 16), check(40, 64, 1, 20)])
