"""residual_layer_norm's kernels against float64, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.compiled.compiler import TARGETS, assert_clean, submit_compile
from benchmarks.compiled.jobs import residual_jobs
from hrvlm_kernels import reference, residual_layer_norm
from tests.kernels.helpers import (
    DTYPES,
    assert_like_reference,
    far_rows,
    interpreter_only,
    strided_copy,
)
from tests.kernels.mutations import caught, plant

EPS = 1e-3  # large enough that forgetting it shows


def make_inputs(tokens=37, channels=48, dtype=torch.float32, *, bias=True, seed=0, device="cpu"):
    """x, update, scale, weight, bias, and cotangents of both outputs."""
    rng = torch.Generator().manual_seed(seed)
    x, update, g, h = torch.randn(4, tokens, channels, generator=rng).unbind()
    x[::5] = x[::5] * 0.01 + 2
    update[::5] *= 0.01
    scale, weight, shift = torch.randn(3, channels, generator=rng).unbind()
    inputs = [a.to(device, dtype) for a in (x, update, scale, weight, shift)]
    if not bias:
        inputs[4] = None
    return inputs, [a.to(device, dtype) for a in (g, h)]


def results(run, inputs, cotangents):
    """Both outputs, then the gradients."""
    leaves = [None if a is None else a.detach().requires_grad_() for a in inputs]
    outs = run(*leaves, EPS)
    wanted = [a for a in leaves if a is not None]
    grads = iter(torch.autograd.grad(outs, wanted, [a.to(outs[0].dtype) for a in cotangents]))
    found = [None if a is None else next(grads) for a in leaves]
    return [*(out.detach() for out in outs), *found]


def kernel(*args):
    return residual_layer_norm(*args, backend="triton")


def check(*args, **options):
    inputs, cotangents = make_inputs(*args, **options)
    return compare(inputs, cotangents)


def compare(inputs, cotangents):
    got = results(kernel, inputs, cotangents)
    double = [None if a is None else a.double() for a in inputs]
    exact = results(reference.residual_layer_norm, double, cotangents)
    baseline = results(reference.residual_layer_norm, inputs, cotangents)
    assert_like_reference(got, exact, baseline)
    return got


@interpreter_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "channels"), [(1, 16), (37, 48), (16, 600), (33, 5)])
def test_forward_and_backward(tokens, channels, dtype):
    check(tokens, channels, dtype)


@interpreter_only
def test_without_bias_and_without_tokens():
    check(bias=False)
    inputs, cotangents = make_inputs(tokens=0)
    found = results(kernel, inputs, cotangents)
    assert found[0].shape == (0, 48) and not any(a.any() for a in found[4:])


@interpreter_only
def test_any_strides():
    inputs, cotangents = make_inputs(dtype=torch.float16)
    expected = results(kernel, inputs, cotangents)
    for change in (strided_copy, lambda a: a.T.contiguous().T):
        moved = [change(a) for a in inputs[:2]]
        got = results(kernel, [*moved, *inputs[2:]], [change(a) for a in cotangents])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@interpreter_only
def test_offsets_beyond_int32(tmp_path):
    inputs, cotangents = make_inputs(4, 8, torch.float16)
    expected = results(kernel, inputs, cotangents)
    inputs[1] = far_rows(inputs[1], tmp_path)
    got = results(kernel, inputs, cotangents)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@interpreter_only
@pytest.mark.parametrize("unused", [0, 1])
def test_one_output_unused(unused):
    inputs, cotangents = make_inputs()
    leaves = [a.clone().requires_grad_() for a in inputs]
    used = 1 - unused
    grads = torch.autograd.grad(
        kernel(*leaves, EPS)[used], leaves, cotangents[used], materialize_grads=True
    )
    cotangents[unused].zero_()
    for a, b in zip(grads, results(kernel, inputs, cotangents)[2:], strict=True):
        assert torch.equal(a, b)


@interpreter_only
def test_opcheck_and_one_graph(monkeypatch):
    monkeypatch.undo()  # opcheck compares what empty tensors hold
    inputs, cotangents = make_inputs(5, 8)
    leaves = [a.clone().requires_grad_() for a in inputs]
    ops = torch.ops.hrvlm_kernels
    torch.library.opcheck(ops.residual_layer_norm, (*leaves, EPS))
    out, _ = ops.residual_layer_norm(*inputs, EPS)
    torch.library.opcheck(ops.residual_layer_norm_backward, (*cotangents, out, *inputs[1:4], EPS))
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        results(compiled, inputs, cotangents), results(kernel, inputs, cotangents), strict=True
    ):
        assert torch.equal(a, b)


def test_wrong_inputs_raise():
    inputs, _ = make_inputs()
    x, update, scale, weight, bias = inputs
    for message, args in {
        r"x and update must be \[T, C\] both": (x, update[1:], scale, weight, bias),
        r"scale must be a float tensor \[48\]": (x, update, scale[1:], weight, bias),
        r"bias must be a float tensor \[48\]": (x, update, scale, weight, bias.long()),
        "C must be between 1 and 4096": (x[:, :0], update[:, :0], scale, weight, bias),
    }.items():
        with pytest.raises(ValueError, match=message):
            residual_layer_norm(*args)


@interpreter_only
@settings(max_examples=8, deadline=None)
@given(
    tokens=st.integers(1, 40),
    channels=st.integers(1, 70),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_random_sizes(tokens, channels, bias, dtype, seed):
    check(tokens, max(2, channels), dtype, bias=bias, seed=seed)


BUGS = {
    "scale forgotten": ("b_out = b_x + b_s * (tl.load", "b_out = b_x + (tl.load"),
    "residual forgotten": ("b_out = b_x + b_s", "b_out = b_s"),
    "weight forgotten": ("b_norm *= tl.load(weight", "b_norm *= 1.0  # tl.load(weight"),
    "last row missing": ("mask = (i_t < T)[:, None] & m_c[None, :]\n    p_x",
                         "mask = (i_t < T - 1)[:, None] & m_c[None, :]\n    p_x"),
    "gradient of the sum forgotten": ("b_dx += tl.load(p_g", "b_dx += 0 * tl.load(p_g"),
    "projection kept": (" - xhat * projection[:, None]", ""),
    "dupdate without scale": ("(b_s * b_dx)", "(b_dx)"),
    "dscale of the cotangent": ("ds += b_dx *", "ds += b_h *"),
    "dweight without xhat": ("dw += b_h * xhat", "dw += b_h"),
    "blocks not advanced": ("i_t += BR", "i_t += 0"),
}  # fmt: skip


@interpreter_only
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug, monkeypatch, tmp_path):
    module = plant(monkeypatch, tmp_path, "residual_layer_norm", *BUGS[bug])
    # Several blocks for a program, as in the interpreter.
    monkeypatch.setattr(module, "multiprocessors", lambda device: 1)
    assert caught(check, lambda: check(tokens=100, channels=8))


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles_clean(target):
    jobs = list(residual_jobs(target, widths=(1024, 4096)))
    built = [submit_compile(j.kernel, j.signature, j.constants, target, **j.options) for j in jobs]
    for result in built:
        assert_clean(result.result())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("channels", [384, 768, 1024, 1280, 4096])
def test_on_a_gpu(channels, dtype):
    inputs, cotangents = make_inputs(2309, channels, dtype, device="cuda")
    first = compare(inputs, cotangents)
    for a, b in zip(results(kernel, inputs, cotangents), first, strict=True):
        assert torch.equal(a, b)
