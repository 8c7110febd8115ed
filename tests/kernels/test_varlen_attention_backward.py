"""The backward kernels of varlen_attention, and the op as torch sees it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from hrvlm_kernels import PackedGrids, backends
from hrvlm_kernels.ops.rope_2d import rope_2d
from hrvlm_kernels.ops.varlen_attention import _flash_attn_installed, varlen_attention
from hrvlm_kernels.triton_kernels import varlen_attention_backward as kernels
from hrvlm_kernels.triton_kernels.tile_tables import DKDV, DQ
from hrvlm_kernels.triton_kernels.tilings import Tiling
from hrvlm_kernels.triton_kernels.varlen_attention_backward import BackwardTilings
from tests.kernels.attention_cases import (
    ENDS,
    below_zero,
    check,
    check_kernel,
    kernel_results,
    make_case,
    with_layout,
)
from tests.kernels.helpers import (
    DTYPES,
    CountingBackend,
    equal_if_interpreted,
    far_rows,
    gradients,
    interpreter_only,
    strided_copy,
)

pytestmark = interpreter_only

# Every shape of tile in the tables.
SHAPES = [(128, 64), (128, 32), (128, 16), (64, 64), (64, 32), (64, 16), (32, 32), (32, 16)]


def force_tilings(monkeypatch, tilings):
    monkeypatch.setattr(kernels, "select_tilings", lambda *args: tilings)


def same(results, expected):
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 72, 80, 96, 128])
def test_ragged_packs(head_dim, dtype):
    lengths = (1, 5, 0, 63, 64, 65, 127, 128, 129) if head_dim <= 64 else (1, 64, 0, 129)
    check_kernel(make_case(lengths, head_dim=head_dim, dtype=dtype))


def test_long_segments():
    check_kernel(make_case((201, 577), head_dim=32))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_of_tile(shape, monkeypatch):
    tilings = (Tiling(*shape, 4, 1),)
    force_tilings(monkeypatch, BackwardTilings(tilings, tilings))
    case = make_case((1, 64, 65, 0, 129), head_dim=16, rope=shape[0] == 64)
    check_kernel(case)


def test_every_shape_of_tile_is_listed():
    rows = [kernels._INTERPRETER, *DQ.values(), *DKDV.values()]
    assert {(t.rows, t.step) for row in rows for t in row} == set(SHAPES)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 32), (3, 1, 32), (2, 1, 72)])
def test_shared_heads_of_k_and_v(heads, kv_heads, head_dim):
    check_kernel(make_case((70, 3, 129), heads=heads, kv_heads=kv_heads, head_dim=head_dim))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0, -0.3])
def test_scale(scale):
    check_kernel(make_case((33, 70), head_dim=32, dtype=torch.float32, scale=scale))


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(32, torch.float32), (80, torch.float32), *((d, torch.float16) for d in (32, 64, 80, 128))],
)
def test_rope_folded_in(head_dim, dtype):
    lengths = (5, 257) if dtype == torch.float16 else (5, 70)  # 257: not a short image
    case = make_case(lengths, head_dim=head_dim, dtype=dtype, rope=True)
    results = check_kernel(case)

    def apart(q, k, v):
        q, k = rope_2d(q, k, *case.rope, backend="triton")
        return varlen_attention(q, k, v, case.packed, backend="triton")

    # Of the long image: the short one's log-sum-exp comes from a kernel of its own. Compiled, the
    # products of the rotation are fused, and the log-sum-exp differs in its last bits.
    assert equal_if_interpreted(results[3][5:], gradients(apart, case.inputs, case.g)[3][5:])


# Segments and memory


@pytest.mark.parametrize(
    ("bad", "head_dim"), [(float("nan"), 32), (float("inf"), 32), (float("nan"), 72)]
)
def test_nothing_leaks_from_a_neighbour(bad, head_dim):
    case = make_case((70, 5, 65), head_dim=head_dim)
    clean = kernel_results(case)
    check(case, clean)
    for segment in (slice(0, 70), slice(70, 75), slice(75, 140)):
        poisoned = with_layout(case, torch.clone)
        for a in (*poisoned.inputs, poisoned.g):
            kept = a[segment].clone()
            a.fill_(bad)
            a[segment] = kept
        results = kernel_results(poisoned)
        assert same([a[segment] for a in results], [a[segment] for a in clean])


def test_scores_far_below_zero():
    """2^(0 - lse) overflows for keys past the end; it must not get into dq."""
    case = make_case((70, 100), head_dim=32)
    case.q[:] = 20 * case.q.abs()
    case.k[:] = -20 * case.k.abs()
    results = kernel_results(case)
    assert all(torch.isfinite(a).all() for a in results)


@pytest.mark.parametrize("rope", [False, True])
def test_no_key_past_any_end(rope):
    check_kernel(below_zero(make_case(ENDS, head_dim=16, rope=rope)))


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 1), (1, 1, 1)])
def test_no_tokens_and_single_tokens(lengths):
    case = make_case(lengths, heads=2, head_dim=32, dtype=torch.float32)
    results = kernel_results(case)
    assert torch.equal(results[3], case.g)
    if lengths:
        check(case, results)


def heads_first(a):
    return a.transpose(0, 1).contiguous().transpose(0, 1)


def spread(a):
    return torch.stack([a, torch.full_like(a, float("nan"))], -1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("layout", [heads_first, spread, strided_copy])
def test_any_strides(layout):
    case = make_case((70, 129), heads=2, head_dim=32)
    expected = kernel_results(case)
    results = check_kernel(with_layout(case, layout))
    assert all(map(equal_if_interpreted, results, expected))  # for TMA see the forward's test


def test_expanded_cotangents(rng):
    case = make_case((33, 70), heads=2, head_dim=32)
    rows = torch.randn(1, 1, 32, generator=rng).half().expand(case.g.shape)
    columns = torch.randn(103, 2, 1, generator=rng).half().expand(case.g.shape)
    for g in (rows, columns):
        check_kernel(replace(case, g=g))


def test_offsets_beyond_int32(tmp_path):
    case = make_case((3, 1), heads=2, head_dim=32)
    expected = kernel_results(case)
    for name in "qkvg":
        folder = tmp_path / name
        folder.mkdir()
        far = replace(case, **{name: far_rows(getattr(case, name), folder)})
        out = varlen_attention(*far.inputs, far.packed, backend="triton").detach()
        assert torch.equal(out, expected[0])
        lse = torch.empty(2, 4)
        varlen = torch.ops.hrvlm_kernels
        packed = far.packed
        tables = packed.cu_seqlens, packed.tiles(64), packed.tiles(128), packed.short_segments
        layout = (*tables, None, None, None, 32**-0.5)
        out, lse = varlen.varlen_attention(*far.inputs, *layout)
        grads = varlen.varlen_attention_backward(far.g, *far.inputs, out, lse, *layout)
        check(case, [out, *grads])


def test_an_input_without_gradient():
    case = make_case((33, 70), head_dim=32, dtype=torch.float32)
    expected = kernel_results(case)
    for i, name in enumerate("qkv"):
        leaf = getattr(case, name).detach().clone().requires_grad_()
        inputs = [leaf if n == name else a for n, a in zip("qkv", case.inputs, strict=True)]
        out = varlen_attention(*inputs, case.packed, backend="triton")
        (grad,) = torch.autograd.grad(out, leaf, case.g)
        assert torch.equal(grad, expected[i + 1])


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 135), min_size=1, max_size=2),
    group=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([16, 24, 32]),
    dtype=st.sampled_from(DTYPES),
    rope=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_packs(lengths, group, head_dim, dtype, rope, seed):
    options = {"head_dim": head_dim, "dtype": dtype, "rope": rope, "seed": seed}
    check_kernel(make_case(lengths, heads=group, kv_heads=1, **options))


# As a torch citizen


def op_arguments(case):
    packed, rope = case.packed, case.rope or (None, None)
    scale = case.q.shape[-1] ** -0.5
    tables = packed.cu_seqlens, packed.tiles(64), packed.tiles(128), packed.short_segments
    return *tables, *rope, None, scale


@pytest.mark.parametrize("rope", [False, True])
def test_opcheck(rope, monkeypatch):
    monkeypatch.undo()  # opcheck compares what empty tensors hold
    case = make_case((3, 0, 5), heads=2, kv_heads=1, head_dim=16, dtype=torch.float32, rope=rope)
    leaves = [a.clone().requires_grad_() for a in case.inputs]
    ops = torch.ops.hrvlm_kernels
    torch.library.opcheck(ops.varlen_attention, (*leaves, *op_arguments(case)))
    out, lse = ops.varlen_attention(*case.inputs, *op_arguments(case))
    args = (case.g, *case.inputs, out, lse, *op_arguments(case))
    torch.library.opcheck(ops.varlen_attention_backward, args)


def test_lse_has_no_gradient():
    case = make_case((3, 5), head_dim=16, dtype=torch.float32)
    leaves = [a.clone().requires_grad_() for a in case.inputs]
    out, lse = torch.ops.hrvlm_kernels.varlen_attention(*leaves, *op_arguments(case))
    assert out.requires_grad and not lse.requires_grad
    assert lse.shape == (1, 8) and lse.dtype == torch.float32


def test_double_backward_raises():
    case = make_case((3, 5), head_dim=16, dtype=torch.float32)
    q = case.q.clone().requires_grad_()
    g = case.g.clone().requires_grad_()
    out = varlen_attention(q, case.k, case.v, case.packed, backend="triton")
    (grad,) = torch.autograd.grad(out, q, g, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(grad, g, torch.randn_like(grad))


# Several tiles each, since torch.compile takes a size of 1 for a constant; and in the first pack no
# two numbers agree (segments, tiles, heads, offsets of the tables), since it takes those for one.
PACKS = [(400, 70), (65, 0, 70, 5), (130,)]


def test_one_graph_for_many_packings():
    backend = CountingBackend()

    def run(q, k, v, packed, rope):
        return varlen_attention(q * 2, k, v, packed, rope=rope, backend="triton").sin()

    compiled = torch.compile(run, fullgraph=True, backend=backend, dynamic=True)
    for lengths in PACKS:
        case = make_case(lengths, heads=2, head_dim=32, rope=True)
        results = [
            gradients(lambda *a: f(*a, case.packed, case.rope), case.inputs, case.g)  # noqa: B023
            for f in (compiled, run)
        ]
        assert same(*results)
    assert backend.graphs == 1


def test_at_most_two_graphs_without_being_told_that_sizes_change():
    backend = CountingBackend()

    @torch.compile(fullgraph=True, backend=backend)
    def run(q, k, v, packed):
        return varlen_attention(q, k, v, packed, backend="triton")

    for lengths in (*PACKS, (2, 200)):
        case = make_case(lengths, heads=2, head_dim=16)
        run(*case.inputs, case.packed)
    assert backend.graphs <= 2


@pytest.mark.skipif(_flash_attn_installed(), reason="flash-attn is installed")
def test_flash_attn_is_traced_and_says_what_is_missing(monkeypatch):
    """Up to the package's own call, which there is no GPU for."""
    monkeypatch.setattr(backends, "flash_attn_obstacle", lambda device, dtype: None)
    case = make_case((3, 5), heads=2, kv_heads=1, head_dim=16, dtype=torch.float32)

    @torch.compile(fullgraph=True, backend="eager")
    def run(q, k, v):
        return varlen_attention(q, k, v, case.packed, backend="flash_attn")

    with pytest.raises(Exception, match=r"got 1 and 2; flash-attn is not\s+installed"):
        run(*case.inputs)
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
        run(case.q, case.q, case.q)  # the graph is complete; the CPU can't run it


