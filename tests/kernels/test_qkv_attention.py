"""qkv_attention against float64: the product, RoPE and attention, forward and backward."""

import pytest
import torch

from hrvlm_kernels import PackedGrids, reference
from hrvlm_kernels.qkv_attention import qkv_attention
from tests.kernels.helpers import DTYPES, assert_like_reference, interpreter_only

GRIDS = [(3, 5), (1, 1), (9, 8)]


def make_inputs(heads=2, head_dim=16, dtype=torch.float32, *, biases="qv", grids=GRIDS):
    """x, weight and the biases of q, k and v; the layout, RoPE, and a cotangent."""
    rng = torch.Generator().manual_seed(0)
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=2)
    width = heads * head_dim
    x, cotangent = torch.randn(2, packed.total_tokens, width, generator=rng).unbind()
    weight = torch.randn(3 * width, width, generator=rng) / width**0.5
    q, k, v = torch.randn(3, width, generator=rng).unbind()
    present = [a if name in biases else None for name, a in zip("qkv", (q, k, v), strict=True)]
    rope = packed.coords, torch.rand(head_dim // 4, generator=rng)
    inputs = [None if a is None else a.to(dtype) for a in (x, weight, *present)]
    return inputs, packed, rope, cotangent.to(dtype)


def join(biases):
    present = [b for b in biases if b is not None]
    if not present:
        return None
    return torch.cat([torch.zeros_like(present[0]) if b is None else b for b in biases])


def results(run, inputs, cotangent):
    leaves = [None if a is None else a.detach().clone().requires_grad_() for a in inputs]
    out = run(*leaves)
    wanted = [a for a in leaves if a is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, cotangent.to(out.dtype))]


def check(heads=2, head_dim=16, dtype=torch.float32, *, rope=True, backend="auto", **options):
    inputs, packed, positions, cotangent = make_inputs(heads, head_dim, dtype, **options)
    positions = positions if rope else None

    def ours(x, weight, *biases):
        return qkv_attention(x, weight, biases, join(biases), packed, positions, heads, backend)

    def plain(x, weight, *biases):
        qkv = torch.nn.functional.linear(x, weight, join(biases))
        q, k, v = qkv.unflatten(1, (3, heads, head_dim)).unbind(1)
        if positions is not None:
            q, k = (a.to(x.dtype) for a in reference.rope_2d(q, k, *positions))
        return reference.varlen_attention(q, k, v, packed, head_dim**-0.5)[0].flatten(1)

    got = results(ours, inputs, cotangent)
    exact = results(plain, [None if a is None else a.double() for a in inputs], cotangent.double())
    assert_like_reference(got, exact, results(plain, inputs, cotangent))
    return got


@interpreter_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 20])
def test_forward_and_backward(head_dim, dtype):
    """In 16 bits and heads of 16 the kernels turn the gradients back, else a pass does."""
    check(2, head_dim, dtype)


@interpreter_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 20])
def test_with_q_and_k_rotated_in_the_product(head_dim, dtype, monkeypatch):
    """By backend="triton", forward and backward; no pass over q and k is left in the forward."""
    from hrvlm_kernels.triton_kernels import linear_rope_2d, rope_2d

    turned, products, forward = [], [], linear_rope_2d.forward
    monkeypatch.setattr(
        linear_rope_2d, "forward", lambda *args: (products.append(1), forward(*args))
    )
    rotate = rope_2d.rotate_heads
    monkeypatch.setattr(
        rope_2d, "rotate_heads", lambda *args: (turned.append(args[4]), rotate(*args))
    )
    check(2, head_dim, dtype, backend="triton")
    assert len(products) == 1 and False not in turned


@interpreter_only
@pytest.mark.parametrize("biases", ["", "k", "qkv", "q"])
def test_any_biases_and_no_rope(biases):
    check(biases=biases, rope=biases != "k")


@interpreter_only
def test_equal_inputs_give_equal_bits_and_an_empty_pack_nothing():
    first, again = check(), check()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    inputs, packed, rope, cotangent = make_inputs(grids=[])
    out, *grads = results(
        lambda x, weight, *biases: qkv_attention(
            x, weight, biases, join(biases), packed, rope, heads=2
        ),
        inputs, cotangent,
    )  # fmt: skip
    assert out.shape == (0, 32) and not any(a.any() for a in grads)


@interpreter_only
def test_q_and_k_are_not_rotated_again_and_the_gradient_is_one_tensor(monkeypatch):
    from hrvlm_kernels.triton_kernels import varlen_attention_backward as kernels

    turned = []
    monkeypatch.setattr(kernels, "rotated", lambda *args: turned.append(args))
    check(dtype=torch.float16)
    assert not turned
