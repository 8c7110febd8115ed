"""The Triton kernels of rope_2d and their launchers; the formula stands in ops/rope_2d.py.

One program takes a block of tokens: it computes their cos and sin once and rotates every head of
q, then of k. The backward is the same kernel with the sign of sin turned.

The kernels of attention own one head each and would compute the same cos and sin in all of them:
they read a table of both, which one launch writes for all heads and layers.

The angle is rounded as the reference rounds it, ``(2 pi * coord) * inv_freq`` in float32. cos and
sin are our own: the library's have a slow path for huge arguments that costs every thread a stack
frame, and the interpreter's and the chips' libraries differ in the last bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bound import bound
from .launch import architecture, cdiv, device_guard, next_power_of_2, tile_choices
from .tilings import RopeConfig, table_head_dim

TWO_PI = tl.constexpr(6.2831854820251465)  # rounded to float32
TWO_OVER_PI = tl.constexpr(0.6366197466850281)

# pi / 2 = HIGH + MIDDLE + LOW. The first two have 11 bits, so that k * HIGH and k * MIDDLE are
# exact, with or without fma, for |k| < 2^13: angles up to 12,000, where DINOv3's stay below 4 pi.
HALF_PI_HIGH = tl.constexpr(1.5703125)
HALF_PI_MIDDLE = tl.constexpr(0.0004837512969970703)
HALF_PI_LOW = tl.constexpr(7.549790126404332e-08)

# Minimax on [-pi/4, pi/4], relative error below 4e-9:
# sin r = r + r^3 S(r^2) and cos r = 1 - r^2/2 + r^4 C(r^2).
S0, S1, S2 = tl.constexpr(-0.16666655), tl.constexpr(0.008332158), tl.constexpr(-0.00019514958)
C0, C1, C2 = tl.constexpr(0.041666646), tl.constexpr(-0.0013887313), tl.constexpr(2.4432786e-05)


# Constants stand right of their operators: with one on the left, the result is itself a constant to
# Triton 3.8's interpreter.
@triton.jit
def cos_sin(angle):
    """Both in float32, by a polynomial each on an eighth of the circle."""
    k = tl.floor(angle * TWO_OVER_PI + 0.5)
    r = angle - k * HALF_PI_HIGH
    r = r - k * HALF_PI_MIDDLE
    r = r - k * HALF_PI_LOW
    z = r * r
    sin = r + r * z * (z * (z * S2 + S1) + S0)
    cos = 1.0 + z * (z * (z * (z * C2 + C1) + C0) - 0.5)
    quadrant = k.to(tl.int32)
    odd = (quadrant & 1) != 0
    cos_out = tl.where(odd, sin, cos)
    sin_out = tl.where(odd, cos, sin)
    cos_out = tl.where(((quadrant + 1) & 2) != 0, -cos_out, cos_out)
    sin_out = tl.where((quadrant & 2) != 0, -sin_out, sin_out)
    return cos_out, sin_out


@triton.jit
def _turns(
    coords, inv_freq, i_t, m_t, stride_ct, stride_ca, stride_f, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Cos and sin [BT, BD] of tokens i_t, and which of them have no angle, [BT]."""
    y = tl.load(coords + i_t * stride_ct, mask=m_t, other=0.0)
    x = tl.load(coords + i_t * stride_ct + stride_ca, mask=m_t, other=0.0)
    QUARTER: tl.constexpr = D // 4
    i_d = tl.arange(0, BD)
    freq = tl.load(inv_freq + (i_d % QUARTER) * stride_f, mask=i_d < 2 * QUARTER, other=0.0)
    coord = tl.where((i_d < QUARTER)[None, :], y[:, None], x[:, None])  # [BT, BD]
    cos, sin = cos_sin((coord * TWO_PI) * freq[None, :])
    return cos, sin, (y == 0.0) & (x == 0.0)