def test_activation_checkpointing_and_functional_call(monkeypatch):
    monkeypatch.undo()  # checkpoint calls torch.empty(requires_grad=True), which can't be poisoned
    case = make_case((33, 70), heads=2, head_dim=16, dtype=torch.float32)

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(96, 32))

        def forward(self, x):
            qkv = torch.nn.functional.linear(x, self.weight).unflatten(1, (3, 2, 16))
            return varlen_attention(*qkv.unbind(1), case.packed, backend="triton")

    module = Attention()
    inputs = case.q.flatten(1), torch.randn(96, 32, generator=torch.Generator().manual_seed(0))

    def call(x, weight):
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    def checkpointed(x, weight):
        return checkpoint(call, x, weight, use_reentrant=False)

    assert same(gradients(checkpointed, inputs, case.g), gradients(call, inputs, case.g))


@pytest.mark.parametrize("backend", ["triton", "sdpa", "eager"])
def test_autocast(backend):
    case = make_case((33, 70), heads=2, head_dim=32, dtype=torch.float32, rope=True)

    def run(q, k, v):
        with torch.autocast("cpu", dtype=torch.float16):
            return varlen_attention(q, k.half(), v, case.packed, rope=case.rope, backend=backend)

    out, *grads = gradients(run, case.inputs, case.g)
    half = with_halves(case)
    expected = kernel_results(half, backend=backend)
    assert out.dtype == torch.float16 and torch.equal(out, expected[0])
    for grad, b in zip(grads, expected[1:], strict=True):
        assert grad.dtype == torch.float32 and torch.equal(grad.half(), b)


def with_halves(case):
    return replace(case, **{name: getattr(case, name).half() for name in "qkvg"})


def test_no_autocast_for_float64():
    case = make_case((5,), head_dim=16, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = varlen_attention(*case.inputs, case.packed, backend="eager")
    assert out.dtype == torch.float64


def test_inference_mode():
    case = make_case((5, 9), head_dim=16, dtype=torch.float32)
    expected = varlen_attention(*case.inputs, case.packed, backend="triton")
    with torch.inference_mode():
        packed = PackedGrids.from_lengths((5, 9))
        assert torch.equal(varlen_attention(*case.inputs, packed, backend="triton"), expected)
