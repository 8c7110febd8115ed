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

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_products import are_served, has_tiles, product, recorded_gradients

_ROWS = 256  # queries of a block, at most
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
            return _Attention.apply(q, k, v, scale).transpose(1, 2)
        if q.dtype == torch.bfloat16:  # torch's attention is slower in it, the shorter the more
            q, k, v = (a.float() for a in (q, k, v))
            return _torch(q, k, v, scale).bfloat16()
    return _torch(q, k, v, scale)


def _is_ours(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        are_served(q, k, v)
        and q.shape == k.shape == v.shape
        and not has_tiles()
        and torch.backends.cuda.flash_sdp_enabled()  # of a CPU too; else another way was chosen
    )


def _torch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    grouped = bool(q.shape[1] != k.shape[1])
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        # A checkpoint that makes these again may go torch's way, under other threads or modes, and
        # takes the first three tensors that are saved there: k comes first, as it does in torch.
        ctx.save_for_backward(k, q, v)
        ctx.scale = scale
        images, heads, length, columns = q.shape
        out = q.new_empty(images, length, heads, columns)
        for *inputs, result in zip(q, k, v, out.transpose(1, 2), strict=True):
            queries, keys, values = map(_dense, inputs)
            wide = queries.float() * scale, keys.float()
            for head in _heads(*wide, values.transpose(1, 2), result):
                for rows, part in zip(_blocks(head[0]), _blocks(head[3]), strict=True):
                    weights = product(rows, head[1]).softmax(-1)
                    part.copy_(product(weights.to(q.dtype), head[2]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (k, q, v), scale = ctx.saved_tensors, ctx.scale
        inputs, grad = (q, k, v), grad.transpose(1, 2)
        if torch.is_grad_enabled() or not are_served(grad):
            op = partial(_torch, scale=scale)
            return *recorded_gradients(op, inputs, grad, ctx.needs_input_grad[:3]), None
        outputs = [torch.empty_like(a) for a in inputs]
        for image in zip(*inputs, grad, *outputs, strict=True):
            q, k, v, g = map(_dense, image[:4])
            wide = _heads(q.float() * scale, k.float(), v.float(), g.float())
            narrow = _heads(q, k.transpose(1, 2), g)
            for a, b, results in zip(wide, narrow, _heads(*image[4:]), strict=True):
                _write_gradients(a, b, scale, results)
        return *outputs, None


def _write_gradients(
    wide: tuple[Tensor, ...], narrow: tuple[Tensor, ...], scale: float, out: tuple[Tensor, ...]
) -> None:
    """Of q, k and v of a head, ``[L, D]``, into `out`; sums over blocks are float32.

    Args:
        wide: q times `scale`, k, v and the gradient in float32.
        narrow: q, k transposed and the gradient.
        scale: As there.
        out: Where to.
    """
    queries, keys, values, g = wide
    dk: Tensor | None = None
    dv: Tensor | None = None
    blocks = map(_blocks, (queries, g, narrow[0], narrow[2], out[0]))
    for wide_rows, wide_g, rows, g_rows, dq in zip(*blocks, strict=True):
        weights = product(wide_rows, keys).softmax(-1)
        changes = product(wide_g, values)
        changes = torch._softmax_backward_data(changes, weights, -1, changes.dtype).to(rows.dtype)
        torch.mul(product(changes, narrow[1]), scale, out=dq)
        dk = _sum(dk, product(rows.T, changes.T))
        dv = _sum(dv, product(g_rows.T, weights.to(rows.dtype).T))
    assert dk is not None and dv is not None
    torch.mul(dk.T, scale, out=out[1])
    out[2].copy_(dv.T)


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a.float() + b


def _heads(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(a.unbind() for a in tensors), strict=True)


def _dense(a: Tensor) -> Tensor:
    """Heads ``[H, L, D]``, each dense."""
    return a if a.stride()[1:] == (a.shape[2], 1) else a.contiguous()


def _blocks(a: Tensor) -> tuple[Tensor, ...]:
    """Equal blocks of rows."""
    count = -(-len(a) // _ROWS)
    return (a,) if count == 1 else a.split(-(-len(a) // count))
