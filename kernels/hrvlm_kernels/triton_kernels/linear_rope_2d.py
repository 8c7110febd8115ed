"""The Triton kernel of linear_rope_2d and its launcher; see ops/linear_rope_2d.py.

Rows of the weight are read in pairs, those whose outputs are rotated into each other: so a thread,
whose sums are pairs of neighbours, has both. Heads that lie side by side in a tile turn by the same
angles, and the tile reads their cos and sin once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .bound import bound
from .launch import architecture, cdiv, device_guard, launch
from .linear_gelu import configs_of, multiply
from .pixel_shuffle_linear import dot_precision, locate_tile, tile_arguments
from .tilings import GemmConfig


@bound
@triton.jit(do_not_specialize=["T"])
def linear_rope_2d_forward(
    x, weight, bias, table, out, T, F, C, stride_xt, stride_xc, stride_wf, stride_wc,
    D: tl.constexpr, HEADS: tl.constexpr, ALIGNED: tl.constexpr,
    EVEN_C: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tile [BM, BN] of the contiguous out [T, F], F = 3 H D; bias and table are contiguous too.

    The tile has HEADS whole heads, or part of one if that is 1; ALIGNED says that no tile has
    columns of k and of v.
    """
    HALF: tl.constexpr = D // 2
    PAIRS: tl.constexpr = BN // 2 // HEADS
    i_t, i_f = locate_tile(tl.program_id(0), tl.cdiv(T, BM), tl.cdiv(F, BN), GROUP)
    i_t = i_t.to(tl.int64) * BM + tl.arange(0, BM)
    m_t, first = i_t < T, i_f * (BN // 2)
    # Rows and columns past the end read row 0: no mask in the loop, and nothing of them is stored.
    i_x = tl.where(m_t, i_t, 0)
    i_w = tl.arange(0, BN)
    i_p = first + i_w // 2
    i_w = (i_p // HALF) * D + i_p % HALF + i_w % 2 * HALF
    p_w = weight + tl.where(i_p < F // 2, i_w, 0).to(tl.int64) * stride_wf
    acc = multiply(x, i_x, stride_xt, stride_xc, p_w, stride_wc, C, EVEN_C, BM, BN, BK, PRECISION)
    left, right = tl.split(tl.reshape(acc, [BM, HEADS, PAIRS, 2]))
    i_j = tl.arange(0, PAIRS)
    i_p = first + (tl.arange(0, HEADS) * PAIRS)[:, None] + i_j[None, :]
    m_p = i_p < F // 2
    i_left = (i_p // HALF) * D + i_p % HALF  # [HEADS, PAIRS]
    if HAS_BIAS:
        left += tl.load(bias + i_left, mask=m_p, other=0.0).to(tl.float32)[None, :, :]
        right += tl.load(bias + i_left + HALF, mask=m_p, other=0.0).to(tl.float32)[None, :, :]
    if first < F // 3:  # pairs of q and k
        p_cos = table + (i_x * D)[:, None] + ((first + i_j) % HALF)[None, :]
        cos, sin = tl.load(p_cos)[:, None, :], tl.load(p_cos + HALF)[:, None, :]
        # 1 * a - 0 * b is not a when b is infinite.
        keep = sin == 0.0
        if not ALIGNED:
            keep = keep | (i_p >= F // 3)[None, :, :]
        turned = tl.where(keep, left, left * cos - right * sin)
        right = tl.where(keep, right, right * cos + left * sin)
        left = turned
    p_out = out + (i_t * F)[:, None, None] + i_left[None, :, :]
    mask = m_t[:, None, None] & m_p[None, :, :]
    tl.store(p_out, left.to(out.dtype.element_ty), mask=mask)
    tl.store(p_out + HALF, right.to(out.dtype.element_ty), mask=mask)


def heads_of_tile(head_dim: int, columns: int) -> int:
    """How many whole heads a tile of so many columns has; 1 if it does not begin with a head."""
    return max(1, columns // head_dim) if columns % head_dim == 0 else 1


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, out: Tensor) -> None:
    """Write the contiguous `out` ``[T, 3, H, D]``."""
    (tokens, channels), width, head_dim = x.shape, weight.shape[0], table.shape[1]
    if out.numel() == 0:
        return
    bias, table = None if bias is None else bias.contiguous(), table.contiguous()

    def start(config: GemmConfig) -> None:
        tiles = cdiv(tokens, config.block_m) * cdiv(width, config.block_n)
        linear_rope_2d_forward[(tiles,)](
            x, weight, bias, table, out, tokens, width, channels,
            *x.stride(), *weight.stride(),
            D=head_dim, HEADS=heads_of_tile(head_dim, config.block_n),
            ALIGNED=width // 3 * 2 % config.block_n == 0,
            EVEN_C=channels % config.block_k == 0, HAS_BIAS=bias is not None,
            PRECISION=dot_precision(x.dtype), **tile_arguments(config),
        )  # fmt: skip

    with device_guard(x):
        configs = configs_of("LINEAR_ROPE_2D", architecture(x.device), x.dtype)
        launch("linear_rope_2d", configs, start)
