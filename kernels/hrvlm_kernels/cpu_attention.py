"""Attention on a CPU by oneDNN's products, head by head, with gradients.

    p = softmax(scale q k^T);  out = p v
    dv = p^T g;  ds = p (g v^T - sum(p g v^T));  dq = scale ds k;  dk = scale ds^T q

torch's own attention multiplies by MKL, which on an AMD EPYC takes twice as long as oneDNN, and
bfloat16 no faster than float32. Here the products with q k^T and g v^T are float32, since oneDNN's
of bfloat16 round what they give, and the others of the dtype: as accurate, in less time. Queries go
through in blocks, whose scores stay in the cache; the backward makes them again.

Not on processors with a matrix unit for bfloat16 (AMX), where torch's attention uses it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_products import are_served, has_tiles, recorded_gradients

_ROWS = 320  # queries of a block, at most
_LEAST = 2_000_000  # multiplications of a product for each thread, that make up for its call


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``softmax(scale q k^T) v`` by whatever is fastest, with gradients.

    Args:
        q: ``[B, H, L, D]``, of any device and strides.
        k: ``[B, Hk, L, D]``; Hk divides H.
        v: As `k`.
        scale: Factor of the scores.

    Returns:
        ``[B, H, L, D]``.
    """
    if _is_ours(q, k, v):
        if q[0, 0].numel() * q.shape[2] >= _LEAST * torch.get_num_threads():
            return _Attention.apply(q, k, v, scale)
        if q.dtype == torch.bfloat16:  # torch's attention is slower in it, the shorter the more
            q, k, v = (a.float() for a in (q, k, v))
            return _torch(q, k, v, scale).bfloat16()
    return _torch(q, k, v, scale)


def _is_ours(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        q.device.type == "cpu"
        and q.shape == k.shape
        and not has_tiles()
        and are_served(q, k, v)
        and torch.backends.cuda.flash_sdp_enabled()  # of a CPU too; else another way was chosen
    )


def _torch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    grouped = bool(q.shape[1] != k.shape[1])
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        images, heads, length, columns = q.shape
        out = q.new_empty(images, length, heads, columns).transpose(1, 2)
        for image in zip(q, k, v, out, strict=True):
            queries, keys, values = map(_dense, image[:3])
            inputs = queries.float() * scale, keys.float(), values.transpose(1, 2), image[3]
            for head in zip(*(a.unbind() for a in inputs), strict=True):
                for rows, result in zip(_blocks(head[0]), _blocks(head[3]), strict=True):
                    weights = _times(rows, head[1]).softmax(-1)
                    result.copy_(_times(weights.to(q.dtype), head[2]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled() or not are_served(grad):
            op = partial(_torch, scale=ctx.scale)
            return *recorded_gradients(op, inputs, grad, ctx.needs_input_grad[:3]), None
        outputs = [torch.empty_like(a) for a in inputs]
        for image in zip(*inputs, grad, *outputs, strict=True):
            q, k, v, g = map(_dense, image[:4])
            wide = q.float() * ctx.scale, k.float(), v.float(), g.float()
            narrow = q, k.transpose(1, 2), g
            for head in zip(*(a.unbind() for a in (*wide, *narrow, *image[4:])), strict=True):
                _write_gradients(*head, ctx.scale)
        return *outputs, None


def _write_gradients(
    wide_q: Tensor,
    wide_k: Tensor,
    wide_v: Tensor,
    wide_g: Tensor,
    q: Tensor,
    k: Tensor,
    g: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
) -> None:
    """Of a head of an image: all ``[L, D]``, the wide ones float32, `wide_q` scaled, `k` turned."""
    sums: list[Tensor] = []
    for *wide, rows, g_rows, result in zip(*map(_blocks, (wide_q, wide_g, q, g, dq)), strict=True):
        weights = _times(wide[0], wide_k).softmax(-1)
        changes = _times(wide[1], wide_v)
        changes = torch._softmax_backward_data(changes, weights, -1, changes.dtype).to(q.dtype)
        torch.mul(_times(changes, k), scale, out=result)
        parts = _times(rows.T, changes.T), _times(g_rows.T, weights.to(q.dtype).T)
        sums = (
            [a + b for a, b in zip(sums, parts, strict=True)]
            if sums
            else [a.float() for a in parts]
        )
    torch.mul(sums[0].T, scale, out=dk)
    dv.copy_(sums[1].T)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T``."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def _dense(a: Tensor) -> Tensor:
    """Heads ``[H, L, D]``, each dense."""
    return a if a.stride()[1:] == (a.shape[2], 1) else a.contiguous()


def _blocks(a: Tensor) -> tuple[Tensor, ...]:
    """Equal blocks of rows."""
    count = -(-len(a) // _ROWS)
    return (a,) if count == 1 else a.split(-(-len(a) // count))
