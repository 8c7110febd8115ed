"""bias_gelu's kernels against float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.compiled.compiler import TARGETS, assert_clean, submit_compile
from benchmarks.compiled.jobs import gelu_jobs
from hrvlm_kernels.ops.bias_gelu import bias_gelu
from hrvlm_kernels.triton_kernels import bias_gelu as kernels
from tests.kernels.helpers import DTYPES, assert_like_reference, gradients, interpreter_only
from tests.kernels.mutations import caught, plant


def make_inputs(tokens=21, width=300, dtype=torch.float32, *, seed=0):
    """x and bias, from the flat parts to the steep ones, and a cotangent."""
    rng = torch.Generator().manual_seed(seed)
    x, cotangent = torch.randn(2, tokens, width, generator=rng).unbind()
    x[:, ::3] *= 4
    bias = torch.randn(width, generator=rng)
    return [x.to(dtype), bias.to(dtype)], cotangent.to(dtype)


def plain(x, bias):
    return F.gelu(x + bias)


def check(*args, **options):
    inputs, cotangent = make_inputs(*args, **options)
    got = gradients(bias_gelu, inputs, cotangent)
    exact = gradients(plain, [a.double() for a in inputs], cotangent.double())
    assert_like_reference(got, exact, gradients(plain, inputs, cotangent))
    return got


@interpreter_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (7, 48), (21, 300), (2, 2049)])
def test_forward_and_backward(tokens, width, dtype):
    check(tokens, width, dtype)


@interpreter_only
def test_nothing_to_do():
    inputs, cotangent = make_inputs(0, 48)
    out, dx, dbias = gradients(bias_gelu, inputs, cotangent)
    assert out.shape == dx.shape == (0, 48) and not dbias.any()


@interpreter_only
def test_far_from_zero_it_is_the_identity_or_zero():
    x = torch.tensor([[-1e4, -40.0, 40.0, 1e4]])
    out, dx, _ = gradients(bias_gelu, [x, torch.zeros(4)], torch.full_like(x, 2))
    assert torch.equal(out, torch.tensor([[0.0, 0.0, 40.0, 1e4]]))
    assert torch.equal(dx, torch.tensor([[0.0, 0.0, 2.0, 2.0]]))


@interpreter_only
def test_equal_inputs_give_equal_bits_and_several_parts_their_sum(monkeypatch):
    first, again = check(), check()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 3)
    check(100)


@interpreter_only
def test_opcheck(monkeypatch):
    monkeypatch.undo()  # opcheck compares what empty tensors hold
    inputs, cotangent = make_inputs(3, 8)
    ops = torch.ops.hrvlm_kernels
    torch.library.opcheck(ops.bias_gelu, [a.clone().requires_grad_() for a in inputs])
    torch.library.opcheck(ops.bias_gelu_backward, (cotangent, *inputs))


BUGS = {
    "another slope": ("z * 0.5 * (tl.erf(z * SQRT_HALF)", "z * 0.5 * (tl.erf(z * 0.7)"),
    "bias forgotten": ("z += tl.load(bias", "z += 0 * tl.load(bias"),
    "density forgotten": (" + z * tl.exp(z * z * -0.5) * INVERSE_SQRT_TWO_PI", ""),
    "last block alone": ("db += b_dx", "db = b_dx"),
    "blocks not advanced": ("i_t += BR", "i_t += 0"),
    "last part missing": ("range(0, count)", "range(0, count - 1)"),
}  # fmt: skip


@interpreter_only
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug, monkeypatch, tmp_path):
    module = plant(monkeypatch, tmp_path, "bias_gelu", *BUGS[bug])
    monkeypatch.setattr(module, "multiprocessors", lambda device: 1)
    assert caught(lambda: check(100, 40))


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_clean(target):
    jobs = list(gelu_jobs(target, dtypes=(torch.bfloat16,)))
    built = [submit_compile(j.kernel, j.signature, j.constants, target, **j.options) for j in jobs]
    for result in built:
        assert_clean(result.result())
