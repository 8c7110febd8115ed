"""A forward kernel of varlen_attention whose warps are specialised by Triton; for Hopper.

``tl.range(warp_specialize=True)`` gives loading (TMA) and computing to warps of their own. Triton
3.6 does so on sm_90 only where all operands come by descriptors, with num_warps=4 (two more groups
of four warps are added), and if no product stands outside the loop: the last block can't be peeled
off, so every block is masked, which costs a quarter more instructions per score.

No table asks for this order ("specialised") yet: it is here to be timed beside the others by
``python -m benchmarks.tune``. q and k have to be rotated before.
"""

from __future__ import annotations

import contextvars

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tilings import Tiling
from .varlen_attention_triton import (
    LOG2_E,
    PRECISION,
    locate_start,
    padded_head_dim,
    softmax_step,
    store_rows,
    tile_list,
)


@triton.jit(do_not_specialize=["T"])
def specialised_kernel(
    q, k, v, out, lse, cu_seqlens, tiles, T, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PARTS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """A tile of out [T, H, D] and lse [H, T]."""
    i_h, first, n, start = locate_start(cu_seqlens, tiles, H, BM, PARTS)
    # The pass that specialises can't take an early return; a descriptor can't have no rows.
    stored = tl.where(n > SKIP, n, 0)
    i_m = start + tl.arange(0, BM)
    i_hk = i_h // GROUP
    # Descriptors of the segment alone: rows past its end are zeros, not the neighbour's.
    p_q = q + first * stride_qt + i_h * stride_qh
    p_k = k + first * stride_kt + i_hk * stride_kh
    p_v = v + first * stride_vt + i_hk * stride_vh
    q_blocks = tl.make_tensor_descriptor(p_q, [n, D], [stride_qt, 1], [BM, BD])
    k_blocks = tl.make_tensor_descriptor(p_k, [n, D], [stride_kt, 1], [BN, BD])
    v_blocks = tl.make_tensor_descriptor(p_v, [n, D], [stride_vt, 1], [BN, BD])
    b_q = q_blocks.load([start, 0])
    i_n = tl.arange(0, BN)
    qk_scale = scale * LOG2_E
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for s in tl.range(0, stored, BN, warp_specialize=True):
        b_k = k_blocks.load([s, 0])
        qk = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [BM, BN]
        qk = tl.where((s + i_n < n)[None, :], qk, float("-inf"))
        p, peak, total, acc = softmax_step(qk, peak, total, acc, qk_scale)
        b_v = v_blocks.load([s, 0])
        acc = tl.dot(p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)
    acc = acc / total[:, None]
    store_rows(out + first * stride_ot + i_h * stride_oh, i_m, stored, stride_ot, acc, D, BD)
    tl.store(lse + i_h * T + first + i_m, peak + tl.log2(total), mask=i_m < stored)


def start_specialised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    tiles_64: Tensor,
    tiles_128: Tensor,
    skip: int,
    scale: float,
    tiling: Tiling,
) -> None:
    """Launch the kernel; TMA must be able to load q, k and v."""
    heads, head_dim = q.shape[1:]
    width = padded_head_dim(head_dim)
    tiles, parts = tile_list(tiles_64, tiles_128, tiling)

    def start() -> None:
        triton.set_allocator(_scratch)  # descriptors made on the device live there
        specialised_kernel[(tiles.shape[0] * parts * heads,)](
            q, k, v, out, lse, cu_seqlens, tiles, q.shape[0], scale,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2],
            H=heads, GROUP=heads // k.shape[1], D=head_dim, BD=width, BM=tiling.rows,
            BN=tiling.step, PARTS=parts, SKIP=skip,
            num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        )  # fmt: skip

    contextvars.copy_context().run(start)  # the caller's allocator stays as it is


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
