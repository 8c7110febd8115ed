"""The forward Triton kernel of varlen_attention and its launcher.

The formula stands in ops/varlen_attention.py. One program takes one head of one tile of queries (a
row of the tile list) and walks over the keys of its segment in blocks, with FlashAttention-2's
online softmax in base 2. For a block of scores s_j = scale * log2(e) * q.k_j:

    peak'  = max(peak, max_j s_j)               p_j    = 2^(s_j - peak')
    total' = total 2^(peak - peak') + sum p_j   acc'   = acc 2^(peak - peak') + sum p_j v_j

In the end out = acc / total and lse = peak + log2(total), in base 2 too: a natural logarithm would
cost the backward two roundings.

Heads are the fast axis of the grid, so that the keys and values of an image stay in L2.

Only the last block of a segment has columns to mask, so it is kept out of the loop, which has no
mask at all. Rows of the next segment never get into V, nor their scores into the softmax: their NaN
and Inf stay with them.

On Hopper the order decides whether the tensor cores run beside the softmax (read from compiled
code, see tests/kernels/test_compile_varlen_attention.py):

    plain  the masked block first, then the loop; with it last, ptxas serializes all wgmma
    ahead  q.k of the next block is issued before the softmax of this one; the masked block last.
           K and V come by tensor descriptors (TMA): with pointers the registers do not suffice

Only the tables choose between them (or `tilings`, in the tests and in benchmarks.tuning).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..attention_problem import Problem, folds_rope
from .attention_tiles import (
    LOG2_E,
    PRECISION,
    as_kernels_read_it,
    column_blocks,
    constants,
    load_rows,
    locate,
    rotate,
    rotated,
    softmax_step,
    store_rows,
    strides,
    tile_list,
    with_table,
)
from .bound import bound
from .launch import architecture, device_guard, launch, tile_choices
from .tilings import Tiling, table_head_dim
from .varlen_attention_short import forward_short, select_short_tilings


@triton.jit
def _scores(
    b_q, b_q_tail, p_k, i_n, n, stride_kt,
    D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """q.k [BM, BN] of a block of keys."""
    b_k = load_rows(p_k, i_n, n, stride_kt, D, BD, MASKED)
    qk = tl.dot(b_q, b_k.T, input_precision=PRECISION)
    if TAIL:
        b_k_tail = load_rows(p_k, i_n, n, stride_kt, D, TAIL, MASKED, BD)
        qk = tl.dot(b_q_tail, b_k_tail.T, qk, input_precision=PRECISION)
    return qk


@triton.jit
def _add_values(
    acc, fade, p, p_v, i_n, n, stride_vt,
    D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr, FIRST: tl.constexpr = 0,
):  # fmt: skip
    """Acc, faded, plus the columns from FIRST on of p v."""
    acc *= fade[:, None]
    b_v = load_rows(p_v, i_n, n, stride_vt, D, BD, MASKED, FIRST)
    return tl.dot(p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)


@triton.jit
def _last_step(qk, i_n, n, peak, total, qk_scale):
    """Of the softmax, without the keys past the segment's end."""
    qk = tl.where((i_n < n)[None, :], qk, float("-inf"))
    return softmax_step(qk, peak, total, qk_scale)


@triton.jit
def _store_lse(p_lse, peak, total, mask):
    tl.store(p_lse, peak + tl.log2(total), mask=mask)


