"""The Triton kernels of layer_norm_pixel_shuffle and their launchers.

Row j of the result, seen as ``[M * s*s, C]``, is the norm of packed row ``index.flat[j]``: a
LayerNorm that reads through an index. The backward has to read x again anyway, so it computes mean
and variance again, and nothing but x is saved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bound import bound
from .launch import architecture, cdiv, device_guard, multiprocessors, next_power_of_2, tile_choices
from .pixel_shuffle_linear_backward import zero_prefix_rows
from .tilings import NormConfig, table_width


@triton.jit
def normalise(b_x, m_c, eps, C: tl.constexpr):
    """b_x [BR, BC] with mean 0 and variance 1 (columns past C: any), and 1 / deviation [BR]."""
    mean = tl.sum(b_x, 1) / C
    # A row that is nearly constant is divided by a small deviation, and with it the rounding of its
    # mean: what is left of the mean is taken away as well.
    rest = tl.where(m_c[None, :], b_x - mean[:, None], 0.0)
    centred = rest - (tl.sum(rest, 1) / C)[:, None]
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * rstd[:, None], rstd


@bound
@triton.jit(do_not_specialize=["rows"])
def layer_norm_pixel_shuffle_forward(
    x, index, weight, bias, out, rows, stride_xt, stride_xc, eps,
    C: tl.constexpr, HAS_BIAS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out[j] = layer_norm(x[index[j]]) for BR rows j."""
    i_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    i_c = tl.arange(0, BC)
    m_r, m_c = i_r < rows, i_c < C
    mask = m_r[:, None] & m_c[None, :]
    row = tl.load(index + i_r, mask=m_r, other=0).to(tl.int64)
    p_x = x + (row * stride_xt)[:, None] + (i_c.to(tl.int64) * stride_xc)[None, :]
    b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)  # [BR, BC]
    b_out, _ = normalise(b_x, m_c, eps, C)
    b_out *= tl.load(weight + i_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        b_out += tl.load(bias + i_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    tl.store(out + (i_r * C)[:, None] + i_c[None, :], b_out.to(out.dtype.element_ty), mask=mask)


@bound
@triton.jit(do_not_specialize=["rows", "blocks"])
def layer_norm_pixel_shuffle_backward(
    dy, x, index, weight, dx, dw_parts, db_parts, rows, blocks,
    stride_ym, stride_yk, stride_xt, stride_xc, eps,
    C: tl.constexpr, PATCHES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient of `blocks` times BR rows, and this program's part of dw and db."""
    i_c = tl.arange(0, BC)
    m_c = i_c < C
    b_w = tl.load(weight + i_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    o_x = (i_c.to(tl.int64) * stride_xc)[None, :]
    dw = tl.zeros([BR, BC], tl.float32)
    db = tl.zeros([BR, BC], tl.float32)
    i_r = tl.program_id(0).to(tl.int64) * (blocks * BR) + tl.arange(0, BR)
    for _ in range(0, blocks):
        m_r = i_r < rows
        mask = m_r[:, None] & m_c[None, :]
        row = tl.load(index + i_r, mask=m_r, other=0).to(tl.int64)
        b_x = tl.load(x + (row * stride_xt)[:, None] + o_x, mask=mask, other=0.0).to(tl.float32)
        p_y = dy + ((i_r // PATCHES) * stride_ym)[:, None]
        p_y += ((i_r % PATCHES) * C)[:, None] * stride_yk + (i_c.to(tl.int64) * stride_yk)[None, :]
        b_y = tl.load(p_y, mask=mask, other=0.0).to(tl.float32)
        xhat, rstd = normalise(b_x, m_c, eps, C)
        dw += b_y * xhat
        db += b_y
        grad = b_y * b_w
        projection = tl.sum(grad * xhat, 1) / C
        mean = tl.sum(grad, 1) / C
        b_dx = (grad - mean[:, None] - xhat * projection[:, None]) * rstd[:, None]
        tl.store(dx + (row * C)[:, None] + i_c[None, :], b_dx.to(dx.dtype.element_ty), mask=mask)
        i_r += BR
    o_part = tl.program_id(0).to(tl.int64) * C + i_c
    tl.store(dw_parts + o_part, tl.sum(dw, 0), mask=m_c)
    tl.store(db_parts + o_part, tl.sum(db, 0), mask=m_c)


MAX_WIDTH = 8192  # wider rows spill
_INTERPRETER = NormConfig(16, 1)


def select_config(arch: str, width: int, *, backward: bool) -> NormConfig:
    """Tile sizes for a chip and C = `width`, at most :data:`MAX_WIDTH`."""
    if arch == "interpreter":
        return _INTERPRETER
    table = "NORM_BACKWARD" if backward else "NORM_FORWARD"
    return tile_choices(table, arch, table_width(width))[0]


def forward(
    x: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor
) -> None:
    """Write the shuffled norm of `x` ``[T, C]`` into the contiguous `out` ``[M, s*s*C]``."""
    rows, width = index.numel(), x.shape[1]
    if out.numel() == 0:
        return
    config = select_config(architecture(x.device), width, backward=False)
    with device_guard(x):
        layer_norm_pixel_shuffle_forward[(cdiv(rows, config.rows),)](
            x, index.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(),
            out, rows, *x.stride(), eps, C=width, HAS_BIAS=bias is not None,
            BR=config.rows, BC=next_power_of_2(width), num_warps=config.num_warps,
        )  # fmt: skip


def backward(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    eps: float,
    num_prefix_tokens: int,
    dx: Tensor,
    sums: Tensor,
) -> None:
    """Write the gradient of `x` into the contiguous `dx`.

    And `sums` ``[2, C]`` float32: the gradients of weight and bias.
    """
    rows, width = index.numel(), x.shape[1]
    config = select_config(architecture(x.device), width, backward=True)
    blocks = cdiv(rows, config.rows)
    # About as many programs as run at once: few parts to add.
    each = max(1, cdiv(blocks, 4 * multiprocessors(x.device)))
    programs = cdiv(blocks, each)
    parts = torch.empty(2, programs, width, dtype=torch.float32, device=x.device)
    with device_guard(x):
        if parts.numel():
            layer_norm_pixel_shuffle_backward[(programs,)](
                dy, x, index.contiguous(), weight.contiguous(), dx, parts[0], parts[1],
                rows, each, *dy.stride(), *x.stride(), eps,
                C=width, PATCHES=index.shape[1], BR=config.rows,
                BC=next_power_of_2(width), num_warps=config.num_warps,
            )  # fmt: skip
        zero_prefix_rows(dx, cu_seqlens, num_prefix_tokens)
    torch.sum(parts, 1, out=sums)
