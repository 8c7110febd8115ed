"""qkv_attention: the product that makes q, k and v, RoPE, and attention, in training.

    q, k, v = split(x @ weight^T + bias);  out = attention(rope(q), rope(k), v)

q and k are rotated in the epilogue of the product, where ops/linear_rope_2d.py says so, else where
they lie, since nothing else reads the product's result; and kept rotated: the backward does not
rotate them again. dq, dk and dv are written side by side into one
``[T, 3, H, D]``, which is the gradient of the product's result as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_problem import Problem
from .ops.linear_gelu import takes_kernel
from .ops.linear_rope_2d import linear_rope_2d
from .ops.torch_op import ops, register_backward
from .packed_grids import PackedGrids


def _empty_grad(g: Tensor, qkv: Tensor, *others: Any) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _arguments(g: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *layout: Any) -> tuple[Any, ...]:
    q, k, v = qkv.unbind(1)
    return Problem.from_arguments(q, k, v, *layout), g, out, lse


register_backward(
    "qkv_attention_backward",
    "(Tensor g, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, Tensor tiles_64, "
    "Tensor tiles_128, Tensor short_segments, Tensor? coords, Tensor? inv_freq, Tensor? table, "
    "float scale) -> Tensor",
    "varlen_attention_backward:backward_of_rotated",
    fake=_empty_grad,
    arguments=_arguments,
)


class _QKVAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, q_bias: Tensor | None, k_bias: Tensor | None,
        v_bias: Tensor | None, joined: Tensor | None, packed: PackedGrids,
        rope: tuple[Tensor, ...] | None, heads: int, backend: str,
    ) -> Tensor:  # fmt: skip
        positions = (*(rope or (None, None)), None)[:3]
        if rope is not None and takes_kernel("linear_rope_2d", backend, x):
            qkv = linear_rope_2d(x, weight, joined, rope, backend=backend)
        else:
            qkv = F.linear(x, weight, joined)
            qkv = qkv.view(len(x), 3, heads, weight.shape[1] // heads)
            if rope is not None:
                ops.rope_2d_(qkv[:, 0], qkv[:, 1], *rope[:2])
        q, k, v = qkv.unbind(1)
        ctx.scale, segments = q.shape[-1] ** -0.5, packed.segments
        out, lse = ops.varlen_attention(q, k, v, *segments, None, None, None, ctx.scale)
        ctx.save_for_backward(x, weight, qkv, out, lse, *segments, *positions)
        return out.flatten(1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, qkv, out, lse, *layout = ctx.saved_tensors
        grad = ops.qkv_attention_backward(g.view(out.shape), qkv, out, lse, *layout, ctx.scale)
        grad = grad.flatten(1)
        needs = ctx.needs_input_grad
        dx = grad @ weight if needs[0] else None
        dweight = grad.T @ x if needs[1] else None
        biases: list[Tensor | None] = [None] * 3
        if any(needs[2:5]):
            step = 2 if needs[2:5] == (True, False, True) else 1  # k has none in DINOv3
            sums = grad.unflatten(1, (3, -1))[:, ::step].sum(0)
            for i in range(0, 3, step):
                biases[i] = sums[i // step] if needs[2 + i] else None
        return dx, dweight, *biases, *[None] * 5


def qkv_attention(
    x: Tensor,
    weight: Tensor,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    joined: Tensor | None,
    packed: PackedGrids,
    rope: tuple[Tensor, ...] | None,
    heads: int,
    backend: str = "auto",
) -> Tensor:
    """Attention ``[T, C]`` of ``[T, C]``, by the kernels.

    Args:
        x: ``[T, C]``.
        weight: ``[3C, C]``.
        biases: Of q, k and v, ``[C]`` or None each: what gets gradients.
        joined: The same as one, ``[3C]``; None without any.
        packed: Layout of the T tokens.
        rope: ``(coords, inv_freq)``, or with a table, as of :func:`varlen_attention`; or None.
        heads: D is ``C / heads``, at most 128.
        backend: Whether the product rotates q and k, as :func:`linear_rope_2d` takes it.
    """
    joined = None if joined is None else joined.detach()
    return _QKVAttention.apply(x, weight, *biases, joined, packed, rope, heads, backend)
