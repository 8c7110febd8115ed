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
    ahead  q.k is a block ahead of p v: p v of a block runs beside the softmax of the next one. The
           masked block last. K and V come by tensor descriptors (TMA): with pointers the
           registers do not suffice

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
    add_product,
    as_kernels_read_it,
    column_blocks,
    constants,
    load_columns,
    load_rows,
    locate,
    rotate,
    rotated,
    scaled_columns,
    scores,
    softmax_step,
    store_columns,
    strides,
    tile_list,
    with_table,
    zero_columns,
)
from .bound import bound
from .launch import architecture, device_guard, launch, tile_choices
from .tilings import Tiling, table_head_dim
from .varlen_attention_short import forward_short, select_short_tilings


@triton.jit
def _scores(
    b_q, p_k, i_n, n, stride_kt,
    D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """q.k [BM, BN] of a block of keys. With all columns loaded at once, D = 72 spills on sm_80."""
    b_k = load_rows(p_k, i_n, n, stride_kt, D, BD, MASKED)
    qk = tl.dot(b_q[0], b_k.T, input_precision=PRECISION)
    if TAIL:
        b_k = load_rows(p_k, i_n, n, stride_kt, D, TAIL, MASKED, BD)
        qk = tl.dot(b_q[1], b_k.T, qk, input_precision=PRECISION)
    return qk


@triton.jit
def _add_values(
    acc, fade, p, p_v, i_n, n, stride_vt,
    D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Acc, faded, plus p v."""
    acc = scaled_columns(acc, fade, TAIL)
    b_v = load_columns(p_v, i_n, n, stride_vt, D, BD, TAIL, MASKED)
    return add_product(acc, p.to(b_v[0].dtype), b_v, TAIL)


@triton.jit
def _last_step(qk, i_n, n, peak, total, qk_scale):
    """Of the softmax, without the keys past the segment's end."""
    qk = tl.where((i_n < n)[None, :], qk, float("-inf"))
    return softmax_step(qk, peak, total, qk_scale)


@triton.jit
def _store_rotated(
    p_in, p_out, table, first, rows, n, stride_in, stride_out, D: tl.constexpr,
):  # fmt: skip
    """Store the rows of p_in rotated as by `rotate`, a few columns at a time.

    They take few registers, and none is exchanged between threads.
    """
    HALF: tl.constexpr = D // 2
    STEP: tl.constexpr = min(HALF, 32)
    i_d = tl.arange(0, STEP)
    mask = (rows < n)[:, None]
    p_cos = table + (first + rows)[:, None] * D + i_d[None, :]
    p_in += rows.to(tl.int64)[:, None] * stride_in + i_d[None, :]
    p_out += rows.to(tl.int64)[:, None] * stride_out + i_d[None, :]
    for i in tl.static_range(0, HALF, STEP):
        left = tl.load(p_in + i, mask=mask, other=0.0).to(tl.float32)  # [B, STEP]
        right = tl.load(p_in + i + HALF, mask=mask, other=0.0).to(tl.float32)
        cos = tl.load(p_cos + i, mask=mask, other=1.0)
        sin = tl.load(p_cos + i + HALF, mask=mask, other=0.0)
        kind = p_out.dtype.element_ty
        tl.store(p_out + i, (left * cos - right * sin).to(kind), mask=mask)
        tl.store(p_out + i + HALF, (right * cos + left * sin).to(kind), mask=mask)


@triton.jit
def _bits(p, v):
    """P in v's dtype, as integers: a product's operand that a loop carries goes to shared memory.

    What is computed from them does not.
    """
    p = p.to(v.dtype.element_ty)
    return p.to(tl.core.get_int_dtype(p.dtype.primitive_bitwidth, True), bitcast=True)


@triton.jit
def _load_block(
    blocks, tails, row, head, BN: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Rows of a head as `load_columns` gives them, by TMA: those of the next segment too."""
    b = blocks.load([row, head, 0]).reshape(BN, BD)
    if TAIL:
        return b, tails.load([row, head, BD]).reshape(BN, TAIL)
    else:
        return (b,)


@triton.jit
def _products(
    b_q, p, acc, k_blocks, k_tails, v_blocks, v_tails, row, head,
    BN: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """q.k [BM, BN] of the keys from `row` on, and acc plus p v of the block before them.

    The last product, which what follows runs beside, is p v of the first BD columns.
    """
    qk = scores(b_q, _load_block(k_blocks, k_tails, row, head, BN, BD, TAIL), TAIL)
    b_v = _load_block(v_blocks, v_tails, row - BN, head, BN, BD, TAIL)
    p = p.to(b_v[0].dtype, bitcast=True)
    if TAIL:
        tail = tl.dot(p, b_v[1], acc[1], input_precision=PRECISION)
        return qk, (tl.dot(p, b_v[0], acc[0], input_precision=PRECISION), tail)
    else:
        return qk, (tl.dot(p, b_v[0], acc[0], input_precision=PRECISION),)


@triton.jit
def _store_lse(p_lse, peak, total, mask):
    tl.store(p_lse, peak + tl.log2(total), mask=mask)


@bound
@triton.jit(do_not_specialize=["T"])
def varlen_attention_forward(
    q, k, v, k_blocks, k_tails, v_blocks, v_tails, out, lse, cu_seqlens, tiles, table, T, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, AHEAD: tl.constexpr,
    ROPE: tl.constexpr, SKIP: tl.constexpr, VIA_OUT: tl.constexpr,
):  # fmt: skip
    """A tile of out [T, H, D] and lse [H, T]; AHEAD takes k and v as descriptors too.

    Heads have BD columns, and TAIL more if that is not 0, which have products of their own.
    Segments of up to SKIP tokens are left to varlen_attention_short.py. VIA_OUT: the rotated q lies
    where the result will be, which no other program touches, until it is loaded.
    """
    i_h, first, n, i_m = locate(cu_seqlens, tiles, H, BM, PARTS)
    if SKIP and n <= SKIP:
        return
    i_hk = i_h // GROUP
    i_n = tl.arange(0, BN)
    p_k = k + first * stride_kt + i_hk * stride_kh
    p_v = v + first * stride_vt + i_hk * stride_vh
    p_q = q + first * stride_qt + i_h * stride_qh
    p_out = out + first * stride_ot + i_h * stride_oh
    p_lse = lse + i_h * T + first + i_m
    if ROPE and VIA_OUT:
        _store_rotated(p_q, p_out, table, first, i_m, n, stride_qt, stride_ot, D)
        tl.debug_barrier()
        # By other sums than the result is stored with: ptxas would keep all addresses until then.
        p_rotated = out + i_h * stride_oh
        b_q = load_columns(p_rotated, first + i_m, first + n, stride_ot, D, BD, TAIL, True)
    else:
        b_q = load_columns(p_q, i_m, n, stride_qt, D, BD, TAIL, True)
        if ROPE:
            b_q = (rotate(b_q[0], table, first, i_m, n, False).to(b_q[0].dtype),)

    qk_scale = scale * LOG2_E
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = zero_columns(BM, BD, TAIL)
    last = ((n - 1) // BN) * BN
    i_last = last + i_n
    if AHEAD:
        row, head = first.to(tl.int32), i_hk.to(tl.int32)
        b_k = _load_block(k_blocks, k_tails, row, head, BN, BD, TAIL)
        p, peak, total, _ = _last_step(scores(b_q, b_k, TAIL), i_n, n, peak, total, qk_scale)
        p = _bits(p, v)
        for s in range(BN, last, BN):
            qk, acc = _products(
                b_q, p, acc, k_blocks, k_tails, v_blocks, v_tails, row + s, head, BN, BD, TAIL
            )
            p, peak, total, fade = softmax_step(qk, peak, total, qk_scale)
            p = _bits(p, v)
            acc = scaled_columns(acc, fade, TAIL)
        if last > 0:
            # The keys may be rows of the next segment: their columns go here.
            qk, acc = _products(
                b_q, p, acc, k_blocks, k_tails, v_blocks, v_tails, row + last, head, BN, BD, TAIL
            )
            p, peak, total, fade = _last_step(qk, i_last, n, peak, total, qk_scale)
            p = _bits(p, v)
            acc = scaled_columns(acc, fade, TAIL)
        b_v = load_columns(p_v, i_last, n, stride_vt, D, BD, TAIL, True)
        acc = add_product(acc, p.to(b_v[0].dtype, bitcast=True), b_v, TAIL)
    else:
        qk = _scores(b_q, p_k, i_last, n, stride_kt, D, BD, TAIL, True)
        p, peak, total, fade = _last_step(qk, i_last, n, peak, total, qk_scale)
        acc = _add_values(acc, fade, p, p_v, i_last, n, stride_vt, D, BD, TAIL, True)
        for s in range(0, last, BN):
            qk = _scores(b_q, p_k, s + i_n, n, stride_kt, D, BD, TAIL, False)
            p, peak, total, fade = softmax_step(qk, peak, total, qk_scale)
            acc = _add_values(acc, fade, p, p_v, s + i_n, n, stride_vt, D, BD, TAIL, False)
    acc = scaled_columns(acc, 1.0 / total, TAIL)
    store_columns(p_out, i_m, n, stride_ot, acc, D, BD, TAIL)
    _store_lse(p_lse, peak, total, i_m < n)


_INTERPRETER = (Tiling(64, 64, 1, 1),)


def select_tilings(arch: str, head_dim: int, dtype: torch.dtype) -> tuple[Tiling, ...]:
    """Tile sizes of the forward for a chip, a head_dim and a dtype, largest first."""
    if arch == "interpreter":
        return _INTERPRETER
    return tile_choices("FORWARD", arch, table_head_dim(head_dim), dtype.itemsize)


def rotates_via_out(head_dim: int, tiling: Tiling) -> bool:
    """Whether a program keeps its rotated q where its result will be: registers are too few."""
    plain = tiling.order == "plain"
    return plain and head_dim == 128 and tiling.rows == 32 * tiling.num_warps


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
    blocks: list[TensorDescriptor | None] = [None] * 4
    if tiling.order == "ahead":
        blocks = [
            TensorDescriptor.from_tensor(a, [tiling.step, 1, width]) if width else None
            for a in (x.k, x.v)
            for width in (columns["BD"], columns["TAIL"])
        ]
    varlen_attention_forward[(tiles.shape[0] * parts * x.q.shape[1],)](
        x.q, x.k, x.v, *blocks, out, lse, x.segments.cu_seqlens, tiles,
        x.table, x.q.shape[0], x.scale, *strides(x.q, x.k, x.v, out),
        BM=tiling.rows, BN=tiling.step, PARTS=parts, AHEAD=tiling.order == "ahead",
        ROPE=x.rope is not None, SKIP=skip,
        VIA_OUT=rotates_via_out(x.q.shape[2], tiling), **columns, **constants(x, tiling),
    )  # fmt: skip