@bound
@triton.jit(do_not_specialize=["T"])
def varlen_attention_forward(
    q, k, v, k_blocks, v_blocks, out, lse, cu_seqlens, tiles, table, T, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, AHEAD: tl.constexpr,
    ROPE: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """A tile of out [T, H, D] and lse [H, T]; AHEAD takes k and v as descriptors too.

    Heads have BD columns, and TAIL more if that is not 0, which have products of their own: in the
    plain order only. Segments of up to SKIP tokens are left to varlen_attention_short.py.
    """
    i_h, first, n, i_m = locate(cu_seqlens, tiles, H, BM, PARTS)
    if SKIP:
        if AHEAD:
            # With a return, or a branch around the loop, ptxas puts the softmax behind the wait for
            # q.k. So these go on without rows, and do what lies before the loop.
            n = tl.where(n <= SKIP, 0, n)
        elif n <= SKIP:
            return
    i_hk = i_h // GROUP
    i_n = tl.arange(0, BN)
    p_k = k + first * stride_kt + i_hk * stride_kh
    p_v = v + first * stride_vt + i_hk * stride_vh
    p_q = q + first * stride_qt + i_h * stride_qh
    p_out = out + first * stride_ot + i_h * stride_oh
    p_lse = lse + i_h * T + first + i_m
    b_q = load_rows(p_q, i_m, n, stride_qt, D, BD, True)
    b_q_tail = None
    if TAIL:
        b_q_tail = load_rows(p_q, i_m, n, stride_qt, D, TAIL, True, BD)
    if ROPE:
        b_q = rotate(b_q, table, first, i_m, n, False).to(b_q.dtype)
        if AHEAD and BD == 64:
            # Triton keeps what was computed in registers, and ptxas then has too few to put the
            # softmax beside q.k; what was loaded lies in shared memory. So q is loaded from its
            # place in out, which no other program touches. (Other heads have registers enough.)
            store_rows(p_out, i_m, n, stride_ot, b_q, D, BD)
            tl.debug_barrier()
            b_q = load_rows(p_out, i_m, n, stride_ot, D, BD, True)

    qk_scale = scale * LOG2_E
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    if TAIL:
        acc_tail = tl.zeros([BM, TAIL], tl.float32)
    last = ((n - 1) // BN) * BN
    i_last = last + i_n
    if AHEAD:
        tl.static_assert(TAIL == 0, "ptxas serializes all wgmma")
        row, head = first.to(tl.int32), i_hk.to(tl.int32)
        b_k = k_blocks.load([row, head, 0]).reshape(BN, BD)
        qk = tl.dot(b_q, b_k.T, input_precision=PRECISION)
        for s in range(0, last, BN):
            b_k = k_blocks.load([row + s + BN, head, 0]).reshape(BN, BD)
            qk_next = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [BM, BN]
            p, peak, total, fade = softmax_step(qk, peak, total, qk_scale)
            acc *= fade[:, None]
            b_v = v_blocks.load([row + s, head, 0]).reshape(BN, BD)
            acc = tl.dot(p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)
            qk = qk_next
        if n > 0:
            # The keys may be rows of the next segment: their columns go here.
            p, peak, total, fade = _last_step(qk, i_last, n, peak, total, qk_scale)
            acc = _add_values(acc, fade, p, p_v, i_last, n, stride_vt, D, BD, True)
            acc *= (1.0 / total)[:, None]
            store_rows(p_out, i_m, n, stride_ot, acc, D, BD)
            _store_lse(p_lse, peak, total, i_m < n)
    else:
        qk = _scores(b_q, b_q_tail, p_k, i_last, n, stride_kt, D, BD, TAIL, True)
        p, peak, total, fade = _last_step(qk, i_last, n, peak, total, qk_scale)
        acc = _add_values(acc, fade, p, p_v, i_last, n, stride_vt, D, BD, True)
        if TAIL:
            acc_tail = _add_values(acc_tail, fade, p, p_v, i_last, n, stride_vt, D, TAIL, True, BD)
        for s in range(0, last, BN):
            qk = _scores(b_q, b_q_tail, p_k, s + i_n, n, stride_kt, D, BD, TAIL, False)
            p, peak, total, fade = softmax_step(qk, peak, total, qk_scale)
            acc = _add_values(acc, fade, p, p_v, s + i_n, n, stride_vt, D, BD, False)
            if TAIL:
                acc_tail = _add_values(
                    acc_tail, fade, p, p_v, s + i_n, n, stride_vt, D, TAIL, False, BD
                )
        acc *= (1.0 / total)[:, None]
        store_rows(p_out, i_m, n, stride_ot, acc, D, BD)
        if TAIL:
            acc_tail *= (1.0 / total)[:, None]
            store_rows(p_out, i_m, n, stride_ot, acc_tail, D, TAIL, BD)
        _store_lse(p_lse, peak, total, i_m < n)


_INTERPRETER = (Tiling(64, 64, 1, 1),)


def select_tilings(arch: str, head_dim: int, dtype: torch.dtype) -> tuple[Tiling, ...]:
    """Tile sizes of the forward for a chip, a head_dim and a dtype, largest first."""
    if arch == "interpreter":
        return _INTERPRETER
    return tile_choices("FORWARD", arch, table_head_dim(head_dim), dtype.itemsize)


def fits_descriptor(x: Tensor) -> bool:
    """Whether TMA can load `x`: everything aligned to 16 bytes, heads inside rows."""
    row, head, column = x.stride()
    nested = column == 1 and 0 < head <= row and row % head == 0
    aligned = not any(size % 16 for size in (x.data_ptr(), row * x.itemsize, head * x.itemsize))
    return nested and aligned


def _can_take(tiling: Tiling, k: Tensor, v: Tensor) -> bool:
    """Whether the order of `tiling` can run on these tensors; "plain" always can."""
    return tiling.order == "plain" or all(map(fits_descriptor, (k, v)))


def forward(
    x: Problem,
    out: Tensor,
    lse: Tensor,
    tilings: Sequence[Tiling] | None = None,
    short_tilings: Sequence[Tiling] | None = None,
) -> None:
    """Write `out` and the contiguous `lse`.

    `tilings` forces the tile sizes; `short_tilings` those of the kernel for short images, which an
    empty list keeps from running.
    """
    if out.numel() == 0:
        return
    row = architecture(x.q.device), x.q.shape[2], x.q.dtype
    with device_guard(x.q):
        x, skip = with_table(as_kernels_read_it(x)), 0
        if x.rope is not None and folds_rope(x.q.dtype, x.q.shape[2]):
            if short_tilings is None:
                short_tilings = select_short_tilings(*row)
            if short_tilings:
                skip = short_tilings[0].step
                forward_short(x, out, lse, short_tilings)
                if x.segments.short.shape[0] == 3 * x.segments.cu_seqlens.shape[0]:
                    return  # every segment is short
            x = replace(x, k=rotated(x.q[:, :0], x.k, *x.rope)[1])
        elif x.rope is not None:
            q, k = rotated(x.q, x.k, *x.rope)
            x = replace(x, q=q, k=k, rope=None)
        if tilings is None:
            tilings = [tiling for tiling in select_tilings(*row) if _can_take(tiling, x.k, x.v)]
        launch("varlen_attention", tilings, partial(_start, x, out, lse, skip))


def _start(x: Problem, out: Tensor, lse: Tensor, skip: int, tiling: Tiling) -> None:
    tiles, parts = tile_list(x.segments, tiling)
    columns = column_blocks(x.q.shape[2])
    k_blocks = v_blocks = None
    if tiling.order == "ahead":
        block = [tiling.step, 1, columns["BD"]]
        k_blocks, v_blocks = (TensorDescriptor.from_tensor(a, block) for a in (x.k, x.v))
    varlen_attention_forward[(tiles.shape[0] * parts * x.q.shape[1],)](
        x.q, x.k, x.v, k_blocks, v_blocks, out, lse, x.segments.cu_seqlens, tiles,
        x.table, x.q.shape[0], x.scale, *strides(x.q, x.k, x.v, out),
        BM=tiling.rows, BN=tiling.step, PARTS=parts, AHEAD=tiling.order == "ahead",
        ROPE=x.rope is not None, SKIP=skip, **columns, **constants(x, tiling),
    )  # fmt: skip
