"""linear_residual_layer_norm and shifted_layer_norm against float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.compiled.compiler import TARGETS, assert_clean, submit_compile
from benchmarks.compiled.jobs import connection_jobs
from hrvlm_kernels import reference
from hrvlm_kernels.ops import linear_residual_layer_norm as op
from hrvlm_kernels.triton_kernels import residual_layer_norm as norm_kernels
from tests.kernels.helpers import DTYPES, assert_like_reference, interpreter_only
from tests.kernels.mutations import caught, plant

EPS = 1e-3  # large enough that forgetting it shows


def make_inputs(tokens=37, inner=40, width=48, dtype=torch.float32, *, biases=True, seed=0):
    """x, a, weight, bias, scale, norm's weight and bias; and cotangents of both outputs."""
    rng = torch.Generator().manual_seed(seed)
    x, g, h = torch.randn(3, tokens, width, generator=rng).unbind()
    x[::5] = x[::5] * 0.01 + 2
    a = torch.randn(tokens, inner, generator=rng)
    weight = torch.randn(width, inner, generator=rng) / inner**0.5
    bias, scale, norm_weight, norm_bias = torch.randn(4, width, generator=rng).unbind()
    inputs = [t.to(dtype) for t in (x, a, weight, bias, scale, norm_weight, norm_bias)]
    if not biases:
        inputs[3] = inputs[6] = None
    return inputs, [g.to(dtype), h.to(dtype)]


def plain(x, a, weight, bias, scale, norm_weight, norm_bias, eps):
    """By torch and the package's reference."""
    return reference.residual_layer_norm(
        x, F.linear(a, weight, bias), scale, norm_weight, norm_bias, eps
    )


def results(run, inputs, cotangents):
    leaves = [None if a is None else a.detach().requires_grad_() for a in inputs]
    outs = run(*leaves, EPS)
    wanted = [a for a in leaves if a is not None]
    grads = torch.autograd.grad(outs, wanted, [a.to(outs[0].dtype) for a in cotangents])
    return [*(out.detach() for out in outs), *grads]


def check(*args, **options):
    inputs, cotangents = make_inputs(*args, **options)
    got = results(op.linear_residual_layer_norm, inputs, cotangents)
    double = [None if a is None else a.double() for a in inputs]
    exact = results(plain, double, cotangents)
    assert_like_reference(got, exact, results(plain, inputs, cotangents))
    return got


def check_shifted(tokens=19, width=48, dtype=torch.float32, *, shift=True, bias=True):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, width, generator=rng).to(dtype)
    shift = torch.randn(width, generator=rng) if shift else None
    weight, offset = torch.randn(2, width, generator=rng).to(dtype).unbind()
    bias = offset if bias else None

    def run(to):
        moved = x.to(to) if shift is None else x.to(to) + shift.to(to)
        parameters = [None if a is None else a.to(to) for a in (weight, bias)]
        return F.layer_norm(moved, (width,), *parameters, EPS)

    got = op.shifted_layer_norm(x, shift, weight, bias, EPS)
    assert_like_reference([got], [run(torch.float64)], [run(dtype)])


@interpreter_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inner", "width"), [(1, 16, 8), (37, 40, 48), (18, 600, 20)])
def test_forward_and_backward(tokens, inner, width, dtype):
    check(tokens, inner, width, dtype)


@interpreter_only
def test_without_biases_and_without_tokens():
    check(biases=False)
    inputs, cotangents = make_inputs(tokens=0)
    found = results(op.linear_residual_layer_norm, inputs, cotangents)
    assert found[0].shape == (0, 48) and not any(a.any() for a in found[2:])


@interpreter_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_of_a_shifted_stream(dtype):
    for shift in (True, False):
        check_shifted(dtype=dtype, shift=shift, bias=shift)
    assert op.shifted_layer_norm(torch.ones(0, 8), None, torch.ones(8), None, EPS).shape == (0, 8)


@interpreter_only
def test_equal_inputs_give_equal_bits_and_several_parts_their_sum(monkeypatch):
    inputs, cotangents = make_inputs(tokens=100)
    first = results(op.linear_residual_layer_norm, inputs, cotangents)
    again = results(op.linear_residual_layer_norm, inputs, cotangents)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    monkeypatch.setattr(norm_kernels, "multiprocessors", lambda device: 100)
    check(tokens=100)


@interpreter_only
@pytest.mark.parametrize("unused", [0, 1])
def test_one_output_unused(unused):
    inputs, cotangents = make_inputs()
    leaves = [a.clone().requires_grad_() for a in inputs]
    out = op.linear_residual_layer_norm(*leaves, EPS)[1 - unused]
    grads = torch.autograd.grad(out, leaves, cotangents[1 - unused])
    cotangents[unused].zero_()
    for a, b in zip(grads, results(plain, inputs, cotangents)[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@interpreter_only
def test_frozen_parameters_cost_no_product():
    inputs, cotangents = make_inputs()
    expected = results(op.linear_residual_layer_norm, inputs, cotangents)
    leaves = [a.clone().requires_grad_(i < 2) for i, a in enumerate(inputs)]
    outs = op.linear_residual_layer_norm(*leaves, EPS)
    grads = torch.autograd.grad(outs, leaves[:2], cotangents)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[2:4], strict=True))


@interpreter_only
def test_a_gradient_of_the_gradient_raises():
    inputs, cotangents = make_inputs(3, 4, 8)
    leaves = [a.requires_grad_() for a in inputs]
    out, _ = op.linear_residual_layer_norm(*leaves, EPS)
    (grad,) = torch.autograd.grad(out, leaves[1], cotangents[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        grad.sum().backward()


GRADIENTS = {
    "dscale without the bias": ("dscale += tl.load(bias", "dscale += 0 * tl.load(bias"),
    "dweight without scale": ("(b_s[:, None] * b_p)", "(b_p)"),
    "dbias without scale": ("(b_s * b_sum)", "(b_sum)"),
    "one block of the sum alone": ("total += b_p *", "total = b_p *"),
    "one block of the parts alone": ("total += tl.load(parts", "total = tl.load(parts"),
    "dw of the norm is db": ("parts + count * C, count", "parts + 2 * count * C, count"),
}
NORMS = {
    "shift not scaled": ("b_s * (tl.load(p_u, mask=mask, other=0.0).to(tl.float32) + b_add)",
                         "b_s * tl.load(p_u, mask=mask, other=0.0).to(tl.float32) + b_add"),
    "shift forgotten": ("b_sum = b_x + b_add", "b_sum = b_x"),
    "sum of dx forgotten": ("            ds += b_dx\n", "            ds += 0.0\n"),
}  # fmt: skip


@interpreter_only
@pytest.mark.parametrize("bug", [*GRADIENTS, *NORMS])
def test_seeded_bugs_are_caught(bug, monkeypatch, tmp_path):
    name = "linear_residual_layer_norm" if bug in GRADIENTS else "residual_layer_norm"
    module = plant(monkeypatch, tmp_path, name, *(GRADIENTS | NORMS)[bug])
    monkeypatch.setattr(
        norm_kernels if bug in GRADIENTS else module, "multiprocessors", lambda device: 25
    )
    assert caught(check_shifted, check, lambda: check(1050, 600, 9))  # the cheap ones first


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles_clean(target):
    jobs = list(connection_jobs(target, widths=(1024,)))
    built = [submit_compile(j.kernel, j.signature, j.constants, target, **j.options) for j in jobs]
    for result in built:
        assert_clean(result.result())
