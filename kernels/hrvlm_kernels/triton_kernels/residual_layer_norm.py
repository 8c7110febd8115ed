"""The Triton kernels of residual_layer_norm and their launchers; see residual_layer_norm.py.

The backward computes mean and variance of the stored sum again, so nothing but the sum and the
update is saved. Each program adds up its rows' part of the parameters' gradients; the parts are
added afterwards: no atomics, so equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bound import bound
from .launch import architecture, cdiv, device_guard, multiprocessors, next_power_of_2
from .layer_norm_pixel_shuffle import normalise, select_config


@bound
@triton.jit(do_not_specialize=["T"])
def residual_layer_norm_forward(
    x, update, scale, shift, weight, bias, out, normed, T,
    stride_xt, stride_xc, stride_ut, stride_uc, eps,
    C: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BR rows of out and normed, both contiguous [T, C].

    Without an update, normed alone: the norm of x + shift, a sum that is never rounded.
    """
    i_t = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    i_c = tl.arange(0, BC)
    o_c = i_c.to(tl.int64)
    m_c = i_c < C
    mask = (i_t < T)[:, None] & m_c[None, :]
    p_x = x + (i_t * stride_xt)[:, None] + (o_c * stride_xc)[None, :]
    o_row = (i_t * C)[:, None] + i_c[None, :]
    b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)  # [BR, BC]
    b_add = tl.zeros([1, BC], tl.float32)
    if HAS_SHIFT:
        b_add = tl.load(shift + i_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if HAS_UPDATE:
        p_u = update + (i_t * stride_ut)[:, None] + (o_c * stride_uc)[None, :]
        b_s = tl.load(scale + i_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        b_out = b_x + b_s * (tl.load(p_u, mask=mask, other=0.0).to(tl.float32) + b_add)
        b_out = b_out.to(out.dtype.element_ty)
        tl.store(out + o_row, b_out, mask=mask)
        b_sum = b_out.to(tl.float32)
    else:
        b_sum = b_x + b_add
    b_norm, _ = normalise(b_sum, m_c, eps, C)
    b_norm *= tl.load(weight + i_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        b_norm += tl.load(bias + i_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + o_row, b_norm.to(normed.dtype.element_ty), mask=mask)


@bound
@triton.jit(do_not_specialize=["T", "blocks"])
def residual_layer_norm_backward(
    g, h, out, update, scale, weight, dx, dupdate, ds_parts, dw_parts, db_parts, T, blocks,
    stride_gt, stride_gc, stride_ht, stride_hc, stride_ut, stride_uc, eps,
    C: tl.constexpr, HAS_UPDATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradients of `blocks` times BR rows, and this program's part of the parameters'.

    Without the update, ds_parts are of the sum of dx over the rows.
    """
    i_c = tl.arange(0, BC)
    o_c = i_c.to(tl.int64)
    m_c = i_c < C
    b_s = tl.load(scale + i_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_w = tl.load(weight + i_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    ds = tl.zeros([BR, BC], tl.float32)
    dw = tl.zeros([BR, BC], tl.float32)
    db = tl.zeros([BR, BC], tl.float32)
    i_t = tl.program_id(0).to(tl.int64) * (blocks * BR) + tl.arange(0, BR)
    for _ in range(0, blocks):
        mask = (i_t < T)[:, None] & m_c[None, :]
        o_row = (i_t * C)[:, None] + i_c[None, :]
        p_g = g + (i_t * stride_gt)[:, None] + (o_c * stride_gc)[None, :]
        p_h = h + (i_t * stride_ht)[:, None] + (o_c * stride_hc)[None, :]
        b_out = tl.load(out + o_row, mask=mask, other=0.0).to(tl.float32)
        xhat, rstd = normalise(b_out, m_c, eps, C)
        b_h = tl.load(p_h, mask=mask, other=0.0).to(tl.float32)
        dw += b_h * xhat
        db += b_h
        grad = b_h * b_w
        projection = tl.sum(grad * xhat, 1) / C
        mean = tl.sum(grad, 1) / C
        b_dx = (grad - mean[:, None] - xhat * projection[:, None]) * rstd[:, None]
        b_dx += tl.load(p_g, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + o_row, b_dx.to(dx.dtype.element_ty), mask=mask)
        if HAS_UPDATE:
            p_u = update + (i_t * stride_ut)[:, None] + (o_c * stride_uc)[None, :]
            ds += b_dx * tl.load(p_u, mask=mask, other=0.0).to(tl.float32)
        else:
            ds += b_dx
        tl.store(dupdate + o_row, (b_s * b_dx).to(dupdate.dtype.element_ty), mask=mask)
        i_t += BR
    o_part = tl.program_id(0).to(tl.int64) * C + i_c
    tl.store(ds_parts + o_part, tl.sum(ds, 0), mask=m_c)
    tl.store(dw_parts + o_part, tl.sum(dw, 0), mask=m_c)
    tl.store(db_parts + o_part, tl.sum(db, 0), mask=m_c)


def forward(
    x: Tensor,
    update: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor | None,
    normed: Tensor,
) -> None:
    """Write the contiguous `out` and `normed`; without `update` and `out`, `normed` alone."""
    tokens, width = x.shape
    if tokens == 0:
        return
    config = select_config(architecture(x.device), width, backward=False)
    vectors = [None if a is None else a.contiguous() for a in (scale, shift, weight, bias)]
    with device_guard(x):
        residual_layer_norm_forward[(cdiv(tokens, config.rows),)](
            x, update, *vectors, out, normed, tokens,
            *x.stride(), *((0, 0) if update is None else update.stride()), eps,
            C=width, HAS_UPDATE=update is not None, HAS_SHIFT=shift is not None,
            HAS_BIAS=bias is not None, BR=config.rows, BC=next_power_of_2(width),
            num_warps=config.num_warps,
        )  # fmt: skip


def forward_shifted(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, normed: Tensor
) -> None:
    """Write the contiguous `normed`, of ``x + shift``."""
    forward(x, None, None, shift, weight, bias, eps, None, normed)


def backward(
    g: Tensor,
    h: Tensor,
    out: Tensor,
    update: Tensor,
    scale: Tensor,
    weight: Tensor,
    eps: float,
    dx: Tensor,
    dupdate: Tensor,
    sums: Tensor,
) -> None:
    """Write the contiguous `dx` and `dupdate`, given the contiguous `out`.

    And `sums` ``[3, C]`` float32: the gradients of scale, weight and bias.
    """
    parts = sums.new_empty(3, count_parts(out), out.shape[1])
    _start_backward(g, h, out, update, scale, weight, eps, dx, dupdate, parts)
    torch.sum(parts, 1, out=sums)


def backward_in_parts(
    g: Tensor,
    h: Tensor,
    out: Tensor,
    scale: Tensor,
    weight: Tensor,
    eps: float,
    count: int,
    dx: Tensor,
    dupdate: Tensor,
    parts: Tensor,
) -> None:
    """As :func:`backward`, without the update; the sums are still to be added up.

    The first of the three ``[count, C]`` is of `dx` over the tokens.
    """
    _start_backward(g, h, out, None, scale, weight, eps, dx, dupdate, parts)


def count_parts(out: Tensor) -> int:
    """How many programs the backward has: about as many as run at once, few parts to add."""
    config = select_config(architecture(out.device), out.shape[1], backward=True)
    blocks = cdiv(out.shape[0], config.rows)
    each = max(1, cdiv(blocks, 4 * multiprocessors(out.device)))
    return max(1, cdiv(blocks, each))


def _start_backward(
    g: Tensor,
    h: Tensor,
    out: Tensor,
    update: Tensor | None,
    scale: Tensor,
    weight: Tensor,
    eps: float,
    dx: Tensor,
    dupdate: Tensor,
    parts: Tensor,
) -> None:
    tokens, width = out.shape
    config = select_config(architecture(out.device), width, backward=True)
    programs = parts.shape[1]
    each = cdiv(cdiv(tokens, config.rows), programs)
    with device_guard(out):
        residual_layer_norm_backward[(programs,)](
            g, h, out, update, scale.contiguous(), weight.contiguous(), dx, dupdate, *parts,
            tokens, each, *g.stride(), *h.stride(),
            *((0, 0) if update is None else update.stride()), eps,
            C=width, HAS_UPDATE=update is not None, BR=config.rows,
            BC=next_power_of_2(width), num_warps=config.num_warps,
        )  # fmt: skip
