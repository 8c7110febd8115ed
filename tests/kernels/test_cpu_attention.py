"""Attention by products of whole matrices on a CPU, against float64 and torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from hrvlm_kernels import PackedGrids, cpu_attention, varlen_attention
from hrvlm_kernels.cpu_attention import attention
from tests.kernels.helpers import gradients
from tests.numerics import relative_error

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()),
    reason="this torch was built without oneDNN, or not for x86",
)
DTYPES = [torch.float32, torch.bfloat16]
SCALE = 0.2
LONG = 333  # two blocks of queries


@pytest.fixture(autouse=True)
def without_amx(monkeypatch):
    """Processors with AMX take torch's attention."""
    monkeypatch.setattr(cpu_attention, "has_tiles", lambda: False)


@pytest.fixture
def ours(monkeypatch):
    """Counts the calls that are ours."""
    calls = []
    forward = cpu_attention._Attention.forward

    def count(*args):
        calls.append(args)
        return forward(*args)

    monkeypatch.setattr(cpu_attention._Attention, "forward", staticmethod(count))
    return calls


def heads_first(*shape, rng, dtype):
    images, heads, length, columns = shape
    a = torch.randn(4, heads, images * length, columns, generator=rng).to(dtype)
    return a.unflatten(2, (images, length)).transpose(1, 2).unbind()


def slices(*shape, rng, dtype):
    """Of one product, token by token."""
    images, heads, length, columns = shape
    a = torch.randn(images, length, 4, heads, columns, generator=rng).to(dtype)
    return a.permute(2, 0, 3, 1, 4).unbind()


def columns_first(*shape, rng, dtype):
    images, heads, length, columns = shape
    a = torch.randn(4, images, heads, columns, length, generator=rng).to(dtype)
    return a.transpose(-1, -2).unbind()


def torchs(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE)


def ours_of(q, k, v):
    return attention(q, k, v, SCALE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [heads_first, slices, columns_first])
@pytest.mark.parametrize(
    "shape", [(1, 1, 320, 64), (2, 3, LONG, 64), (1, 2, 700, 20), (1, 1, 901, 64)], ids=str
)
def test_output_and_gradients_err_no_more_than_torchs(shape, layout, dtype, rng, ours):
    q, k, v, g = layout(*shape, rng=rng, dtype=dtype)
    results = gradients(ours_of, (q, k, v), g)
    assert len(ours) == 1
    exact = gradients(torchs, [a.double() for a in (q, k, v)], g)
    # With columns apart torch takes another way, which keeps p in float32.
    rivals = gradients(torchs, [a.contiguous() for a in (q, k, v)], g.contiguous())
    for result, rival, oracle in zip(results, rivals, exact, strict=True):
        assert result.dtype == dtype and result.shape == oracle.shape
        assert relative_error(result, oracle) <= 1.5 * relative_error(rival, oracle)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("images, length", [(3, 1), (5, 7), (3, 64), (7, 201)])
