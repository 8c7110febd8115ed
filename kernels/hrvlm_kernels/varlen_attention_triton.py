"""The forward Triton kernel of varlen_attention and its launcher.

The formula stands in varlen_attention.py. One program takes one head of one tile of queries (a row
of the tile list) and walks over the keys of its segment in blocks, with FlashAttention-2's online
softmax in base 2. For a block of scores s_j = scale * log2(e) * q.k_j:

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

Only the tables choose between them (or `tilings`, in the tests and in benchmarks.tune).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import architecture, device_guard, launch, tile_choices
from .rope_2d_triton import TWO_PI, _cos_sin
from .rope_2d_triton import rope_2d as rotate_heads
from .tilings import Tiling, table_head_dim

LOG2_E = tl.constexpr(1.4426950408889634)
PRECISION = tl.constexpr("ieee")  # of float32 products; those of 16-bit tensors are exact anyway


@triton.jit
def locate(cu_seqlens, tiles, H, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """This program's head, its segment's first row and length, and its rows [BLOCK] in there."""
    i_h, first, n, start = locate_start(cu_seqlens, tiles, H, BLOCK, PARTS)
    return i_h, first, n, start + tl.arange(0, BLOCK)


@triton.jit
def locate_start(cu_seqlens, tiles, H, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """This program's head, its segment's first row and length, and its first row in there.

    The tiles of the list have PARTS * BLOCK rows.
    """
    i_h = (tl.program_id(0) % H).to(tl.int64)
    i_t = tl.program_id(0) // H
    p_tile = tiles + 2 * (i_t // PARTS)
    p_ends = cu_seqlens + tl.load(p_tile)
    first = tl.load(p_ends)
    n = tl.load(p_ends + 1) - first
    block = tl.load(p_tile + 1) * PARTS + i_t % PARTS
    return i_h, first.to(tl.int64), n, block * BLOCK


@triton.jit
def load_rows(p_head, rows, n, stride, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """Rows [B, BD] of one head, zero from row n and column D on; not MASKED: all are below n."""
    i_d = tl.arange(0, BD)
    p_rows = p_head + rows.to(tl.int64)[:, None] * stride + i_d[None, :]
    if MASKED:
        return tl.load(p_rows, mask=(rows < n)[:, None] & (i_d < D)[None, :], other=0.0)
    if BD > D:
        return tl.load(p_rows, mask=(i_d < D)[None, :], other=0.0)
    return tl.load(p_rows)


@triton.jit
def store_rows(p_head, rows, n, stride, x, D: tl.constexpr, BD: tl.constexpr):
    """Store x [B, BD] where rows are below n and columns below D."""
    i_d = tl.arange(0, BD)
    p_rows = p_head + rows.to(tl.int64)[:, None] * stride + i_d[None, :]
    tl.store(p_rows, x.to(p_head.dtype.element_ty), mask=(rows < n)[:, None] & (i_d < D)[None, :])


@triton.jit
def rotate(a, coords, inv_freq, first, rows, n, INVERSE: tl.constexpr):
    """Rotate a [B, D] as rope_2d does, in float32; D is a power of two."""
    HALF: tl.constexpr = a.shape[1] // 2
    QUARTER: tl.constexpr = a.shape[1] // 4
    p_yx = coords + 2 * (first + rows)
    y = tl.load(p_yx, mask=rows < n, other=0.0)
    x = tl.load(p_yx + 1, mask=rows < n, other=0.0)
    i_d = tl.arange(0, HALF)
    freq = tl.load(inv_freq + i_d % QUARTER)
    coord = tl.where((i_d < QUARTER)[None, :], y[:, None], x[:, None])  # [B, HALF]
    cos, sin = _cos_sin((coord * TWO_PI) * freq[None, :])
    if INVERSE:
        sin = -sin
    halves = a.to(tl.float32).reshape(a.shape[0], 2, HALF).permute(0, 2, 1)
    left, right = tl.split(halves)
    out = tl.join(left * cos - right * sin, right * cos + left * sin)  # [B, HALF, 2]
    return out.permute(0, 2, 1).reshape(a.shape)


@triton.jit
def softmax_step(qk, peak, total, acc, qk_scale):
    """One block of the online softmax: p, and peak, total and acc after it."""
    peak_new = tl.maximum(peak, tl.max(qk, 1) * qk_scale)
    p = tl.exp2(qk * qk_scale - peak_new[:, None])
    fade = tl.exp2(peak - peak_new)
    return p, peak_new, total * fade + tl.sum(p, 1), acc * fade[:, None]


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q, k, v, k_blocks, v_blocks, out, lse, cu_seqlens, tiles, coords, inv_freq, T, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PARTS: tl.constexpr, AHEAD: tl.constexpr, ROPE: tl.constexpr,
    SKIP: tl.constexpr,
):  # fmt: skip
    """A tile of out [T, H, D] and lse [H, T]; AHEAD takes k and v as descriptors too.

    Segments of up to SKIP tokens are left to varlen_attention_short_triton.py.
    """
    i_h, first, n, i_m = locate(cu_seqlens, tiles, H, BM, PARTS)
    if SKIP:  # noqa: SIM102  (decided when compiling, the inner one when running)
        if n <= SKIP:
            return
    i_hk = i_h // GROUP
    i_n = tl.arange(0, BN)
    p_k = k + first * stride_kt + i_hk * stride_kh
    p_v = v + first * stride_vt + i_hk * stride_vh
    b_q = load_rows(q + first * stride_qt + i_h * stride_qh, i_m, n, stride_qt, D, BD, True)
    if ROPE:
        b_q = rotate(b_q, coords, inv_freq, first, i_m, n, False).to(b_q.dtype)

    qk_scale = scale * LOG2_E
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    last = ((n - 1) // BN) * BN
    i_last = last + i_n
    if AHEAD:
        row, head = first.to(tl.int32), i_hk.to(tl.int32)
        b_k = k_blocks.load([row, head, 0]).reshape(BN, BD)
        qk = tl.dot(b_q, b_k.T, input_precision=PRECISION)
        for s in range(0, last, BN):
            b_k = k_blocks.load([row + s + BN, head, 0]).reshape(BN, BD)
            qk_next = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [BM, BN]
            p, peak, total, acc = softmax_step(qk, peak, total, acc, qk_scale)
            b_v = v_blocks.load([row + s, head, 0]).reshape(BN, BD)
            acc = tl.dot(p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)
            qk = qk_next
    else:
        b_k = load_rows(p_k, i_last, n, stride_kt, D, BD, True)
        qk = tl.dot(b_q, b_k.T, input_precision=PRECISION)

    # In AHEAD, b_k may hold rows of the next segment: their columns go here.
    qk = tl.where((i_last < n)[None, :], qk, float("-inf"))
    p, peak, total, acc = softmax_step(qk, peak, total, acc, qk_scale)
    b_v = load_rows(p_v, i_last, n, stride_vt, D, BD, True)
    acc = tl.dot(p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)
    if not AHEAD:
        for s in range(0, last, BN):
            b_k = load_rows(p_k, s + i_n, n, stride_kt, D, BD, False)
            qk = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [BM, BN]
            p, peak, total, acc = softmax_step(qk, peak, total, acc, qk_scale)
            b_v = load_rows(p_v, s + i_n, n, stride_vt, D, BD, False)
            acc = tl.dot(p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)

    acc = acc / total[:, None]
    store_rows(out + first * stride_ot + i_h * stride_oh, i_m, n, stride_ot, acc, D, BD)
    tl.store(lse + i_h * T + first + i_m, peak + tl.log2(total), mask=i_m < n)


_INTERPRETER = (Tiling(64, 64, 1, 1),)


def select_tilings(arch: str, head_dim: int, dtype: torch.dtype) -> tuple[Tiling, ...]:
    """Tile sizes of the forward for a chip, a head_dim and a dtype, largest first."""
    if arch == "interpreter":
        return _INTERPRETER
    return tile_choices("FORWARD", arch, table_head_dim(head_dim), dtype.itemsize)


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile in the kernels: a power of two, and the 16 of a tensor core at least."""
    return max(16, triton.next_power_of_2(head_dim))


