"""rope_2d's kernel against the elementwise rule, forward, backward and in place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from benchmarks.compiled.compiler import TARGETS, assert_clean, compile_kernel
from benchmarks.compiled.jobs import rope_jobs
from hrvlm_kernels import PackedGrids
from hrvlm_kernels.ops.rope_2d import rope_2d, rope_2d_, rope_table
from tests.kernels.helpers import (
    COMPILED,
    DTYPES,
    CountingBackend,
    far_rows,
    interpreter_only,
    strided_copy,
)
from tests.numerics import assert_rope

pytestmark = interpreter_only

GRIDS = [(3, 5), (1, 1), (2, 9)]  # 15 + 1 + 18 patches


def frequencies(head_dim, theta=100.0):
    return theta ** (-4 * torch.arange(head_dim // 4) / head_dim)


def make_qkv(packed, head_dim, dtype, rng, *, heads=3):
    qkv = torch.randn(packed.total_tokens, 3, heads, head_dim, generator=rng)
    return qkv.to(packed.device, dtype)


def check_forward(
    head_dim=64, dtype=torch.float32, *, grids=GRIDS, prefix=2, seed=0, heads=3, device="cpu"
):
    rng = torch.Generator().manual_seed(seed)
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=prefix, device=device)
    qkv = make_qkv(packed, head_dim, dtype, rng, heads=heads)
    before, inv_freq = qkv.clone(), frequencies(head_dim).to(device)
    outs = rope_2d(qkv[:, 0], qkv[:, 1], packed.coords, inv_freq, backend="triton")
    for i, out in enumerate(outs):
        assert out.is_contiguous()
        assert_rope(out, before[:, i], packed.coords, inv_freq)
    assert torch.equal(qkv, before), "the input was written to"


def check_backward(
    head_dim=64, dtype=torch.float32, *, grids=GRIDS, prefix=2, seed=0, heads=3, device="cpu"
):
    rng = torch.Generator().manual_seed(seed)
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=prefix, device=device)
    qkv = make_qkv(packed, head_dim, dtype, rng, heads=heads)
    inv_freq = frequencies(head_dim).to(device)
    leaf = qkv.clone().requires_grad_()
    outs = rope_2d(leaf[:, 0], leaf[:, 1], packed.coords, inv_freq, backend="triton")
    cotangents = torch.randn(qkv[:, :2].shape, generator=rng).to(device, dtype)
    torch.autograd.backward(outs, cotangents.unbind(1))
    for i in range(2):  # the inverse rotation is the rotation by the opposite angle
        assert_rope(leaf.grad[:, i], cotangents[:, i], -packed.coords, inv_freq)
    assert not leaf.grad[:, 2].any()


def check_prefix():
    """Rows at (0, 0) are bit-equal, -0 and what 0 * inf would spoil included."""
    inv_freq = frequencies(8)
    coords = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.0], [0.0, -0.5]])
    q = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(0))
    q[0, 0] = torch.tensor([-0.0, float("inf"), 1, -0.0, -3, 2, float("nan"), float("inf")])
    out, _ = rope_2d(q, q.flip(0), coords, inv_freq, backend="triton")
    for row in (0, 2):
        assert torch.equal(out[row].view(torch.int32), q[row].view(torch.int32))
    for row in (1, 3):
        assert (out[row] != q[row]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [4, 32, 36, 64, 80, 96, 128])
def test_forward_and_backward(head_dim, dtype):
    check_forward(head_dim, dtype)
    check_backward(head_dim, dtype)


def test_prefix_tokens_pass_through_bit_for_bit():
    check_prefix()


@pytest.mark.parametrize("head_dim", [4, 36, 64])
def test_the_table_has_the_cos_and_sin_of_the_rotation(head_dim, rng):
    """Rotated, (1, 0) is (cos, sin): bit for bit what the kernel of q and k computes."""
    packed = PackedGrids.from_grids(GRIDS, num_prefix_tokens=2)
    rope = packed.coords, frequencies(head_dim)
    one = torch.zeros(packed.total_tokens, 1, head_dim)
    one[..., : head_dim // 2] = 1
    turned, _ = rope_2d(one, one[:, :0], *rope, backend="triton")
    assert torch.equal(rope_table(*rope), turned[:, 0])
    assert rope_table(rope[0][:0], rope[1]).shape == (0, head_dim)
    with pytest.raises(ValueError, match="inv_freq requires grad"):
        rope_table(rope[0], rope[1].clone().requires_grad_())


@pytest.mark.parametrize("heads", [(6, 2), (1, 5), (4, 0), (0, 3), (20, 20)])
def test_q_and_k_may_have_different_heads(heads, rng):
    packed = PackedGrids.from_grids([(2, 3)], num_prefix_tokens=1)
    q, k = (torch.randn(7, n, 32, generator=rng) for n in heads)
    outs = rope_2d(q, k, packed.coords, frequencies(32), backend="triton")
    for a, out in zip((q, k), outs, strict=True):
        assert_rope(out, a, packed.coords, frequencies(32))


def test_any_strides(rng):
    packed = PackedGrids.from_grids(GRIDS, num_prefix_tokens=2)
    tokens, inv_freq = packed.total_tokens, frequencies(32)
    q = torch.randn(tokens, 2, 32, generator=rng)
    heads_first = q.transpose(0, 1).contiguous().transpose(0, 1)
    channels_first = q.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    spread = torch.randn(tokens, 2, 64, generator=rng)[..., ::2]
    coords = packed.coords.T.contiguous().T
    every_other = torch.stack([inv_freq, inv_freq + 1], 1)[:, 0]
    for a in (heads_first, channels_first, spread, strided_copy(q), q[:1].expand(tokens, -1, -1)):
        outs = rope_2d(a, strided_copy(a), coords, every_other, backend="triton")
        for out in outs:
            assert_rope(out, a, packed.coords, inv_freq)


def test_cotangents_of_any_strides(rng):
    packed = PackedGrids.from_grids(GRIDS, num_prefix_tokens=2)
    q, k = torch.randn(2, packed.total_tokens, 2, 32, generator=rng).unbind()
    expanded = torch.randn(1, 2, 1, generator=rng).expand(q.shape)
    transposed = torch.randn(32, 2, packed.total_tokens, generator=rng).permute(2, 1, 0)
    q.requires_grad_(), k.requires_grad_()
    outs = rope_2d(q, k, packed.coords, frequencies(32), backend="triton")
    torch.autograd.backward(outs, (expanded, transposed))
    assert_rope(q.grad, expanded, -packed.coords, frequencies(32))
    assert_rope(k.grad, transposed, -packed.coords, frequencies(32))


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(used, rng):
    packed = PackedGrids.from_grids([(2, 3)])
    leaves = [torch.randn(6, 2, 8, generator=rng, requires_grad=True) for _ in range(2)]
    out = rope_2d(*leaves, packed.coords, frequencies(8), backend="triton")[used]
    cotangent = torch.randn(out.shape, generator=rng)
    out.backward(cotangent)
    assert_rope(leaves[used].grad, cotangent, -packed.coords, frequencies(8))
    other = leaves[1 - used].grad
    assert other is None or not other.any()


def test_double_backward_is_the_same_rotation(rng):
    packed = PackedGrids.from_grids([(2, 3)])
    q = torch.randn(6, 2, 8, generator=rng, requires_grad=True)
    cotangent = torch.randn(6, 2, 8, generator=rng, requires_grad=True)
    out, _ = rope_2d(q, q.detach(), packed.coords, frequencies(8), backend="triton")
    (grad,) = torch.autograd.grad(out, q, cotangent, create_graph=True)
    second = torch.randn(6, 2, 8, generator=rng)
    (got,) = torch.autograd.grad(grad, cotangent, second)
    assert_rope(got, second, packed.coords, frequencies(8))


@pytest.mark.parametrize("grid", [(512, 1), (1, 512)])
def test_neighbours_never_collapse_at_8192_pixels(grid):
    packed = PackedGrids.from_grids([grid])
    inv_freq = frequencies(64)
    q = torch.ones(512, 1, 64)
    out, _ = rope_2d(q, q[:, :0], packed.coords, inv_freq, backend="triton")
    assert_rope(out, q, packed.coords, inv_freq)
    axis = slice(0, 16) if grid[0] > 1 else slice(16, 32)
    # The slowest frequency alone tells any two neighbours apart.
    slowest = torch.stack([out[:, 0, axis][:, -1], out[:, 0, 32:][:, axis][:, -1]], 1)
    assert (slowest[1:] != slowest[:-1]).any(1).all()


def test_large_angles(rng):
    """Rescaled coordinates and steep frequencies: thousands of turns."""
    coords = (torch.rand(64, 2, generator=rng) * 2 - 1) * 8
    inv_freq = torch.logspace(-2, 2, 8)
    q = torch.randn(64, 1, 32, generator=rng)
    out, _ = rope_2d(q, q[:, :0], coords, inv_freq, backend="triton")
    assert_rope(out, q, coords, inv_freq)


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17])
def test_few_tokens(tokens, rng):
    coords = torch.rand(tokens, 2, generator=rng)
    leaf = torch.randn(tokens, 2, 16, generator=rng, requires_grad=True)
    outs = rope_2d(leaf, leaf, coords, frequencies(16), backend="triton")
    torch.autograd.backward(outs, [torch.randn(leaf.shape, generator=rng) for _ in range(2)])
    for out in outs:
        assert_rope(out.detach(), leaf.detach(), coords, frequencies(16))
    assert torch.isfinite(leaf.grad).all()


def test_an_image_alone_equals_the_image_in_a_pack(rng):
    packed = PackedGrids.from_grids(GRIDS, num_prefix_tokens=2)
    qkv = make_qkv(packed, 32, torch.float16, rng)
    qkv[:4] = float("nan")  # in the first image: it must not reach the others
    outs = rope_2d(qkv[:, 0], qkv[:, 1], packed.coords, frequencies(32), backend="triton")
    parts = zip(GRIDS, packed.split(qkv), *map(packed.split, outs), strict=True)
    for i, (grid, image, *together) in enumerate(parts):
        alone_pack = PackedGrids.from_grids([grid], num_prefix_tokens=2)
        alone = rope_2d(
            image[:, 0], image[:, 1], alone_pack.coords, frequencies(32), backend="triton"
        )
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a.nan_to_num(9), b.nan_to_num(9))
            assert i == 0 or torch.isfinite(b).all()


def test_offsets_beyond_int32(rng, tmp_path):
    values = torch.randn(4, 2, 8, generator=rng).half()
    q = far_rows(values, tmp_path)
    coords = torch.rand(4, 2, generator=rng)
    out, _ = rope_2d(q, values, coords, frequencies(8), backend="triton")
    assert_rope(out, values, coords, frequencies(8))
    rope_2d_(q, values.clone(), coords, frequencies(8), backend="triton")
    assert torch.equal(q, out)


# In place


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_equals_out_of_place(backend, dtype, rng):
    packed = PackedGrids.from_grids(GRIDS, num_prefix_tokens=2)
    qkv, inv_freq = make_qkv(packed, 32, dtype, rng), frequencies(32)
    expected = rope_2d(qkv[:, 0], qkv[:, 1], packed.coords, inv_freq, backend=backend)
    v, version = qkv[:, 2].clone(), qkv._version
    q, k = qkv[:, 0], qkv[:, 1]
    q_out, k_out = rope_2d_(q, k, packed.coords, inv_freq, backend=backend)
    assert q_out is q and k_out is k
    assert qkv._version > version  # or autograd would miss that a saved tensor changed
    assert torch.equal(qkv[:, 0], expected[0]) and torch.equal(qkv[:, 1], expected[1])
    assert torch.equal(qkv[:, 2], v)
    with torch.inference_mode():
        rope_2d_(qkv.clone()[:, 0], qkv.clone()[:, 1], packed.coords, inv_freq, backend=backend)


def loss_gradient(rotate, packed, *, compiled=None):
    rng = torch.Generator().manual_seed(3)
    leaf = make_qkv(packed, 16, torch.float32, rng).requires_grad_()

    def run(leaf, coords):
        return rotate(leaf * 2, coords) * 1.5

    if compiled is not None:
        run = torch.compile(run, fullgraph=True, backend=compiled, dynamic=True)
    out = run(leaf, packed.coords)
    (grad,) = torch.autograd.grad(out, leaf, torch.randn(out.shape, generator=rng))
    return out.detach(), grad


def rotate_new(qkv, coords):
    q, k = rope_2d(qkv[:, 0], qkv[:, 1], coords, frequencies(16), backend="triton")
    return torch.stack([q, k, qkv[:, 2]], 1)


def rotate_slices(qkv, coords):
    rope_2d_(qkv[:, 0], qkv[:, 1], coords, frequencies(16), backend="triton")
    return qkv


def rotate_separate(qkv, coords):
    q, k = qkv[:, 0].clone(), qkv[:, 1].clone()
    rope_2d_(q, k, coords, frequencies(16), backend="triton")
    return torch.stack([q, k, qkv[:, 2]], 1)


def rotate_only_q(qkv, coords):
    k = qkv[:, 1].detach().clone()
    rope_2d_(qkv[:, 0], k, coords, frequencies(16), backend="triton")
    return qkv


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rotate", [rotate_slices, rotate_separate])
def test_gradient_in_place(rotate, compiled):
    packed = PackedGrids.from_grids(GRIDS, num_prefix_tokens=2)
    expected = loss_gradient(rotate_new, packed)
    got = loss_gradient(rotate, packed, compiled=CountingBackend() if compiled else None)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_gradient_in_place_where_only_q_needs_one():
    packed = PackedGrids.from_grids(GRIDS, num_prefix_tokens=2)
    _, grad = loss_gradient(rotate_only_q, packed)
    _, expected = loss_gradient(rotate_new, packed)
    assert torch.equal(grad[:, 0], expected[:, 0])


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_what_needs_no_gradient_gets_none_in_place(backend, rng):
    """New results are of one op on the kernels, and both may be asked for gradients."""
    packed = PackedGrids.from_grids(GRIDS, num_prefix_tokens=2)
    q, k = (torch.randn(packed.total_tokens, 2, 16, generator=rng) for _ in range(2))
    q.requires_grad_()
    outs = rope_2d(q, k, packed.coords, frequencies(16), backend=backend)
    assert [out.requires_grad for out in outs] == [True, backend == "triton"]
    rope_2d_(q * 1, k, packed.coords, frequencies(16), backend=backend)
    assert not k.requires_grad and k.grad_fn is None
    assert torch.equal(k, outs[1])


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_one_of_both_may_have_no_heads(backend, rng):
    packed = PackedGrids.from_grids(GRIDS, num_prefix_tokens=2)
    q = torch.randn(packed.total_tokens, 2, 16, generator=rng)
    out, none = rope_2d(q, q[:, :0], packed.coords, frequencies(16), backend=backend)
    assert none.shape == (packed.total_tokens, 0, 16)
    assert_rope(out, q, packed.coords, frequencies(16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_of_gradients_on_a_cpu(dtype, rng):
    """As jacobians take them: each is what the gradient alone is, up to rounding."""
    packed = PackedGrids.from_grids(GRIDS, num_prefix_tokens=2)
    q = torch.randn(packed.total_tokens, 2, 16, generator=rng).to(dtype).requires_grad_()
    out, _ = rope_2d(q, q.detach(), packed.coords, frequencies(16), backend="eager")
    given = torch.randn(3, *out.shape, generator=rng).to(dtype)
    one = [torch.autograd.grad(out, q, g, retain_graph=True)[0] for g in given]
    (batched,) = torch.autograd.grad(out, q, given, is_grads_batched=True, retain_graph=True)
    by_vmap = torch.vmap(lambda g: torch.autograd.grad(out, q, g, retain_graph=True)[0])(given)
    for got in (batched, by_vmap):
        torch.testing.assert_close(got, torch.stack(one))


@pytest.mark.parametrize("view", ["leaf", "view of a leaf", "unbind"])
def test_in_place_refuses_what_autograd_refuses(view, rng):
    packed = PackedGrids.from_grids([(2, 3)])
    leaf = torch.randn(6, 3, 2, 8, generator=rng, requires_grad=True)
    if view == "leaf":
        q, k = (a.detach().clone().requires_grad_() for a in (leaf[:, 0], leaf[:, 1]))
    else:
        q, k = (leaf[:, 0], leaf[:, 1]) if view != "unbind" else (leaf * 1).unbind(1)[:2]
    before = q.detach().clone()
    with pytest.raises(RuntimeError, match=r"(?i)leaf variable|unbind"):
        rope_2d_(q, k, packed.coords, frequencies(8), backend="triton")
    assert torch.equal(q.detach(), before)
    with torch.no_grad():  # nobody asks for gradients here
        rope_2d_(q.detach(), k.detach(), packed.coords, frequencies(8), backend="triton")


def test_in_place_refuses_shared_memory():
    packed = PackedGrids.from_grids([(2, 3)])
    q = torch.zeros(6, 2, 8)
    with pytest.raises(ValueError, match="same tensor"):
        rope_2d_(q, q, packed.coords, frequencies(8))
    with pytest.raises(ValueError, match=r"k is expanded \(strides \(0,"):
        rope_2d_(q, q[:1].expand(6, 2, 8), packed.coords, frequencies(8))


# As a torch citizen


def test_opcheck(rng):
    packed = PackedGrids.from_grids([(2, 3)], num_prefix_tokens=1)
    qkv = torch.randn(7, 3, 2, 8, generator=rng)
    args = (packed.coords, frequencies(8))
    q, k = (a.detach().requires_grad_() for a in (qkv[:, 0], qkv[:, 1]))
    torch.library.opcheck(torch.ops.hrvlm_kernels.rope_2d, (q, k, *args, False))
    torch.library.opcheck(torch.ops.hrvlm_kernels.rope_2d, (q, k.detach()[:, :0], *args, True))
    torch.library.opcheck(torch.ops.hrvlm_kernels.rope_2d_, (qkv[:, 0], qkv[:, 1], *args))


def test_one_graph_for_many_packings(rng):
    backend = CountingBackend()

    def run(qkv, packed):
        q, k = rope_2d(qkv[:, 0], qkv[:, 1], packed.coords, frequencies(16), backend="triton")
        return q * 2 + k

    compiled = torch.compile(run, fullgraph=True, backend=backend, dynamic=True)
    for grids in ([(2, 3)], [(4, 1), (5, 2)], [(3, 3)] * 4, [(7, 2)]):
        packed = PackedGrids.from_grids(grids, num_prefix_tokens=2)
        leaf = make_qkv(packed, 16, torch.float32, rng).requires_grad_()
        cotangent = torch.randn(packed.total_tokens, 3, 16, generator=rng)
        results = []
        for function in (compiled, run):
            out = function(leaf, packed)
            results.append((out, *torch.autograd.grad(out, leaf, cotangent)))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
    assert backend.graphs == 1


def test_activation_checkpointing(rng):
    packed = PackedGrids.from_grids(GRIDS, num_prefix_tokens=2)
    leaf = make_qkv(packed, 16, torch.float32, rng).requires_grad_()
    cotangent = torch.randn(leaf.shape, generator=rng)
    grads = []
    for run in (rotate_new, lambda *a: checkpoint(rotate_new, *a, use_reentrant=False)):
        out = run(leaf, packed.coords)
        grads.append(torch.autograd.grad(out, leaf, cotangent)[0])
    assert torch.equal(*grads)


def test_positions_that_require_grad_raise():
    packed = PackedGrids.from_grids([(2, 3)])
    q, inv_freq = torch.zeros(6, 2, 8), frequencies(8).requires_grad_()
    with pytest.raises(ValueError, match="inv_freq requires grad"):
        rope_2d(q, q, packed.coords, inv_freq, backend="triton")
    rope_2d(q, q, packed.coords, inv_freq, backend="eager")


@pytest.mark.skipif(COMPILED, reason="ptx_machine takes CPU tensors")
def test_cpu_tensors_need_the_interpreter(monkeypatch):
    packed = PackedGrids.from_grids([(2, 3)])
    q = torch.zeros(6, 2, 8)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="on the CPU"):
        rope_2d(q, q, packed.coords, frequencies(8), backend="triton")


def test_wrong_inputs_raise():
    packed = PackedGrids.from_grids([(2, 3)])
    q, inv_freq = torch.zeros(6, 2, 8), frequencies(8)
    for message, args in {
        "equal T and D": (q, q[:5], packed.coords, inv_freq),
        "multiple of 4": (q[..., :6], q[..., :6], packed.coords, inv_freq),
        "one dtype": (q, q.half(), packed.coords, inv_freq),
        r"coords must be float32 \[6, 2\]": (q, q, packed.coords.double(), inv_freq),
        r"inv_freq must be float32 \[2\]": (q, q, packed.coords, inv_freq[:1]),
    }.items():
        for function in (rope_2d, rope_2d_):
            with pytest.raises(ValueError, match=message):
                function(*args, backend="triton")
    with pytest.raises(RuntimeError, match=r"not torch\.float64"):
        rope_2d(q.double(), q.double(), packed.coords, inv_freq, backend="triton")


@settings(max_examples=12, deadline=None)
@given(
    grids=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
    prefix=st.integers(0, 5),
    quarter=st.integers(1, 24),
    heads=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_random_packs(grids, prefix, quarter, heads, dtype, seed):
    check_forward(4 * quarter, dtype, grids=grids, prefix=prefix, seed=seed, heads=heads)
    check_backward(4 * quarter, dtype, grids=grids, prefix=prefix, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles_clean(target):
    half = rope_jobs(target, dtypes=[torch.bfloat16])
    for job in (*half, *rope_jobs(target, head_dims=[128], dtypes=[torch.float32])):
        built = compile_kernel(job.kernel, job.signature, job.constants, target, **job.options)
        assert_clean(built)
        if target.startswith("sm_"):
            # Whole vectors of 16 bytes: two halves of q and two of k at least, read and written.
            wide = [built.global_ops.get(f"{name}.E.128", 0) for name in ("LDG", "STG")]
            assert min(wide) >= 4, f"{job.name}: {wide} vector accesses"