def test_short_images_in_bfloat16_err_no_more_than_torchs(images, length, threads, rng, ours):
    """Also in several groups of heads, the last of which is smaller."""
    q, k, v, g = slices(images, 3, length, 64, rng=rng, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = gradients(ours_of, (q, k, v), g)
    finally:
        torch.set_num_threads(before)
    assert len(ours) == 1
    exact = gradients(torchs, [a.double() for a in (q, k, v)], g)
    rivals = gradients(torchs, [a.contiguous() for a in (q, k, v)], g.contiguous())
    for result, rival, oracle in zip(results, rivals, exact, strict=True):
        assert (result - oracle).norm() <= 1.5 * (rival - oracle).norm()


def test_images_that_go_together_and_one_by_one_agree(rng, monkeypatch):
    q, k, v, g = heads_first(2, 2, LONG, 64, rng=rng, dtype=torch.bfloat16)
    together = gradients(ours_of, (q, k, v), g)
    monkeypatch.setattr(cpu_attention, "_LONG", 1)
    for a, b in zip(together, gradients(ours_of, (q, k, v), g), strict=True):
        assert relative_error(a, b) <= 5e-3


@pytest.mark.parametrize("length, takes_ours", [(100, True), (200, False), (1500, True)])
def test_with_many_threads_memory_stays_small(length, takes_ours, rng, ours, monkeypatch):
    """Neither short enough to go together nor long enough to go one by one: torch's."""
    q, k, v, _ = heads_first(1, 2, length, 64, rng=rng, dtype=torch.bfloat16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    out = attention(q, k, v, SCALE)
    assert bool(ours) == takes_ours
    assert relative_error(out, torchs(q.double(), k.double(), v.double())) <= 5e-3
    assert cpu_attention.scratch((1,)).untyped_storage().nbytes() <= 4 * cpu_attention.KEPT


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_heads_go_together_in_few_numbers(threads, monkeypatch):
    """Whatever the number of images is: oneDNN keeps code for each."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for length in (7, 20, 100, 201):
        kinds = set()
        for heads in range(1, 2000):
            sizes = list(cpu_attention._sizes_of_groups(heads, length))
            assert sum(sizes) == heads and min(sizes) > 0
            kinds |= set(sizes)
        assert len(kinds) <= 40
    assert len(list(cpu_attention._sizes_of_groups(12, 201))) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(100,), (100, 100), (100, 50), (LONG,)], ids=str)
def test_the_output_is_contiguous_whatever_the_pack(lengths, dtype):
    packed = PackedGrids.from_lengths(lengths)
    q, k, v = torch.randn(3, sum(lengths), 4, 64).to(dtype)
    assert varlen_attention(q, k, v, packed, backend="sdpa").is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_pack(dtype, rng, ours):
    lengths = [LONG, 5, LONG, LONG, 901, 64]
    q, k, v = torch.randn(3, sum(lengths), 2, 64, generator=rng).to(dtype)
    packed = PackedGrids.from_lengths(lengths)
    out = varlen_attention(q, k, v, packed, backend="sdpa")
    # A run of equal lengths is one; short images of float32 are torch's.
    assert len(ours) == (3 if dtype == torch.float32 else 5)
    parts = (a.split(lengths) for a in (q, k, v, out))
    for length, *rows, part in zip(lengths, *parts, strict=True):
        alone = PackedGrids.from_lengths([length])
        assert torch.equal(varlen_attention(*rows, alone, backend="sdpa"), part)


def test_gradients_of_some_inputs_and_of_an_expanded_cotangent(rng):
    q, k, v, _ = heads_first(1, 2, LONG, 64, rng=rng, dtype=torch.float32)
    leaf = k.detach().requires_grad_()
    attention(q, leaf, v, SCALE).sum().backward()
    expected = k.detach().double().requires_grad_()
    torchs(q.double(), expected, v.double()).sum().backward()
    # The sum's gradient is small: what is left of terms that cancel.
    assert (leaf.grad - expected.grad).abs().max() <= 1e-4


def test_the_output_may_be_changed_in_place(rng, ours):
    inputs = heads_first(1, 2, LONG, 64, rng=rng, dtype=torch.float32)
    results = []
    for op, double in ((ours_of, Tensor.mul_), (torchs, Tensor.mul)):
        leaves = [a.clone().requires_grad_() for a in inputs[:3]]
        double(op(*leaves), 2).backward(inputs[3])
        results.append([a.grad for a in leaves])
    assert len(ours) == 1
    for result, expected in zip(*results, strict=True):
        assert relative_error(result, expected) <= 1e-5


def test_values_of_other_sizes_are_torchs(rng, ours):
    q, k, v, _ = heads_first(1, 2, LONG, 64, rng=rng, dtype=torch.float32)
    assert torch.equal(attention(q, k, v[..., :40], SCALE), torchs(q, k, v[..., :40]))
    assert not ours


def test_recorded_and_batched_gradients_are_torchs(rng, ours):
    q, k, v, g = heads_first(1, 2, LONG, 64, rng=rng, dtype=torch.float32)
    leaves = [a.detach().requires_grad_() for a in (q, k, v)]
    out = attention(*leaves, SCALE)
    rival = torchs(*leaves)
    recorded = torch.autograd.grad(out, leaves, g, create_graph=True)
    assert all(a.requires_grad for a in recorded)
    for a, b in zip(recorded, torch.autograd.grad(rival, leaves, g), strict=True):
        assert relative_error(a.detach(), b) <= 1e-5
    with sdpa_kernel(SDPBackend.MATH):  # the one that has gradients of its gradients
        out = attention(*leaves, SCALE)
        (first,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
        torch.autograd.grad(first.square().sum(), leaves)
    assert len(ours) == 1


def test_what_torch_has_to_see_stays_torchs(rng, ours):
    q, k, v, _ = heads_first(1, 4, LONG, 64, rng=rng, dtype=torch.float32)
    grouped = k[:, ::2], v[:, ::2]
    expected = F.scaled_dot_product_attention(q, *grouped, scale=SCALE, enable_gqa=True)
    assert torch.equal(attention(q, *grouped, SCALE), expected)
    for wide in (torch.float64, torch.float16):
        attention(*(a.to(wide) for a in (q, k, v)), SCALE)
    with sdpa_kernel(SDPBackend.MATH):
        attention(q, k, v, SCALE)
    with torch.autocast("cpu"):
        attention(q, k, v, SCALE)
    torch.func.vmap(lambda a: attention(a, k, v, SCALE))(q[None])
    torch.compile(attention, backend="eager", fullgraph=True)(q, k, v, SCALE)
    attention(q[:, :, :0], k[:, :, :0], v[:, :, :0], SCALE)
    assert not ours


def test_processors_with_a_matrix_unit_and_many_threads_take_torchs(rng, ours, monkeypatch):
    q, k, v, _ = heads_first(1, 2, LONG, 64, rng=rng, dtype=torch.bfloat16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    attention(q.float(), k.float(), v.float(), SCALE)
    monkeypatch.undo()
    monkeypatch.setattr(cpu_attention, "has_tiles", lambda: True)
    assert torch.equal(attention(q, k, v, SCALE), torchs(q, k, v))
    assert not ours


def test_an_input_written_to_before_the_backward_is_noticed(rng):
    leaves = [
        a.detach().requires_grad_()
        for a in heads_first(1, 1, LONG, 64, rng=rng, dtype=torch.float32)
    ]
    q = leaves[0] * 1
    out = attention(q, *leaves[1:3], SCALE)
    with torch.no_grad():
        q.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_checkpoint_made_again_with_other_threads(rng, monkeypatch):
    q, k, v, g = heads_first(1, 2, 200, 64, rng=rng, dtype=torch.float32)
    leaves = [a.detach().requires_grad_() for a in (q, k, v)]
    expected = gradients(torchs, (q, k, v), g)[1:]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    out = checkpoint(attention, *leaves, SCALE, use_reentrant=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    for a, b in zip(torch.autograd.grad(out, leaves, g), expected, strict=True):
        assert relative_error(a, b) <= 1e-5


def test_autocast_around_the_backward_alone_changes_nothing(rng):
    q, k, v, g = heads_first(1, 2, LONG, 64, rng=rng, dtype=torch.float32)
    leaves = [a.detach().requires_grad_() for a in (q, k, v)]
    expected = gradients(torchs, (q, k, v), g)[1:]
    out = attention(*leaves, SCALE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(out, leaves, g)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) <= 1e-5