@triton.jit
def _rotate_block(
    src, dst, i_t, m_t, m_keep, cos, sin,
    stride_st, stride_sh, stride_sd, stride_dt, stride_dh, stride_dd,
    H: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    i_d = tl.arange(0, BD).to(tl.int64)
    p_src = src + i_t[:, None, None] * stride_st + i_d[None, None, :] * stride_sd
    p_dst = dst + i_t[:, None, None] * stride_dt + i_d[None, None, :] * stride_dd
    for h in range(0, H, BH):
        i_h = h + tl.arange(0, BH).to(tl.int64)
        mask = m_t[:, None, None] & (i_h < H)[None, :, None] & (i_d < HALF)[None, None, :]
        p_first = p_src + i_h[None, :, None] * stride_sh
        b_first = tl.load(p_first, mask=mask, other=0.0)  # [BT, BH, BD]
        b_second = tl.load(p_first + HALF * stride_sd, mask=mask, other=0.0)
        first, second = b_first.to(tl.float32), b_second.to(tl.float32)
        o_first = (first * cos - second * sin).to(b_first.dtype)
        o_second = (second * cos + first * sin).to(b_first.dtype)
        # 1 * a - 0 * b is not a when b is infinite or a is -0.
        o_first = tl.where(m_keep, b_first, o_first)
        o_second = tl.where(m_keep, b_second, o_second)
        p_out = p_dst + i_h[None, :, None] * stride_dh
        tl.store(p_out, o_first, mask=mask)
        tl.store(p_out + HALF * stride_dd, o_second, mask=mask)


@bound
@triton.jit(do_not_specialize=["T"])
def rope_2d(
    q, k, q_out, k_out, coords, inv_freq, T,
    stride_qt, stride_qh, stride_qd,
    stride_kt, stride_kh, stride_kd,
    stride_qot, stride_qoh, stride_qod,
    stride_kot, stride_koh, stride_kod,
    stride_ct, stride_ca, stride_f,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """Rotate q [T, HQ, D] and k [T, HK, D] into q_out and k_out, which may be q and k."""
    i_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = i_t < T
    cos, sin, still = _turns(coords, inv_freq, i_t, m_t, stride_ct, stride_ca, stride_f, D, BD)
    if INVERSE:
        sin = -sin
    cos, sin = cos[:, None, :], sin[:, None, :]
    m_keep = still[:, None, None]

    _rotate_block(
        q, q_out, i_t, m_t, m_keep, cos, sin,
        stride_qt, stride_qh, stride_qd, stride_qot, stride_qoh, stride_qod, HQ, D, BH, BD,
    )  # fmt: skip
    _rotate_block(
        k, k_out, i_t, m_t, m_keep, cos, sin,
        stride_kt, stride_kh, stride_kd, stride_kot, stride_koh, stride_kod, HK, D, BH, BD,
    )  # fmt: skip


@bound
@triton.jit(do_not_specialize=["T"])
def rope_2d_table(
    coords, inv_freq, table, T, stride_ct, stride_ca, stride_f,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Cos, then sin, of the D / 2 angles of BT tokens, into the contiguous table [T, D]."""
    i_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = i_t < T
    cos, sin, _ = _turns(coords, inv_freq, i_t, m_t, stride_ct, stride_ca, stride_f, D, BD)
    i_d = tl.arange(0, BD)
    mask = m_t[:, None] & (i_d < D // 2)[None, :]
    p_table = table + (i_t * D)[:, None] + i_d[None, :]
    tl.store(p_table, cos, mask=mask)
    tl.store(p_table + D // 2, sin, mask=mask)


_INTERPRETER = RopeConfig(16, 4, 1)
_TABLE_ROWS = 32


def select_config(arch: str, head_dim: int, dtype: torch.dtype) -> RopeConfig:
    """Tile sizes for a chip, a head_dim and a dtype."""
    if arch == "interpreter":
        return _INTERPRETER
    width = table_head_dim(next_power_of_2(head_dim))
    return tile_choices("ROPE", arch, width, dtype.itemsize)[0]


def rotate_heads(
    q: Tensor,
    k: Tensor,
    coords: Tensor,
    inv_freq: Tensor,
    inverse: bool,
    q_out: Tensor,
    k_out: Tensor,
) -> None:
    """Write the rotated q and k; tensors of any strides, checked by the caller."""
    tokens, q_heads, head_dim = q.shape
    k_heads = k.shape[1]
    if tokens == 0 or q_heads + k_heads == 0:
        return
    config = select_config(architecture(q.device), head_dim, q.dtype)
    with device_guard(q):
        rope_2d[(cdiv(tokens, config.block_t),)](
            q, k, q_out, k_out, coords, inv_freq, tokens,
            *q.stride(), *k.stride(), *q_out.stride(), *k_out.stride(),
            *coords.stride(), *inv_freq.stride(),
            HQ=q_heads,
            HK=k_heads,
            D=head_dim,
            BT=config.block_t,
            BH=min(config.block_h, next_power_of_2(max(q_heads, k_heads))),
            BD=next_power_of_2(head_dim // 2),
            INVERSE=inverse,
            num_warps=config.num_warps,
        )  # fmt: skip


def write_table(coords: Tensor, inv_freq: Tensor, table: Tensor) -> None:
    """Write cos and sin of the tokens at `coords` ``[T, 2]`` into the contiguous `table`."""
    tokens, head_dim = table.shape
    if tokens == 0:
        return
    with device_guard(coords):
        rope_2d_table[(cdiv(tokens, _TABLE_ROWS),)](
            coords, inv_freq, table, tokens, *coords.stride(), *inv_freq.stride(),
            D=head_dim, BT=_TABLE_ROWS, BD=next_power_of_2(head_dim // 2), num_warps=4,
        )  # fmt: skip
