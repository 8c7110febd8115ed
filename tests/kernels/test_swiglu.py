"""swiglu's kernels against float64, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.compiled.compiler import TARGETS, assert_clean, submit_compile
from benchmarks.compiled.jobs import swiglu_jobs
from hrvlm_kernels import reference, swiglu
from tests.kernels.helpers import (
    DTYPES,
    assert_like_reference,
    far_rows,
    gradients,
    interpreter_only,
    strided_copy,
)
from tests.kernels.mutations import caught, plant


def make_inputs(tokens=5, width=1100, dtype=torch.float32, *, seed=0, device="cpu"):
    """Gate and up, from flat to steep parts of the sigmoid, and a cotangent."""
    rng = torch.Generator().manual_seed(seed)
    gate, up, cotangent = torch.randn(3, tokens, width, generator=rng).unbind()
    gate[:, ::3] *= 12
    return [a.to(device, dtype) for a in (gate, up)], cotangent.to(device, dtype)


def kernel(gate, up):
    return swiglu(gate, up, backend="triton")


def check(*args, **options):
    inputs, cotangent = make_inputs(*args, **options)
    return compare(inputs, cotangent)


def compare(inputs, cotangent):
    """Output and gradients, once they are known to be right."""
    got = gradients(kernel, inputs, cotangent)
    exact = gradients(reference.swiglu, [a.double() for a in inputs], cotangent)
    assert_like_reference(got, exact, gradients(reference.swiglu, inputs, cotangent))
    return got


@interpreter_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (7, 48), (3, 2048), (2, 2049)])
def test_forward_and_backward(tokens, width, dtype):
    check(tokens, width, dtype)


@interpreter_only
@pytest.mark.parametrize("shape", [(0, 48), (3, 0)])
def test_nothing_to_do(shape):
    inputs, cotangent = make_inputs(*shape)
    assert all(a.shape == shape for a in gradients(kernel, inputs, cotangent))


@interpreter_only
def test_gates_that_saturate():
    """Where exp overflows the sigmoid is 0 or 1, and nothing is NaN."""
    gate = torch.tensor([[-200.0, -90.0, 90.0, 200.0]])
    up, cotangent = torch.full_like(gate, 3), torch.full_like(gate, 2)
    out, dgate, dup = gradients(kernel, [gate, up], cotangent)
    assert torch.equal(out, torch.tensor([[0.0, 0.0, 270.0, 600.0]]))
    assert torch.equal(dgate, torch.tensor([[0.0, 0.0, 6.0, 6.0]]))
    assert torch.equal(dup, torch.tensor([[0.0, 0.0, 180.0, 400.0]]))


@interpreter_only
def test_any_strides(tmp_path):
    """Halves of one product, unaligned rows, columns first, and offsets beyond int32."""
    inputs, cotangent = make_inputs(4, 24, torch.float16)
    expected = gradients(kernel, inputs, cotangent)
    halves = torch.cat(inputs, dim=1).chunk(2, dim=1)
    moved = {
        "halves": (halves, cotangent),
        "unaligned": ([strided_copy(a) for a in inputs], strided_copy(cotangent)),
        "columns first": ([a.T.contiguous().T for a in inputs], cotangent.T.contiguous().T),
        "far": ([far_rows(inputs[0], tmp_path), inputs[1]], cotangent),
    }
    for name, (others, g) in moved.items():
        got = gradients(kernel, others, g)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), name


@interpreter_only
def test_opcheck_and_one_graph(monkeypatch):
    monkeypatch.undo()  # opcheck compares what empty tensors hold
    inputs, cotangent = make_inputs(3, 8)
    ops = torch.ops.hrvlm_kernels
    torch.library.opcheck(ops.swiglu, [a.clone().requires_grad_() for a in inputs])
    torch.library.opcheck(ops.swiglu_backward, (cotangent, *inputs))
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        gradients(compiled, inputs, cotangent), gradients(kernel, inputs, cotangent), strict=True
    ):
        assert torch.equal(a, b)


@interpreter_only
def test_only_gate_and_up_are_kept_for_the_backward():
    inputs, _ = make_inputs(3, 8)
    leaves = [a.requires_grad_() for a in inputs]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda a: a):
        kernel(*leaves)
    assert [a.data_ptr() for a in kept] == [a.data_ptr() for a in leaves]


def test_the_torch_path_is_torchs_own_and_wrong_inputs_raise():
    (gate, up), _ = make_inputs(3, 8)
    assert torch.equal(swiglu(gate, up), torch.nn.functional.silu(gate) * up)
    for message, args in {
        r"gate and up must be \[T, F\] both": (gate, up[1:]),
        "gate and up must have one dtype": (gate, up.half()),
    }.items():
        with pytest.raises(ValueError, match=message):
            swiglu(*args)


@interpreter_only
@settings(max_examples=8, deadline=None)
@given(
    tokens=st.integers(1, 6),
    width=st.integers(1, 3000),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_random_sizes(tokens, width, dtype, seed):
    check(tokens, width, dtype, seed=seed)


BUGS = {
    "no silu": ("b_out = b_gate * tl.sigmoid(b_gate)", "b_out = tl.sigmoid(b_gate)"),
    "gate and up swapped": ("b_dup = b_g * b_gate * s", "b_dup = b_g * b_up * s"),
    "slope of the sigmoid forgotten": (" * (1.0 + b_gate * (1.0 - s))", ""),
    "sign of the slope": ("(1.0 + b_gate", "(1.0 - b_gate"),
    "cotangent forgotten": ("b_dgate = b_g * b_up", "b_dgate = b_up"),
    "other rows' up": ("tl.load(up + i_t * stride_ut + o_f * stride_uf, mask=mask, other=0.0)"
                       ".to(tl.float32)\n    b_out",
                       "tl.load(up + 0 * stride_ut + o_f * stride_uf, mask=mask, other=0.0)"
                       ".to(tl.float32)\n    b_out"),
    "first piece only": ("o_f = i_f.to(tl.int64)\n    mask = i_f < F\n    b_gate",
                         "o_f = i_f.to(tl.int64)\n    mask = i_f < 1024\n    b_gate"),
}  # fmt: skip


@interpreter_only
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, "swiglu", *BUGS[bug])
    assert caught(check)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_clean_and_moves_16_bytes_at_a_time(target):
    jobs = list(swiglu_jobs(target, dtypes=(torch.bfloat16,)))
    built = [submit_compile(j.kernel, j.signature, j.constants, target, **j.options) for j in jobs]
    for result in built:
        assert_clean(result.result())
        if target.startswith("sm_"):
            accesses = result.result().global_ops
            assert {"LDG.E.128", "STG.E.128"} <= accesses.keys() and "LDG.E.U16" not in accesses


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [1536, 5120, 8192, 1001])
def test_on_a_gpu(width, dtype):
    inputs, cotangent = make_inputs(2309, width, dtype, device="cuda")
    first = compare(inputs, cotangent)
    halves = torch.cat(inputs, dim=1).chunk(2, dim=1)
    for others in (inputs, halves):
        for a, b in zip(gradients(kernel, others, cotangent), first, strict=True):
            assert torch.equal(a, b)
