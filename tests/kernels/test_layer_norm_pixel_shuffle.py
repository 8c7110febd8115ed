"""layer_norm_pixel_shuffle's kernels against float64, and the two routes to the projection."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.compiled.compiler import TARGETS, assert_clean, compile_kernel
from benchmarks.compiled.jobs import layer_norm_job, layer_norm_jobs
from hrvlm_kernels import PackedGrids
from hrvlm_kernels.ops.layer_norm_pixel_shuffle import (
    choose_route,
    layer_norm_pixel_shuffle,
    layer_norm_pixel_shuffle_linear,
)
from hrvlm_kernels.triton_kernels import layer_norm_pixel_shuffle as kernels
from tests.kernels.helpers import (
    DTYPES,
    CountingBackend,
    assert_like_reference,
    equal_if_interpreted,
    far_rows,
    gradients,
    interpreter_only,
    strided_copy,
)

pytestmark = interpreter_only

TOKEN_GRIDS = [(1, 1), (3, 4), (5, 7), (1, 2)]
EPS = 1e-3  # large enough that forgetting it shows


def pack(factor, token_grids=TOKEN_GRIDS, prefix=3, device="cpu"):
    grids = [(gh * factor, gw * factor) for gh, gw in token_grids]
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=prefix, device=device)
    packed.shuffle_index(factor)  # inside torch.compile it would be traced, grids and all
    return packed


def make_inputs(packed, factor, channels, dtype, rng):
    """x, weight, bias and a cotangent of the output; some rows of x are nearly constant."""
    x = torch.randn(packed.total_tokens, channels, generator=rng) * 3 + 1
    x[::7] = x[::7] * 0.01 + 2
    weight, bias = torch.randn(2, channels, generator=rng).unbind()
    rows = sum(gh * gw for gh, gw in packed.token_grids(factor))
    cotangent = torch.randn(rows, factor**2 * channels, generator=rng)
    return [a.to(packed.device, dtype) for a in (x, weight, bias, cotangent)]


def run(packed, factor, backend="triton", **options):
    return lambda x, weight, bias: layer_norm_pixel_shuffle(
        x, packed, factor, weight, bias, EPS, backend=backend, **options
    )


def compare(packed, factor, x, weight, bias, cotangent):
    """The kernels against the reference in float64 and in the dtype of x; returns their results."""
    inputs = (x, weight, bias)
    got = gradients(run(packed, factor), inputs, cotangent)
    double = [None if a is None else a.double() for a in inputs]
    expected = gradients(run(packed, factor, "eager"), double, cotangent.double())
    baseline = gradients(run(packed, factor, "eager"), inputs, cotangent)
    assert_like_reference(got[:2], expected[:2], baseline[:2], packed)
    assert_like_reference(got[2:], expected[2:], baseline[2:])
    if packed.num_prefix_tokens:
        for rows in packed.split(got[1]):
            assert not rows[: packed.num_prefix_tokens].any()
    return got


def check_all(
    factor=2,
    channels=48,
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
    x, weight, b, cotangent = make_inputs(packed, factor, channels, dtype, rng)
    compare(packed, factor, x, weight, b if bias else None, cotangent)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("factor", "channels"), [(1, 16), (2, 48), (3, 600), (4, 1024), (2, 5)])
def test_forward_and_backward(factor, channels, dtype):
    check_all(factor, channels, dtype)


def test_rows_that_are_nearly_constant():
    check_all(1, 16, bias=False, seed=29, grids=[(1, 1), (1, 1)])


def test_without_bias_and_without_prefix():
    check_all(bias=False, prefix=0)


def test_equals_torchs_layer_norm_then_the_gather(rng):
    packed = pack(2)
    x, weight, bias, _ = make_inputs(packed, 2, 64, torch.float32, rng)
    out = run(packed, 2)(x, weight, bias)
    expected = F.layer_norm(x, (64,), weight, bias, EPS)[packed.shuffle_index(2)].flatten(1)
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype, rng):
    packed = pack(2)
    x, weight, bias, dy = make_inputs(packed, 2, 32, dtype, rng)
    expected = compare(packed, 2, x, weight, bias, dy)
    pair = torch.stack([weight, bias], 1)
    transposed = x.T.contiguous().T, dy.T.contiguous().T
    for x_i, dy_i in ((strided_copy(x), strided_copy(dy)), transposed):
        got = compare(packed, 2, x_i, pair[:, 0], pair[:, 1], dy_i)
        for a, b in zip(got, expected, strict=True):
            assert equal_if_interpreted(a, b)  # strides decide the vector width: see helpers.py
    for dy_i in (dy[:1].expand(dy.shape), dy[:, :1].expand(dy.shape), dy[:1, :1].expand(dy.shape)):
        compare(packed, 2, x, weight, bias, dy_i)


def test_an_image_alone_equals_the_image_in_a_pack(rng):
    packed = pack(2)
    x, weight, bias, dy = make_inputs(packed, 2, 32, torch.float16, rng)
    x[:3] = float("nan")  # a prefix, which nothing reads
    rows = [gh * gw for gh, gw in TOKEN_GRIDS]
    out, dx, *parameters = gradients(run(packed, 2), (x, weight, bias), dy)
    assert all(torch.isfinite(a).all() for a in (out, dx, *parameters))
    parts = zip(packed.split(x), dy.split(rows), out.split(rows), packed.split(dx), strict=True)
    for grid, (x_i, dy_i, out_i, dx_i) in zip(TOKEN_GRIDS, parts, strict=True):
        alone = gradients(run(pack(2, [grid]), 2), (x_i, weight, bias), dy_i)
        assert torch.equal(alone[0], out_i) and torch.equal(alone[1], dx_i)


def test_no_images():
    packed = PackedGrids.from_grids([], num_prefix_tokens=3)
    inputs = torch.zeros(0, 16), torch.ones(16), torch.ones(16)
    out, dx, dw, db = gradients(run(packed, 2), inputs, torch.zeros(0, 64))
    assert out.shape == (0, 64) and dx.shape == (0, 16)
    assert torch.equal(dw, torch.zeros(16)) and torch.equal(db, torch.zeros(16))


def test_offsets_beyond_int32(rng, tmp_path):
    packed = pack(2, [(1, 1)], prefix=1)
    x, weight, bias, dy = make_inputs(packed, 2, 8, torch.float16, rng)
    expected = compare(packed, 2, x, weight, bias, dy)
    got = compare(packed, 2, far_rows(x, tmp_path), weight, bias, dy)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_float32_parameters_and_another_output_dtype(rng):
    packed = pack(2)
    x, weight, bias, dy = make_inputs(packed, 2, 32, torch.float32, rng)
    half = x.half()
    mixed = gradients(run(packed, 2, dtype=torch.float32), (half, weight, bias), dy)
    single = gradients(run(packed, 2), (half.float(), weight, bias), dy)
    assert [a.dtype for a in mixed] == [torch.float32, torch.float16, *[torch.float32] * 2]
    assert torch.equal(mixed[0], single[0])
    assert torch.equal(mixed[1], single[1].half())
    eager = run(packed, 2, "eager", dtype=torch.float32)(half, weight, bias)
    assert eager.dtype == torch.float32


# The two routes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ["fused", "layernorm_gemm", "auto"])
def test_routes_agree(route, dtype, rng):
    packed = pack(2)
    x, weight, bias, _ = make_inputs(packed, 2, 32, dtype, rng)
    matrix = (torch.randn(40, 128, generator=rng) / 11).to(dtype)
    shift = torch.randn(40, generator=rng).to(dtype)
    dy = torch.randn(50, 40, generator=rng).to(dtype)

    def project(backend):
        return lambda x, w, b, m, s: layer_norm_pixel_shuffle_linear(
            x, packed, 2, w, b, EPS, m, s, route=route, backend=backend
        )

    inputs = (x, weight, bias, matrix, shift)
    got = gradients(project("triton"), inputs, dy)
    expected = gradients(project("eager"), [a.double() for a in inputs], dy.double())
    baseline = gradients(project("eager"), inputs, dy)
    # Fused in float32, one small image errs 2.1 times as much as the baseline.
    factor = 2.5 if (route, dtype) == ("fused", torch.float32) else 2.0
    assert_like_reference(got[:2], expected[:2], baseline[:2], packed, factor=factor)
    assert_like_reference(got[2:], expected[2:], baseline[2:])


def test_routes_under_autocast(rng):
    packed = pack(2)
    x, weight, bias, _ = make_inputs(packed, 2, 32, torch.float32, rng)
    matrix = torch.randn(40, 128, generator=rng) / 11
    outs = []
    for route in ("fused", "layernorm_gemm"):
        with torch.autocast("cpu", dtype=torch.float16):
            out = layer_norm_pixel_shuffle_linear(
                x, packed, 2, weight, bias, EPS, matrix, route=route, backend="triton"
            )
        assert out.dtype == torch.float16
        outs.append(out.float())
    torch.testing.assert_close(*outs, rtol=0, atol=2e-2)


def test_the_route_follows_the_size_of_the_product():
    assert choose_route(out_features=960, channels=1024) == "fused"
    assert choose_route(out_features=4096, channels=1024) == "layernorm_gemm"


# As a torch citizen


def test_opcheck(rng):
    packed = pack(2, [(1, 2), (2, 1)], prefix=1)
    x, weight, bias, dy = make_inputs(packed, 2, 16, torch.float32, rng)
    index, ends, ops = packed.shuffle_index(2), packed.cu_seqlens, torch.ops.hrvlm_kernels
    leaves = [a.clone().requires_grad_() for a in (x, weight, bias)]
    forward = ops.layer_norm_pixel_shuffle
    torch.library.opcheck(forward, (leaves[0], index, ends, *leaves[1:], EPS, 1, torch.float32))
    torch.library.opcheck(forward, (x, index, ends, leaves[1], None, EPS, 1, torch.float16))
    torch.library.opcheck(
        ops.layer_norm_pixel_shuffle_backward, (dy, x, index, ends, weight, EPS, 1)
    )


def test_one_graph_for_many_packings(rng):
    backend, counts = CountingBackend(), set()
    matrix = torch.randn(8, 64, generator=rng)

    def project(x, packed, weight, bias):
        return layer_norm_pixel_shuffle_linear(
            x, packed, 2, weight, bias, EPS, matrix, route="layernorm_gemm", backend="triton"
        )

    compiled = torch.compile(project, fullgraph=True, backend=backend, dynamic=True)
    for grids in ([(2, 3)], [(4, 1), (5, 2)], [(3, 3)] * 4, [(7, 2)]):
        packed = pack(2, grids)
        x, weight, bias, _ = make_inputs(packed, 2, 16, torch.float32, rng)
        dy = torch.randn(sum(gh * gw for gh, gw in grids), 8, generator=rng)
        results = [
            gradients(lambda x, w, b: f(x, packed, w, b), (x, weight, bias), dy)  # noqa: B023
            for f in (compiled, project)
        ]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        counts.add(backend.graphs)
    assert len(counts) == 1  # the first compilation starts twice: the float eps turns out constant


def test_double_backward_raises(rng):
    packed = pack(2, [(1, 2)])
    x, weight, bias, dy = make_inputs(packed, 2, 16, torch.float32, rng)
    out = run(packed, 2)(x.requires_grad_(), weight, bias)
    (grad,) = torch.autograd.grad(out, x, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(grad, dy, torch.randn_like(grad))


def test_wrong_inputs_raise():
    packed = PackedGrids.from_grids([(2, 2)], num_prefix_tokens=6)
    x, weight = torch.zeros(10, 16), torch.ones(16)
    for message, args in {
        "x has 9 rows": (x[:9], packed, 2, weight),
        "image 0: patch grid 2x2": (x, packed, 3, weight),
        r"norm_weight must be a float tensor \[16\]": (x, packed, 2, weight[1:]),
        r"norm_bias must be a float tensor \[16\]": (x, packed, 2, weight, weight.long()),
        "C must be between 1 and 8192": (torch.zeros(10, 8193), packed, 2, weight),
    }.items():
        with pytest.raises(ValueError, match=message):
            layer_norm_pixel_shuffle(*args, backend="triton")
    with pytest.raises(ValueError, match="route must be one of"):
        layer_norm_pixel_shuffle_linear(
            x, packed, 2, weight, None, EPS, torch.zeros(8, 64), route="fast"
        )


@settings(max_examples=10, deadline=None)
@given(
    grids=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=4),
    factor=st.integers(1, 4),
    prefix=st.integers(0, 5),
    channels=st.sampled_from([16, 32, 48, 80, 7]),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_random_packs(grids, factor, prefix, channels, bias, dtype, seed):
    check_all(factor, channels, dtype, bias=bias, prefix=prefix, seed=seed, grids=grids)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles_clean(target):
    jobs = list(layer_norm_jobs(target, widths=(1024, 4096)))
    if target == "sm_90":  # the widths of no known encoder
        for width in (2048, 8192):
            for backward in (False, True):
                config = kernels.select_config(target, width, backward=backward)
                jobs.append(layer_norm_job(width, torch.float32, config, backward))
    for job in jobs:
        built = compile_kernel(job.kernel, job.signature, job.constants, target, **job.options)
        assert_clean(built)
