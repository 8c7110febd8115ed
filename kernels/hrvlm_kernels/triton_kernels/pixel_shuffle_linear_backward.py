"""The backward Triton kernels of pixel_shuffle_linear and their launchers.

With the rows of pixel_shuffle_linear.py:

    dx         dx[row, c]         = sum over n of  dy[m, n] * weight[n, (dy, dx, c)]
    dweight    dw[n, (dy, dx, c)] = sum over m of  dy[m, n] * x[row, c]

dx is a scatter that writes each patch row once; prefix rows are zeroed by a kernel of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .bound import bound
from .launch import architecture, cdiv, device_guard, launch, next_power_of_2
from .pixel_shuffle_linear import (
    add_parts,
    dot_precision,
    factor_of,
    locate_tile,
    parts_like,
    plan_product,
    select_configs,
    tile_arguments,
)
from .tilings import GemmConfig


@bound
@triton.jit(do_not_specialize=["M"])
def pixel_shuffle_linear_dx(
    dy, index, weight, dx, M, N,
    stride_ym, stride_yn, stride_wn, stride_wk, stride_xt,
    C: tl.constexpr, S: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Channels [BN] of one patch of BM output tokens, stored in the patches' packed rows."""
    BLOCKS: tl.constexpr = (C + BN - 1) // BN
    i_m, tile = locate_tile(tl.program_id(0), tl.cdiv(M, BM), S * S * BLOCKS, GROUP)
    patch = tile // BLOCKS
    i_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    i_c = (tile % BLOCKS) * BN + tl.arange(0, BN)
    m_m, m_c = i_m < M, i_c < C
    o_y = tl.where(m_m, i_m, 0) * stride_ym
    o_w = (patch * C + i_c).to(tl.int64) * stride_wk
    i_k = tl.arange(0, BK)

    acc = tl.zeros([BM, BN], tl.float32)
    for n in range(0, N, BK):
        i_n = (n + i_k).to(tl.int64)
        p_y = dy + o_y[:, None] + (i_n * stride_yn)[None, :]
        p_w = weight + (i_n * stride_wn)[:, None] + o_w[None, :]
        if EVEN_N and C % BN == 0:
            b_y, b_w = tl.load(p_y), tl.load(p_w)
        else:
            b_y = tl.load(p_y, mask=(i_n < N)[None, :], other=0.0)
            b_w = tl.load(p_w, mask=(i_n < N)[:, None] & m_c[None, :], other=0.0)
        acc = tl.dot(b_y, b_w, acc, input_precision=PRECISION)  # [BM, BK] @ [BK, BN]

    row = tl.load(index + i_m * (S * S) + patch, mask=m_m, other=0).to(tl.int64)
    p_dx = dx + (row * stride_xt)[:, None] + i_c[None, :]
    tl.store(p_dx, acc.to(dx.dtype.element_ty), mask=m_m[:, None] & m_c[None, :])


@bound
@triton.jit(do_not_specialize=["M", "steps"])
def pixel_shuffle_linear_dweight(
    dy, x, index, dw, M, N, steps,
    stride_ym, stride_yn, stride_xt, stride_xc, stride_dp, stride_dn,
    C: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Rows [BM] of the weight, channels [BN] of one patch: part program_id(1) of the sum."""
    BLOCKS: tl.constexpr = (C + BN - 1) // BN
    i_n, tile = locate_tile(tl.program_id(0), tl.cdiv(N, BM), S * S * BLOCKS, GROUP)
    patch = tile // BLOCKS
    i_n = i_n.to(tl.int64) * BM + tl.arange(0, BM)
    i_c = (tile % BLOCKS) * BN + tl.arange(0, BN)
    m_n, m_c = i_n < N, i_c < C
    o_y = i_n * stride_yn
    o_x = i_c.to(tl.int64) * stride_xc
    i_k = tl.arange(0, BK).to(tl.int64)

    acc = tl.zeros([BM, BN], tl.float32)
    begin = tl.program_id(1) * steps
    for step in range(begin, tl.minimum(begin + steps, tl.cdiv(M, BK))):
        i_m = i_k + step * BK
        m_m = i_m < M
        row = tl.load(index + i_m * (S * S) + patch, mask=m_m, other=0).to(tl.int64)
        p_y = dy + o_y[:, None] + (i_m * stride_ym)[None, :]
        p_x = x + (row * stride_xt)[:, None] + o_x[None, :]
        b_y = tl.load(p_y, mask=m_n[:, None] & m_m[None, :], other=0.0)
        b_x = tl.load(p_x, mask=m_m[:, None] & m_c[None, :], other=0.0)
        acc = tl.dot(b_y, b_x, acc, input_precision=PRECISION)  # [BM, BK] @ [BK, BN]

    p_dw = dw + tl.program_id(1).to(tl.int64) * stride_dp
    p_dw += i_n[:, None] * stride_dn + (patch * C + i_c)[None, :]
    tl.store(p_dw, acc.to(dw.dtype.element_ty), mask=m_n[:, None] & m_c[None, :])


@bound
@triton.jit
def pixel_shuffle_linear_zero_prefix(
    dx, cu_seqlens, C, stride_xt, stride_xc, PREFIX: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Zero the prefix rows of segment program_id(0)."""
    start = tl.load(cu_seqlens + tl.program_id(0)).to(tl.int64)
    i_c = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], dx.dtype.element_ty)
    for row in range(0, PREFIX):
        p_row = dx + (start + row) * stride_xt
        for c in range(0, C, BLOCK):
            tl.store(p_row + (c + i_c) * stride_xc, zeros, mask=c + i_c < C)


