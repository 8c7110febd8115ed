"""The Triton kernel of linear_gelu and its launcher; see ops/linear_gelu.py.

A product whose tiles are those of pixel_shuffle_linear's; the activation works on the sums where
they are, in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bias_gelu import SQRT_HALF
from .bound import bound
from .launch import architecture, cdiv, device_guard, launch, tile_choices, without_spilling
from .pixel_shuffle_linear import dot_precision, locate_tile, select_configs, tile_arguments
from .tilings import GemmConfig

# p(u) = log2(Phi(-u)) for u from 0 to 13, where 2 ** p(u) is the smallest normal float32; beyond it
# falls on. Fitted so that u Phi(-u) errs by 3e-7, or 3e-5 of itself.
P0, P1 = tl.constexpr(-0.9999669194221497), tl.constexpr(-1.151463270187378)
P2, P3 = tl.constexpr(-0.4579464793205261), tl.constexpr(-0.054563969373703)
P4, P5 = tl.constexpr(0.008890684694051743), tl.constexpr(-0.0010678450344130397)
P6, P7 = tl.constexpr(8.94783588591963e-05), tl.constexpr(-4.889852334599709e-06)
P8, P9 = tl.constexpr(1.5544883069651405e-07), tl.constexpr(-2.1703165931086232e-09)
ALL_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def gelu(z, dtype: tl.constexpr):
    """Z Phi(z) for a result in `dtype`; NaN stays NaN."""
    if dtype == tl.float32:
        return z * 0.5 * (tl.erf(z * SQRT_HALF) + 1.0)
    u = tl.minimum(tl.abs(z), 40.0)  # 2 ** p(40) is 0, and infinity times it would be NaN
    p = u * P9 + P8
    p = p * u + P7
    p = p * u + P6
    p = p * u + P5
    p = p * u + P4
    p = p * u + P3
    p = p * u + P2
    p = p * u + P1
    p = p * u + P0
    return tl.maximum(z, 0.0, propagate_nan=ALL_NAN) - u * tl.exp2(p)


@triton.jit
def multiply(
    x, i_t, stride_xt, stride_xc, p_w, stride_wc, C, EVEN_C: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows i_t of x [T, C] times the rows of weights that p_w [BN] points to: float32 [BM, BN]."""
    i_k = tl.arange(0, BK)
    o_x = i_t * stride_xt
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, C, BK):
        i_c = start + i_k
        p_x = x + o_x[:, None] + (i_c.to(tl.int64) * stride_xc)[None, :]
        p_wc = p_w[None, :] + (i_c.to(tl.int64) * stride_wc)[:, None]
        if EVEN_C:
            b_x, b_w = tl.load(p_x), tl.load(p_wc)
        else:
            b_x = tl.load(p_x, mask=(i_c < C)[None, :], other=0.0)
            b_w = tl.load(p_wc, mask=(i_c < C)[:, None], other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)  # [BM, BK] @ [BK, BN]
    return acc


@bound
@triton.jit(do_not_specialize=["T"])
def linear_gelu_forward(
    x, weight, bias, out, T, F, C, stride_xt, stride_xc, stride_wf, stride_wc,
    EVEN_C: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tile [BM, BN] of the contiguous out [T, F]; bias is contiguous too."""
    i_t, i_f = locate_tile(tl.program_id(0), tl.cdiv(T, BM), tl.cdiv(F, BN), GROUP)
    i_t = i_t.to(tl.int64) * BM + tl.arange(0, BM)
    i_f = i_f * BN + tl.arange(0, BN)
    m_t, m_f = i_t < T, i_f < F
    # Rows and columns past the end read row 0: no mask in the loop, and nothing of them is stored.
    p_w = weight + tl.where(m_f, i_f, 0).to(tl.int64) * stride_wf
    z = multiply(
        x, tl.where(m_t, i_t, 0), stride_xt, stride_xc, p_w, stride_wc, C, EVEN_C,
        BM, BN, BK, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        z += tl.load(bias + i_f, mask=m_f, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    p_out = out + (i_t * F)[:, None] + i_f[None, :]
    tl.store(p_out, gelu(z, dtype).to(dtype), mask=m_t[:, None] & m_f[None, :])


def configs_of(table: str, arch: str, dtype: torch.dtype) -> tuple[GemmConfig, ...]:
    """Tile sizes for a chip and a dtype; where none were measured, those of other products."""
    row = table, arch, dtype.itemsize
    return tile_choices(*row) or without_spilling(select_configs(arch, dtype), *row)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the contiguous `out`."""
    (tokens, width), channels = out.shape, x.shape[1]
    if out.numel() == 0:
        return
    bias = None if bias is None else bias.contiguous()

    def start(config: GemmConfig) -> None:
        tiles = cdiv(tokens, config.block_m) * cdiv(width, config.block_n)
        linear_gelu_forward[(tiles,)](
            x, weight, bias, out, tokens, width, channels, *x.stride(), *weight.stride(),
            EVEN_C=channels % config.block_k == 0, HAS_BIAS=bias is not None,
            PRECISION=dot_precision(x.dtype), **tile_arguments(config),
        )  # fmt: skip

    with device_guard(x):
        launch("linear_gelu", configs_of("LINEAR_GELU", architecture(x.device), x.dtype), start)
