"""linear_swiglu's kernel against float64; that it compiles: test_linear_gelu.py."""

import pytest
import torch

from hrvlm_kernels.ops.linear_swiglu import linear_swiglu
from tests.kernels.helpers import DTYPES, assert_like_reference, interpreter_only, strided_copy
from tests.kernels.mutations import caught, plant


def make_inputs(tokens=21, channels=72, width=40, dtype=torch.float32, *, bias=True, seed=0):
    """x, the two weights, and their biases or none."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=rng)
    gate, up = torch.randn(2, width, channels, generator=rng) * (2 / channels**0.5)
    biases = torch.randn(2, width, generator=rng)
    return [a.to(dtype) for a in (x, gate, up, *(biases if bias else ()))]


def check(*args, layout=lambda a: a, **options):
    inputs = make_inputs(*args, **options)
    with torch.no_grad():
        got = linear_swiglu(*map(layout, inputs), backend="triton")
    exact = linear_swiglu(*(a.double() for a in inputs), backend="eager")
    assert got.is_contiguous() and got.dtype == inputs[0].dtype
    assert_like_reference([got], [exact], [linear_swiglu(*inputs, backend="eager")])
    return got


@interpreter_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "channels", "width", "bias"),
    [(1, 1, 1, True), (70, 64, 48, True), (21, 72, 40, False), (33, 40, 33, True)],
)
def test_forward(tokens, channels, width, bias, dtype):
    check(tokens, channels, width, dtype, bias=bias)


@interpreter_only
@pytest.mark.parametrize("layout", [strided_copy, lambda a: a.t().contiguous().t()])
def test_any_strides(layout):
    check(5, 40, 33, layout=layout)


@interpreter_only
def test_nothing_to_do():
    with torch.no_grad():
        assert linear_swiglu(*make_inputs(0), backend="triton").shape == (0, 40)


@interpreter_only
def test_it_has_no_gradient_and_says_so():
    x, *others = make_inputs()
    x.requires_grad_()
    message = "linear_swiglu: backend 'triton' can't run: it has no gradient"
    with pytest.raises(RuntimeError, match=message):
        linear_swiglu(x, *others, backend="triton")
    assert linear_swiglu(x, *others).requires_grad


@interpreter_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, g, u, gb, ub: (x, g, u[1:], gb, ub), r"\[F, C\] with C = 72 and one F"),
        (lambda x, g, u, gb, ub: (x, g, strided_copy(u), gb, ub), "up must have the strides of"),
        (lambda x, g, u, gb, ub: (x, g, u, gb), "must both be given, or none"),
        (lambda x, g, u, gb, ub: (x, g, u, gb, ub[1:]), r"up_bias must be \[40\], got \(39,\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_swiglu(*change(*make_inputs()), backend="triton")


@interpreter_only
def test_opcheck(monkeypatch):
    monkeypatch.undo()  # opcheck compares what empty tensors hold
    torch.library.opcheck(torch.ops.hrvlm_kernels.linear_swiglu, make_inputs(3, 8, 5))


BUGS = {
    "gate and up exchanged": ("b_gate, b_up = tl.split", "b_up, b_gate = tl.split"),
    "no gate": ("b_gate * tl.sigmoid(b_gate) * b_up", "b_gate * b_up"),
    "one bias for both": ("tl.load(up_bias", "tl.load(gate_bias"),
    "last row missing": ("m_t, first = i_t < T", "m_t, first = i_t < T - 1"),
    "last column missing": ("m_f = i_f < F", "m_f = i_f < F - 1"),
}  # fmt: skip


@interpreter_only
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, "linear_swiglu", *BUGS[bug])
    assert caught(lambda: [check(33, 72, 40), check(70, 64, 33)])
