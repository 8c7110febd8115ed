"""Attention on a CPU by products of whole matrices, with gradients.

    p = softmax(scale q k^T);  out = p v
    dv = p^T g;  ds = p (g v^T - sum(p g v^T));  dq = scale ds k;  dk = scale ds^T q

torch's own attention multiplies by MKL, which on an AMD EPYC takes twice as long as oneDNN, and
bfloat16 no faster than float32. Here the products with q k^T and g v^T are float32, since oneDNN's
of bfloat16 round what they give, and the others of the dtype: as accurate, in less time. The
backward makes the scores again.

Long images go through head by head, queries in blocks, whose scores stay in the cache: all products
are oneDNN's. Short ones of bfloat16 go through many heads at a time, since a product has to be
worth its call: those of bfloat16 are oneDNN's then. Short ones of float32 are torch's.

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
from .cpu_rope import KEPT, scratch

_ROWS = 256  # queries of a block, at most
_SCORES = 500_000  # of the heads that go through together, where that is more than one a thread
# Multiplications of a product for each thread: those that make up for its call, and those from
# which on heads of bfloat16 go through one by one.
_LEAST, _LONG = 2_000_000, 20_000_000


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
        if _goes_together(q) or _multiplications(q) >= _LEAST:
            return _Attention.apply(q, k, v, scale)
        if q.dtype == torch.bfloat16:  # torch's attention is slower in it
            return _torch(q.float(), k.float(), v.float(), scale).bfloat16()
    return _torch(q, k, v, scale)


def _is_ours(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        are_served(q, k, v)
        and q.shape == k.shape == v.shape
        and not has_tiles()
        and torch.backends.cuda.flash_sdp_enabled()  # of a CPU too; else another way was chosen
    )


def _multiplications(q: Tensor) -> float:
    """Of a head's product, for each thread."""
    return q[0, 0].numel() * q.shape[2] / torch.get_num_threads()


def _goes_together(q: Tensor) -> bool:
    """Whether many heads go through at a time, one a thread at least, in memory that is kept."""
    least = 2 * torch.get_num_threads() * q.shape[2] ** 2
    return q.dtype == torch.bfloat16 and least <= KEPT and _multiplications(q) < _LONG


def _torch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    grouped = bool(q.shape[1] != k.shape[1])
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        # A checkpoint that makes these again may go torch's way in float32, under other threads or
        # modes, and takes the first three tensors that are saved there: k comes first, as in torch.
        ctx.save_for_backward(k, q, v)
        ctx.scale = scale
        return (_together if _goes_together(q) else _by_head)(q, k, v, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (k, q, v), scale = ctx.saved_tensors, ctx.scale
        inputs = q, k, v
        if torch.is_grad_enabled() or not are_served(grad):
            op = partial(_torch, scale=scale)
            return *recorded_gradients(op, inputs, grad, ctx.needs_input_grad[:3]), None
        gradients = _gradients_together if _goes_together(q) else _gradients_by_head
        return *gradients(*inputs, grad, scale), None


def _together(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out = _heads_first(q)
    for queries, keys, values, result in _groups(q, k, v, out):
        scores, weights = _scores_and_weights(queries, keys, scale)
        torch.bmm(_narrowed(weights, scores), values, out=result)
    return out


def _gradients_together(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, ...]:
    outputs = _heads_first(q), _heads_first(k), _heads_first(v)
    for queries, keys, values, g, dq, dk, dv in _groups(q, k, v, grad, *outputs):
        scores, weights = _scores_and_weights(queries, keys, scale)
        torch.bmm(_narrowed(weights, scores).mT, g, out=dv)
        changes = torch.bmm(g.float(), values.float().mT, out=scores)
        torch._softmax_backward_data(changes, weights, -1, changes.dtype, grad_input=changes)
        narrow = _narrowed(changes.mul_(scale), weights)
        torch.bmm(narrow, keys, out=dq)
        torch.bmm(narrow.mT, queries, out=dk)
    return outputs


def _heads_first(a: Tensor) -> Tensor:
    """New memory in the order ``[H, B, L, D]``; no view, which a result could not be."""
    size = a[0, 0].numel()
    return a.new_empty_strided(a.shape, (size, a.shape[0] * size, a.shape[3], 1))


def _groups(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Heads of all images ``[N, L, D]``, as many at a time as fit in the cache."""
    flat = [a.transpose(0, 1).flatten(0, 1) for a in tensors]  # as RoPE writes them
    sizes = list(_sizes_of_groups(len(flat[0]), tensors[0].shape[2]))
    return zip(*(a.split(sizes) for a in flat), strict=True)


def _sizes_of_groups(heads: int, length: int) -> Iterator[int]:
    """Of few kinds for a length: for each, oneDNN keeps code."""
    threads = torch.get_num_threads()
    most = -(-max(1, _SCORES // length**2) // threads)
    while heads:
        rounds = min(heads // threads, most)
        rest = max(0, rounds.bit_length() - 3) if rounds < most else 0
        size = (rounds >> rest << rest) * threads or heads
        yield size
        heads -= size


def _scores_and_weights(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores, weights = scratch((2, len(q), q.shape[1], q.shape[1]))
    torch.baddbmm(scores, q.float(), k.float().mT, beta=0, alpha=scale, out=scores)
    return scores, torch.softmax(scores, -1, out=weights)


def _narrowed(a: Tensor, place: Tensor) -> Tensor:
    """As bfloat16, in the memory of another."""
    return place.flatten().view(torch.bfloat16)[: a.numel()].view(a.shape).copy_(a)


def _by_head(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    size, columns = q.shape[1] * q.shape[3], q.shape[3]
    out = q.new_empty_strided(q.shape, (size * q.shape[2], columns, size, 1))
    for *inputs, result in zip(q, k, v, out, strict=True):
        queries, keys, values = map(_dense, inputs)
        wide = queries.float() * scale, keys.float()
        for head in _heads(*wide, values.transpose(1, 2), result):
            for rows, part in zip(_blocks(head[0]), _blocks(head[3]), strict=True):
                weights = product(rows, head[1]).softmax(-1)
                part.copy_(product(weights.to(q.dtype), head[2]))
    return out


def _gradients_by_head(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, ...]:
    inputs = q, k, v, grad
    outputs = tuple(torch.empty_like(a) for a in inputs[:3])
    for image in zip(*inputs, *outputs, strict=True):
        q, k, v, g = map(_dense, image[:4])
        wide = _heads(q.float() * scale, k.float(), v.float(), g.float())
        narrow = _heads(q, k.transpose(1, 2), g)
        for a, b, results in zip(wide, narrow, _heads(*image[4:]), strict=True):
            _write_gradients(a, b, scale, results)
    return outputs


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
