"""What the attention kernels and their launchers share: rows in and out, RoPE, the softmax.

No attention kernel imports another one; what two of them need is here.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_problem import Problem, folds_rope
from ..packed_tables import Segments
from .launch import next_power_of_2
from .rope_2d import rotate_heads, write_table
from .tilings import Tiling

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
def load_rows(
    p_head, rows, n, stride, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr,
    FIRST: tl.constexpr = 0,
):  # fmt: skip
    """Rows [B, BD] of one head from column FIRST on, zero from row n and column D on.

    Not MASKED: all are below n.
    """
    i_d = tl.arange(FIRST, FIRST + BD)
    p_rows = p_head + rows.to(tl.int64)[:, None] * stride + i_d[None, :]
    if MASKED:
        return tl.load(p_rows, mask=(rows < n)[:, None] & (i_d < D)[None, :], other=0.0)
    if FIRST + BD > D:
        return tl.load(p_rows, mask=(i_d < D)[None, :], other=0.0)
    return tl.load(p_rows)


@triton.jit
def store_rows(
    p_head, rows, n, stride, x, D: tl.constexpr, BD: tl.constexpr, FIRST: tl.constexpr = 0
):
    """Store x [B, BD] from column FIRST on, where rows are below n and columns below D."""
    i_d = tl.arange(FIRST, FIRST + BD)
    p_rows = p_head + rows.to(tl.int64)[:, None] * stride + i_d[None, :]
    tl.store(p_rows, x.to(p_head.dtype.element_ty), mask=(rows < n)[:, None] & (i_d < D)[None, :])


@triton.jit
def load_columns(
    p_head, rows, n, stride,
    D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows of one head as a tuple of its blocks of columns [B, BD], and [B, TAIL] if that is not 0.

    Each has products of its own.
    """
    b = load_rows(p_head, rows, n, stride, D, BD, MASKED)
    if TAIL:
        return b, load_rows(p_head, rows, n, stride, D, TAIL, MASKED, BD)
    else:
        return (b,)


@triton.jit
def zero_columns(B: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr):
    """Sums [B, BD], [B, TAIL] of products, at their beginning."""
    acc = tl.zeros([B, BD], tl.float32)
    if TAIL:
        return acc, tl.zeros([B, TAIL], tl.float32)
    else:
        return (acc,)


@triton.jit
def scores(a, b, TAIL: tl.constexpr):
    """The products of all rows of a with all of b, in float32."""
    s = tl.dot(a[0], b[0].T, input_precision=PRECISION)
    if TAIL:
        s = tl.dot(a[1], b[1].T, s, input_precision=PRECISION)
    return s


@triton.jit
def add_product(acc, s, b, TAIL: tl.constexpr):
    """Acc plus s b."""
    first = tl.dot(s, b[0], acc[0], input_precision=PRECISION)
    if TAIL:
        return first, tl.dot(s, b[1], acc[1], input_precision=PRECISION)
    else:
        return (first,)


@triton.jit
def scaled_columns(acc, scale, TAIL: tl.constexpr):
    """Each row of acc times its element of scale [B]."""
    if TAIL:
        return acc[0] * scale[:, None], acc[1] * scale[:, None]
    else:
        return (acc[0] * scale[:, None],)


@triton.jit
def store_columns(
    p_head, rows, n, stride, acc, D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr
):
    """What `store_rows` does, of each block of columns."""
    store_rows(p_head, rows, n, stride, acc[0], D, BD)
    if TAIL:
        store_rows(p_head, rows, n, stride, acc[1], D, TAIL, BD)


@triton.jit
def rotate(a, table, first, rows, n, INVERSE: tl.constexpr):
    """Rotate a [B, D] by the table of cos and sin, in float32; D is a power of two."""
    HALF: tl.constexpr = a.shape[1] // 2
    p_cos = table + (first + rows)[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    mask = (rows < n)[:, None]
    cos = tl.load(p_cos, mask=mask, other=1.0)  # [B, HALF]
    sin = tl.load(p_cos + HALF, mask=mask, other=0.0)
    if INVERSE:
        sin = -sin
    halves = a.to(tl.float32).reshape(a.shape[0], 2, HALF).permute(0, 2, 1)
    left, right = tl.split(halves)
    out = tl.join(left * cos - right * sin, right * cos + left * sin)  # [B, HALF, 2]
    return out.permute(0, 2, 1).reshape(a.shape)


@triton.jit
def softmax_step(qk, peak, total, qk_scale):
    """One block of the online softmax: p, peak and total after it, and what acc fades by."""
    peak_new = tl.maximum(peak, tl.max(qk, 1) * qk_scale)
    p = tl.exp2(qk * qk_scale - peak_new[:, None])
    fade = tl.exp2(peak - peak_new)
    return p, peak_new, total * fade + tl.sum(p, 1), fade


def column_blocks(head_dim: int) -> dict[str, int]:
    """The constants of kernels that cut a head into BD columns and a TAIL, 0 where BD are enough.

    A tile has a power of two of columns, the 16 of a tensor core at least. Heads of 72 and 80 would
    be 128 wide, 1.78 and 1.6 times the useful work; in 64 + 16 columns it is 1.11 times and 1.
    """
    for tail in (16, 32):
        if 64 < head_dim <= 64 + tail:
            return {"BD": 64, "TAIL": tail}
    return {"BD": max(16, next_power_of_2(head_dim)), "TAIL": 0}


def rotated(a: Tensor, b: Tensor, coords: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """`a` and `b` rotated, in new contiguous tensors; their device is the current one."""
    a_out, b_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a, b))
    rotate_heads(a, b, coords, inv_freq, False, a_out, b_out)
    return a_out, b_out


def with_table(problem: Problem) -> Problem:
    """`problem` with the table of cos and sin that folded kernels read; written unless it is there.

    The current device must be that of the tensors.
    """
    if (
        problem.rope is None
        or problem.table is not None
        or not folds_rope(problem.q.dtype, problem.q.shape[2])
    ):
        return problem
    tokens, _, head_dim = problem.q.shape
    table = torch.empty(tokens, head_dim, dtype=torch.float32, device=problem.q.device)
    write_table(*problem.rope, table)
    return replace(problem, table=table)


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied only if its last dimension is not dense: the kernels load heads as a whole."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_kernels_read_it(problem: Problem) -> Problem:
    """`problem` with heads, positions and frequencies that are dense, copied only if they must."""
    q, k, v = (unit_stride(a) for a in (problem.q, problem.k, problem.v))
    rope = problem.rope and (problem.rope[0].contiguous(), problem.rope[1].contiguous())
    return replace(problem, q=q, k=k, v=v, rope=rope)


def tile_list(segments: Segments, tiling: Tiling) -> tuple[Tensor, int]:
    """The tile list that a kernel walks over, and how many of its own tiles make one of the list.

    Tiles below 64 rows share the list of 64: a few of them may lie past the end of their segment,
    where they load and store nothing.
    """
    if tiling.rows == 128:
        return segments.tiles_128, 1
    return segments.tiles_64, 64 // tiling.rows


def strides(*tensors: Tensor) -> list[int]:
    """Of the tokens and heads of each."""
    return [step for a in tensors for step in a.stride()[:2]]


def constants(problem: Problem, tiling: Tiling) -> dict[str, int]:
    """The arguments that all kernels of attention have."""
    heads, head_dim = problem.q.shape[1:]
    return {
        "H": heads,
        "GROUP": heads // problem.k.shape[1],
        "D": head_dim,
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
    }