def backward_dx(
    dy: Tensor,
    weight: Tensor,
    index: Tensor,
    cu_seqlens: Tensor,
    num_prefix_tokens: int,
    dx: Tensor,
) -> None:
    """Write the gradient of x into the contiguous `dx`: each patch row once, prefix rows zero."""
    (rows, width_out), width, factor = dy.shape, dx.shape[1], factor_of(index)
    if dx.numel() == 0:
        return

    def start(config: GemmConfig) -> None:
        tiles = cdiv(rows, config.block_m) * factor**2 * cdiv(width, config.block_n)
        pixel_shuffle_linear_dx[(tiles,)](
            dy, index.contiguous(), weight, dx, rows, width_out,
            *dy.stride(), *weight.stride(), dx.stride(0),
            C=width, S=factor, EVEN_N=width_out % config.block_k == 0,
            PRECISION=dot_precision(dy.dtype), **tile_arguments(config),
        )  # fmt: skip

    with device_guard(dy):
        if rows:
            configs = select_configs(architecture(dy.device), dy.dtype)
            launch("pixel_shuffle_linear dx", configs, start)
        zero_prefix_rows(dx, cu_seqlens, num_prefix_tokens)


def backward_dweight(
    dy: Tensor, x: Tensor, index: Tensor, dw: Tensor, parts: int | None = None
) -> None:
    """Write the gradient of the weight into the contiguous `dw`; `parts` forces the split."""
    (rows, width_out), width, factor = dy.shape, x.shape[1], factor_of(index)
    if dw.numel() == 0:
        return

    def count(config: GemmConfig) -> tuple[int, int]:
        tiles = cdiv(width_out, config.block_m) * cdiv(width, config.block_n)
        return tiles * factor**2, cdiv(rows, config.block_k)

    def start(config: GemmConfig) -> None:
        plan = plan_product(config, count, x, parts)
        target = dw if plan.parts == 1 else parts_like(dw, plan.parts)
        pixel_shuffle_linear_dweight[(plan.tiles, plan.parts)](
            dy, x, index.contiguous(), target, rows, width_out, plan.steps,
            *dy.stride(), *x.stride(), dw.numel(), dw.stride(0),
            C=width, S=factor, PRECISION=dot_precision(x.dtype), **tile_arguments(plan.config),
        )  # fmt: skip
        if plan.parts > 1:
            add_parts(target, None, dw)

    with device_guard(x):
        configs = select_configs(architecture(x.device), x.dtype)
        launch("pixel_shuffle_linear dweight", configs, start)


def zero_prefix_rows(dx: Tensor, cu_seqlens: Tensor, num_prefix_tokens: int) -> None:
    """Zero the first `num_prefix_tokens` rows of each segment of `dx` ``[T, C]``.

    The device of `dx` must be the current one.
    """
    segments = cu_seqlens.shape[0] - 1
    if segments and num_prefix_tokens and dx.numel():
        pixel_shuffle_linear_zero_prefix[(segments,)](
            dx, cu_seqlens.contiguous(), dx.shape[1], *dx.stride(), PREFIX=num_prefix_tokens,
            BLOCK=min(1024, next_power_of_2(dx.shape[1])),
        )  # fmt: skip
