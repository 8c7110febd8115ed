"""pixel_shuffle_linear's kernels against float64, forward and backward, by the contraction rule."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from benchmarks.compiled.compiler import TARGETS, assert_clean, compile_kernel
from benchmarks.compiled.jobs import pixel_shuffle_job, pixel_shuffle_jobs, small_jobs
from hrvlm_kernels import PackedGrids, reference
from hrvlm_kernels.ops.pixel_shuffle_linear import pixel_shuffle_linear
from hrvlm_kernels.triton_kernels import pixel_shuffle_linear as kernels
from hrvlm_kernels.triton_kernels import pixel_shuffle_linear_backward as backward_kernels
from tests.kernels.helpers import (
    DTYPES,
    CountingBackend,
    assert_like_reference,
    far_rows,
    gradients,
    interpreter_only,
    strided_copy,
)

pytestmark = interpreter_only

# 1, 12, 35 and 2 output tokens; the kernel's tiles hold 32 under the interpreter.
TOKEN_GRIDS = [(1, 1), (3, 4), (5, 7), (1, 2)]


def pack(factor, token_grids=TOKEN_GRIDS, prefix=3, device="cpu"):
    grids = [(gh * factor, gw * factor) for gh, gw in token_grids]
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=prefix, device=device)
    packed.shuffle_index(factor)  # inside torch.compile it would be traced, grids and all
    return packed


def make_inputs(packed, factor, channels, features, dtype, rng):
    """x, weight, bias and a cotangent of the output."""
    width = factor**2 * channels
    x = torch.randn(packed.total_tokens, channels, generator=rng)
    weight = torch.randn(features, width, generator=rng) / width**0.5
    bias = torch.randn(features, generator=rng)
    rows = sum(gh * gw for gh, gw in packed.token_grids(factor))
    cotangent = torch.randn(rows, features, generator=rng)
    return [a.to(packed.device, dtype) for a in (x, weight, bias, cotangent)]


def compare(packed, factor, x, weight, bias, cotangent):
    """The kernels against the reference in float64 and in the dtype of x; returns their results."""

    def run(backend):
        return lambda x, w, b: pixel_shuffle_linear(x, packed, factor, w, b, backend=backend)

    def oracle(x, w, b):
        return reference.pixel_shuffle_linear(x, packed, factor, w, b, upcast=torch.float64)

    inputs = (x, weight, bias)
    got = gradients(run("triton"), inputs, cotangent)
    expected = gradients(
        oracle, [None if a is None else a.double() for a in inputs], cotangent.double()
    )
    baseline = gradients(run("eager"), inputs, cotangent)
    assert_like_reference(got[:2], expected[:2], baseline[:2], packed)
    assert_like_reference(got[2:], expected[2:], baseline[2:])
    if packed.num_prefix_tokens:
        for rows in packed.split(got[1]):
            assert not rows[: packed.num_prefix_tokens].any()
    return got


def check_all(
    factor=2,
    channels=48,
    features=33,
    dtype=torch.float32,
    *,
    bias=True,
    prefix=3,
    seed=0,
    grids=TOKEN_GRIDS,
    device="cpu",
):
    packed = pack(factor, grids, prefix, device)
    rng = torch.Generator().manual_seed(seed)
    x, weight, b, cotangent = make_inputs(packed, factor, channels, features, dtype, rng)
    compare(packed, factor, x, weight, b if bias else None, cotangent)


def check_order():
    """With the identity for a weight, the kernel is the gather itself: equal bits."""
    for order, factor, channels in (
        ("nanovlm", 1, 33),
        ("nanovlm", 2, 16),
        ("nanovlm", 3, 5),
        ("qwen", 2, 16),
        ("internvl_v1", 3, 5),
        ("mistral", 2, 7),
        ("glm", 3, 5),
    ):
        packed = pack(factor)
        width = factor**2 * channels
        x = torch.randn(packed.total_tokens, channels, generator=torch.Generator().manual_seed(1))
        eye = torch.eye(width)
        out = pixel_shuffle_linear(x, packed, factor, eye, order=order, backend="triton")
        assert torch.equal(out, reference.pixel_shuffle(x, packed, factor, order=order))


def check_parts(parts=3, dtype=torch.float32, *, grids=TOKEN_GRIDS):
    """Sums cut into parts, with a bias."""
    rng = torch.Generator().manual_seed(2)
    packed = pack(2, grids)
    x, weight, bias, dy = make_inputs(packed, 2, 40, 33, dtype, rng)
    index = packed.shuffle_index(2)
    out, dw = torch.empty_like(dy), torch.empty_like(weight)
    kernels.forward(x, index, weight, bias, out, parts=parts)
    backward_kernels.backward_dweight(dy, x, index, dw, parts=parts)
    rows = reference.pixel_shuffle(x, packed, 2)
    oracles = F.linear(rows.double(), weight.double(), bias.double()), dy.double().T @ rows.double()
    assert_like_reference((out, dw), oracles, (F.linear(rows, weight, bias), dy.T @ rows))
    return out, dw


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("factor", "channels", "features"),
    [(1, 16, 1), (1, 200, 64), (2, 40, 65), (3, 32, 32), (4, 16, 33), (2, 5, 7)],
)
def test_forward_and_backward(factor, channels, features, dtype):
    check_all(factor, channels, features, dtype)


def test_without_bias_and_without_prefix():
    check_all(bias=False, prefix=0)


def test_order_of_patches_and_channels():
    check_order()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 2, 5, 100])
def test_sums_cut_into_parts(parts, dtype):
    first, second = check_parts(parts, dtype), check_parts(parts, dtype)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_parts_fill_the_chip_and_no_more():
    assert kernels.count_parts(tiles=64, steps=256, processors=132) == 4
    assert kernels.count_parts(tiles=131, steps=256, processors=132) == 2
    assert kernels.count_parts(tiles=132, steps=256, processors=132) == 1
    assert kernels.count_parts(tiles=1, steps=256, processors=132) == 16
    assert kernels.count_parts(tiles=1, steps=20, processors=132) == 2
    assert kernels.count_parts(tiles=1, steps=3, processors=132) == 1
    for parts in (None, 1, 3, 7, 50):
        for steps in (1, 3, 16, 17):
            n, each = kernels.cut(4, steps, 132, parts)
            assert (n - 1) * each < steps <= n * each


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype, rng):
    packed = pack(2)
    x, weight, bias, dy = make_inputs(packed, 2, 32, 40, dtype, rng)
    expected = compare(packed, 2, x, weight, bias, dy)
    other = (
        (strided_copy(x), strided_copy(weight), torch.stack([bias, dy[0]], 1)[:, 0]),
        (x.T.contiguous().T, weight.T.contiguous().T, bias),
    )
    for (x_i, weight_i, bias_i), dy_i in zip(
        other, (dy.T.contiguous().T, strided_copy(dy)), strict=True
    ):
        got = compare(packed, 2, x_i, weight_i, bias_i, dy_i)
        for a, b in zip(got, expected, strict=True):
            assert a.ndim == 1 or torch.equal(a, b)  # torch adds the bias's gradient by strides
    for dy_i in (dy[:1].expand(dy.shape), dy[:, :1].expand(dy.shape), dy[:1, :1].expand(dy.shape)):
        compare(packed, 2, x, weight, bias, dy_i)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_the_gradients_asked_for(wanted, rng):
    packed = pack(2)
    x, weight, bias, dy = make_inputs(packed, 2, 16, 8, torch.float32, rng)
    everything = compare(packed, 2, x, weight, bias, dy)
    leaves = [a.clone().requires_grad_(i in wanted) for i, a in enumerate((x, weight, bias))]
    out = pixel_shuffle_linear(leaves[0], packed, 2, *leaves[1:], backend="triton")
    out.backward(dy)
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, everything[i + 1])


def test_an_image_alone_equals_the_image_in_a_pack(rng):
    packed = pack(2)
    x, weight, bias, dy = make_inputs(packed, 2, 32, 40, torch.float16, rng)
    out, dx, *_ = compare(packed, 2, x, weight, bias, dy)
    rows = [gh * gw for gh, gw in TOKEN_GRIDS]
    parts = zip(packed.split(x), dy.split(rows), out.split(rows), packed.split(dx), strict=True)
    for grid, (x_i, dy_i, out_i, dx_i) in zip(TOKEN_GRIDS, parts, strict=True):
        alone, dx_alone, *_ = compare(pack(2, [grid]), 2, x_i, weight, bias, dy_i)
        assert torch.equal(alone, out_i) and torch.equal(dx_alone, dx_i)


def test_nan_stays_in_its_image(rng):
    packed = pack(2)
    x, weight, bias, dy = make_inputs(packed, 2, 32, 40, torch.float32, rng)
    x[:3] = float("nan")  # a prefix: no output, and no gradient of the weight, comes from it
    clean = gradients(
        lambda *a: pixel_shuffle_linear(a[0], packed, 2, *a[1:], backend="triton"),
        (x, weight, bias),
        dy,
    )
    assert all(torch.isfinite(a).all() for a in clean)
    x, dy = x.clone(), dy.clone()
    x[packed.split(x)[0].shape[0] + 3 :][:48] = float("nan")  # the patches of image 1
    dy[1:13] = float("nan")  # its output tokens
    out, dx, *_ = gradients(
        lambda *a: pixel_shuffle_linear(a[0], packed, 2, *a[1:], backend="triton"),
        (x, weight, bias),
        dy,
    )
    assert torch.isnan(out[1:13]).all() and torch.isnan(packed.split(dx)[1][3:]).all()
    assert torch.equal(out[13:], clean[0][13:]) and torch.equal(out[:1], clean[0][:1])
    for i in (0, 2, 3):
        assert torch.equal(packed.split(dx)[i], packed.split(clean[1])[i])


@pytest.mark.parametrize("features", [0, 8])
def test_no_images(features):
    packed = PackedGrids.from_grids([], num_prefix_tokens=3)
    x = torch.zeros(0, 16, requires_grad=True)
    weight = torch.randn(features, 64, requires_grad=True)
    bias = torch.zeros(features, requires_grad=True)
    out = pixel_shuffle_linear(x, packed, 2, weight, bias, backend="triton")
    assert out.shape == (0, features)
    out.backward(torch.zeros_like(out))
    assert x.grad.shape == (0, 16)
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_no_output_features():
    packed = pack(2)
    x = torch.randn(packed.total_tokens, 16, requires_grad=True)
    out = pixel_shuffle_linear(x, packed, 2, torch.zeros(0, 64), backend="triton")
    out.backward(torch.zeros_like(out))
    assert out.shape == (50, 0) and not x.grad.any()


def test_offsets_beyond_int32(rng, tmp_path):
    packed = PackedGrids.from_grids([(2, 2)], num_prefix_tokens=1)
    x, weight, bias, dy = make_inputs(packed, 2, 8, 5, torch.float16, rng)
    expected = compare(packed, 2, x, weight, bias, dy)
    got = compare(packed, 2, far_rows(x, tmp_path), weight, bias, dy)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


# Dtypes


def test_weight_is_cast_to_the_dtype_of_x(rng):
    packed = pack(2)
    x, weight, bias, dy = make_inputs(packed, 2, 16, 8, torch.float32, rng)
    mixed, same = (
        gradients(
            lambda *a: pixel_shuffle_linear(a[0], packed, 2, *a[1:], backend="triton"), inputs, dy
        )
        for inputs in ((x.half(), weight, bias), (x.half(), weight.half(), bias.half()))
    )
    assert [a.dtype for a in mixed] == [torch.float16] * 2 + [torch.float32] * 2
    for a, b in zip(mixed, same, strict=True):
        assert torch.equal(a.half(), b)


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_autocast_works_as_for_linear(backend, rng):
    packed = pack(2)
    x, weight, bias, dy = make_inputs(packed, 2, 16, 8, torch.float32, rng)

    def run(x, weight, bias):
        with torch.autocast("cpu", dtype=torch.float16):
            return pixel_shuffle_linear(x, packed, 2, weight, bias, backend=backend)

    out, *grads = gradients(run, (x, weight, bias), dy)
    halves = make_inputs(packed, 2, 16, 8, torch.float16, torch.Generator().manual_seed(1234))
    expected = gradients(
        lambda *a: pixel_shuffle_linear(a[0], packed, 2, *a[1:], backend=backend),
        halves[:3],
        halves[3],
    )
    assert out.dtype == torch.float16
    assert all(a.dtype == torch.float32 for a in grads)
    for a, b in zip((out, *grads), expected, strict=True):
        assert torch.equal(a.half(), b)


def test_float32_products_follow_torchs_setting():
    before = torch.get_float32_matmul_precision()
    try:
        for setting, precision in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert kernels.dot_precision(torch.float32) == precision
            assert kernels.dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_float32_products_follow_torchs_newer_setting(setting):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        assert kernels.dot_precision(torch.float32) == setting
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# As a torch citizen


def test_opcheck(rng):
    packed = pack(2, [(1, 2), (2, 1)], prefix=1)
    x, weight, bias, dy = make_inputs(packed, 2, 16, 8, torch.float32, rng)
    index, ends, ops = packed.shuffle_index(2), packed.cu_seqlens, torch.ops.hrvlm_kernels
    leaves = [a.clone().requires_grad_() for a in (x, weight, bias)]
    torch.library.opcheck(ops.pixel_shuffle_linear, (leaves[0], index, ends, *leaves[1:], 1))
    torch.library.opcheck(ops.pixel_shuffle_linear, (x, index, ends, leaves[1], None, 1))
    torch.library.opcheck(
        ops.pixel_shuffle_linear_dx, (dy, weight, index, ends, 1, packed.total_tokens)
    )
    torch.library.opcheck(ops.pixel_shuffle_linear_dweight, (dy, x, index))


def test_one_graph_for_many_packings(rng):
    backend = CountingBackend()

    def run(x, packed, weight, bias):
        return pixel_shuffle_linear(x * 2, packed, 2, weight, bias, backend="triton").sin()

    compiled = torch.compile(run, fullgraph=True, backend=backend, dynamic=True)
    for grids in ([(2, 3)], [(4, 1), (5, 2)], [(3, 3)] * 4, [(7, 2)]):
        packed = pack(2, grids)
        x, weight, bias, dy = make_inputs(packed, 2, 16, 8, torch.float32, rng)
        results = [
            gradients(lambda x, w, b: f(x, packed, w, b), (x, weight, bias), dy)  # noqa: B023
            for f in (compiled, run)
        ]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
    assert backend.graphs == 1


def test_at_most_two_graphs_without_being_told_that_sizes_change(rng):
    backend = CountingBackend()
    weight = torch.randn(8, 64, generator=rng)

    @torch.compile(fullgraph=True, backend=backend)
    def run(x, packed):
        return pixel_shuffle_linear(x, packed, 2, weight, backend="triton")

    for grids in ([(2, 3)], [(4, 1), (5, 2)], [(3, 3)] * 4, [(7, 2)], [(1, 1), (2, 2)]):
        packed = pack(2, grids)
        run(torch.randn(packed.total_tokens, 16, generator=rng), packed)
    assert backend.graphs <= 2


def test_functional_call_and_activation_checkpointing(rng):
    packed = pack(2)
    x, weight, bias, dy = make_inputs(packed, 2, 16, 8, torch.float32, rng)

    class Projector(torch.nn.Linear):
        def forward(self, x):
            return pixel_shuffle_linear(x, packed, 2, self.weight, self.bias, backend="triton")

    module = Projector(64, 8)
    expected = compare(packed, 2, x, weight, bias, dy)

    def call(x, weight, bias):
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(module, parameters, (x,))

    for run in (call, lambda *a: checkpoint(call, *a, use_reentrant=False)):
        for a, b in zip(gradients(run, (x, weight, bias), dy), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", [0, 1])
def test_double_backward_raises(wanted, rng):
    packed = pack(2, [(1, 2)])
    x, weight, _, dy = make_inputs(packed, 2, 16, 8, torch.float32, rng)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    out = pixel_shuffle_linear(x, packed, 2, weight, backend="triton")
    (grad,) = torch.autograd.grad(out, leaves[wanted], dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(grad, dy, torch.randn_like(grad))


def test_wrong_inputs_raise():
    packed = PackedGrids.from_grids([(2, 2), (2, 3)])
    x, weight = torch.zeros(10, 16), torch.zeros(8, 64)
    with pytest.raises(ValueError, match="image 1: patch grid 2x3"):
        pixel_shuffle_linear(x, packed, 2, weight, backend="triton")
    packed = PackedGrids.from_grids([(2, 2)], num_prefix_tokens=6)
    for message, args in {
        "x has 9 rows": (x[:9], weight, None),
        r"weight must be \[N, factor\*\*2 \* C\] = \[N, 64\]": (x, weight[:, 1:], None),
        r"weight must be a float tensor, got torch.int8": (x, weight.to(torch.int8), None),
        r"bias must be \[8\]": (x, weight, torch.zeros(7)),
        r"x must be \[T, C\]": (x[:, :0], weight[:, :0], None),
    }.items():
        with pytest.raises(ValueError, match=message):
            pixel_shuffle_linear(args[0], packed, 2, *args[1:], backend="triton")
    with pytest.raises(RuntimeError, match=r"not torch\.float64"):
        pixel_shuffle_linear(x.double(), packed, 2, weight, backend="triton")


@settings(max_examples=10, deadline=None)
@given(
    grids=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=3),
    factor=st.integers(1, 4),
    prefix=st.integers(0, 5),
    channels=st.sampled_from([16, 32, 48, 7]),
    features=st.integers(1, 40),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_random_packs(grids, factor, prefix, channels, features, bias, dtype, seed):
    check_all(factor, channels, features, dtype, bias=bias, prefix=prefix, seed=seed, grids=grids)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles_clean(target):
    # float32 dx is the loop of float32 forward.
    jobs = [job for job in pixel_shuffle_jobs(target) if not re.search("dx .*fp32", job.name)]
    for job in (*jobs, *(small_jobs(target) if target in ("sm_90", "gfx942") else ())):
        built = compile_kernel(job.kernel, job.signature, job.constants, target, **job.options)
        assert_clean(built, tensor_core=job.tensor_core)
        if job.tensor_core and target.startswith("sm_"):
            # Operands go to shared memory by 16 bytes and asynchronously, not through registers.
            assert built.ops["LDGSTS"] >= 8, f"{job.name} on {target}: {built.ops}"


@pytest.mark.slow
def test_variants_compile_clean():
    """TF32 products, and channels that no block divides."""
    (half,), (single,) = (
        kernels.select_configs("sm_90", dtype) for dtype in (torch.bfloat16, torch.float32)
    )
    for job in (
        pixel_shuffle_job("forward", torch.float32, single, precision="tf32"),
        pixel_shuffle_job("dweight", torch.float32, single, precision="tf32"),
        pixel_shuffle_job("forward", torch.float32, single, precision="tf32", split=True),
        pixel_shuffle_job("forward", torch.bfloat16, half, channels=48),
        pixel_shuffle_job("dx", torch.bfloat16, half, channels=48, factor=3),
    ):
        built = compile_kernel(job.kernel, job.signature, job.constants, "sm_90", **job.options)
        assert_clean(built, tensor_core=True)