def rotates_in_kernel(x: Tensor) -> bool:
    """Whether RoPE is folded into the kernels for tensors like `x`; else it is a pass of its own.

    The halves of a head change places in registers, which takes heads that fill the tile; in
    float32 there are too few registers.
    """
    return x.dtype.itemsize == 2 and x.shape[2] == padded_head_dim(x.shape[2])


def rope_tensors(coords: Tensor | None, inv_freq: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Both as the kernels read them, without strides; None where there is no RoPE."""
    if coords is None or inv_freq is None:
        return None
    return coords.contiguous(), inv_freq.contiguous()


def rotated(a: Tensor, b: Tensor, coords: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """`a` and `b` rotated, in new contiguous tensors; their device is the current one."""
    a_out, b_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a, b))
    rotate_heads(a, b, a_out, b_out, coords, inv_freq, False)
    return a_out, b_out


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied only if its last dimension is not dense: the kernels load heads as a whole."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tile_list(tiles_64: Tensor, tiles_128: Tensor, tiling: Tiling) -> tuple[Tensor, int]:
    """The tile list that a kernel walks over, and how many of its own tiles make one of the list.

    Tiles below 64 rows share the list of 64: a few of them may lie past the end of their segment,
    where they load and store nothing.
    """
    return (tiles_128, 1) if tiling.rows == 128 else (tiles_64, 64 // tiling.rows)


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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    tiles_64: Tensor,
    tiles_128: Tensor,
    short_segments: Tensor,
    coords: Tensor | None,
    inv_freq: Tensor | None,
    scale: float,
    tilings: Sequence[Tiling] | None = None,
    short_tilings: Sequence[Tiling] | None = None,
) -> None:
    """Write `out` and the contiguous `lse`.

    `tilings` forces the tile sizes; `short_tilings` those of the kernel for short images, which an
    empty list keeps from running.
    """
    from .varlen_attention_short_triton import forward_short, select_short_tilings

    tokens, heads, head_dim = q.shape
    width = padded_head_dim(head_dim)
    if out.numel() == 0:
        return
    with device_guard(q):
        q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
        rope = rope_tensors(coords, inv_freq)
        folded = rope if rotates_in_kernel(q) else None
        skip = 0
        if folded is not None:
            if short_tilings is None:
                short_tilings = select_short_tilings(architecture(q.device), head_dim, q.dtype)
            if short_tilings:
                skip = short_tilings[0].step
                forward_short(q, k, v, out, lse, short_segments, *folded, scale, short_tilings)
                if short_segments.shape[0] == 3 * cu_seqlens.shape[0]:
                    return  # every segment is short
            _, k = rotated(q[:, :0], k, *folded)
        elif rope is not None:
            q, k = rotated(q, k, *rope)
        if tilings is None:
            tilings = select_tilings(architecture(q.device), head_dim, q.dtype)
            tilings = [tiling for tiling in tilings if _can_take(tiling, k, v)]

        def start(tiling: Tiling) -> None:
            tiles, parts = tile_list(tiles_64, tiles_128, tiling)
            k_blocks = v_blocks = None
            if tiling.order == "ahead":
                block = [tiling.step, 1, width]
                k_blocks, v_blocks = (TensorDescriptor.from_tensor(x, block) for x in (k, v))
            forward_kernel[(tiles.shape[0] * parts * heads,)](
                q, k, v, k_blocks, v_blocks, out, lse, cu_seqlens, tiles, *(folded or (None, None)),
                tokens, scale,
                *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2],
                H=heads, GROUP=heads // k.shape[1], D=head_dim, BD=width, BM=tiling.rows,
                BN=tiling.step, PARTS=parts, AHEAD=tiling.order == "ahead", ROPE=folded is not None,
                SKIP=skip, num_warps=tiling.num_warps, num_stages=tiling.num_stages,
            )  # fmt: skip

        launch("varlen_attention", tilings, start)
