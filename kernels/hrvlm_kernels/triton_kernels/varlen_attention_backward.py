"""The backward Triton kernels of varlen_attention and their launcher.

With p = softmax(scale q k^T), recomputed as 2^(s - lse) in base 2, and g the gradient of out = p v:

    delta_i = g_i . out_i                   dv_j = sum_i p_ij g_i
    ds_ij   = p_ij (g_i . v_j - delta_i)    dk_j = scale sum_i ds_ij q_i
                                            dq_i = scale sum_j ds_ij k_j

The kernel of dq owns a tile of queries and walks over keys; it also writes delta. That of dk and
dv, which runs after it, owns a tile of keys and walks over queries. Every output is added up by one
program in a fixed order: equal inputs give equal bits. That takes seven products for the five of
one kernel that adds up dq by atomics, which gains nothing (docs/tuning.md).

As in the forward, the block with masked rows comes before the loop (with the block last, ptxas
serializes all wgmma), and rows of the next segment are never loaded. Rows are tuples of one block
of columns or, in heads of 72 to 96, of two: BD and TAIL columns, each with products of its own.
Where several heads of q share one of k, each head writes its part of dk and dv, and the parts are
added afterwards: a loop over heads around the loop over queries spills, and Triton 3.6 makes an
empty kernel of it for sm_100.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_problem import Problem, folds_rope
from .attention_tiles import (
    LOG2_E,
    add_product,
    as_kernels_read_it,
    column_blocks,
    constants,
    load_columns,
    locate,
    rotate,
    rotated,
    scores,
    store_columns,
    strides,
    tile_list,
    unit_stride,
    with_table,
    zero_columns,
)
from .bound import bound
from .launch import architecture, device_guard, launch, tile_choices
from .rope_2d import rotate_heads
from .tilings import Tiling, table_head_dim


@triton.jit
def _unrotated(acc, scale, table, first, rows, n, TAIL: tl.constexpr, ROPE: tl.constexpr):
    a = acc[0] * scale
    if ROPE:
        a = rotate(a, table, first, rows, n, True)
    if TAIL:
        return a, acc[1] * scale
    else:
        return (a,)


@triton.jit
def _dq_step(
    dq, b_q, b_g, lse, delta, p_k, p_v, i_n, n, stride_kt, stride_vt, qk_scale,
    D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    b_k = load_columns(p_k, i_n, n, stride_kt, D, BD, TAIL, MASKED)
    b_v = load_columns(p_v, i_n, n, stride_vt, D, BD, TAIL, MASKED)
    qk = scores(b_q, b_k, TAIL)  # [BM, BN]
    p = tl.exp2(qk * qk_scale - lse[:, None])
    if MASKED:
        p = tl.where((i_n < n)[None, :], p, 0.0)
    dp = scores(b_g, b_v, TAIL)
    ds = p * (dp - delta[:, None])
    return add_product(dq, ds.to(p_k.dtype.element_ty), b_k, TAIL)


@bound
@triton.jit(do_not_specialize=["T"])
def varlen_attention_dq(
    q, k, v, out, g, dq, lse, delta, cu_seqlens, tiles, table, T, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_gt, stride_gh, stride_dqt, stride_dqh,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """A tile of delta [H, T] and dq [T, H, D]; with ROPE, dq of q before its rotation."""
    i_h, first, n, i_m = locate(cu_seqlens, tiles, H, BM, PARTS)
    i_hk = i_h // GROUP
    p_row = i_h * T + first + i_m
    b_g = load_columns(
        g + first * stride_gt + i_h * stride_gh, i_m, n, stride_gt, D, BD, TAIL, True
    )
    b_o = load_columns(
        out + first * stride_ot + i_h * stride_oh, i_m, n, stride_ot, D, BD, TAIL, True
    )
    b_delta = tl.sum(b_o[0].to(tl.float32) * b_g[0].to(tl.float32), 1)
    if TAIL:
        b_delta += tl.sum(b_o[1].to(tl.float32) * b_g[1].to(tl.float32), 1)
    tl.store(delta + p_row, b_delta, mask=i_m < n)
    b_q = load_columns(
        q + first * stride_qt + i_h * stride_qh, i_m, n, stride_qt, D, BD, TAIL, True
    )
    b_lse = tl.load(lse + p_row, mask=i_m < n, other=0.0)
    p_k = k + first * stride_kt + i_hk * stride_kh
    p_v = v + first * stride_vt + i_hk * stride_vh
    i_n = tl.arange(0, BN)
    last = ((n - 1) // BN) * BN
    acc = zero_columns(BM, BD, TAIL)
    acc = _dq_step(
        acc, b_q, b_g, b_lse, b_delta, p_k, p_v, last + i_n, n, stride_kt, stride_vt,
        scale * LOG2_E, D, BD, TAIL, True,
    )  # fmt: skip
    for s in range(0, last, BN):
        acc = _dq_step(
            acc, b_q, b_g, b_lse, b_delta, p_k, p_v, s + i_n, n, stride_kt, stride_vt,
            scale * LOG2_E, D, BD, TAIL, False,
        )  # fmt: skip
    acc = _unrotated(acc, scale, table, first, i_m, n, TAIL, ROPE)
    store_columns(dq + first * stride_dqt + i_h * stride_dqh, i_m, n, stride_dqt, acc, D, BD, TAIL)


@triton.jit
def _dkdv_step(
    dk, dv, b_k, b_v, p_q, p_g, p_lse, p_delta, i_m, n, stride_qt, stride_gt, qk_scale,
    D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    b_q = load_columns(p_q, i_m, n, stride_qt, D, BD, TAIL, MASKED)
    b_g = load_columns(p_g, i_m, n, stride_gt, D, BD, TAIL, MASKED)
    if MASKED:  # queries past the end: q = g = delta = 0, so that they add nothing
        lse = tl.load(p_lse + i_m, mask=i_m < n, other=0.0)
        delta = tl.load(p_delta + i_m, mask=i_m < n, other=0.0)
    else:
        lse, delta = tl.load(p_lse + i_m), tl.load(p_delta + i_m)
    qk = scores(b_k, b_q, TAIL)  # [BN, BM]
    p = tl.exp2(qk * qk_scale - lse[None, :])
    dp = scores(b_v, b_g, TAIL)
    dv = add_product(dv, p.to(p_g.dtype.element_ty), b_g, TAIL)
    ds = p * (dp - delta[None, :])
    return add_product(dk, ds.to(p_q.dtype.element_ty), b_q, TAIL), dv


@bound
@triton.jit(do_not_specialize=["T"])
def varlen_attention_dkdv(
    q, k, v, g, dk, dv, lse, delta, cu_seqlens, tiles, table, T, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh,
    stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """A tile of dk and dv [T, H, D], as far as head i_h of q goes; with ROPE, dk as of dq."""
    i_h, first, n, i_n = locate(cu_seqlens, tiles, H, BN, PARTS)
    i_hk = i_h // GROUP
    b_k = load_columns(
        k + first * stride_kt + i_hk * stride_kh, i_n, n, stride_kt, D, BD, TAIL, True
    )
    b_v = load_columns(
        v + first * stride_vt + i_hk * stride_vh, i_n, n, stride_vt, D, BD, TAIL, True
    )
    p_q = q + first * stride_qt + i_h * stride_qh
    p_g = g + first * stride_gt + i_h * stride_gh
    p_lse = lse + i_h * T + first
    p_delta = delta + i_h * T + first
    i_m = tl.arange(0, BM)
    last = ((n - 1) // BM) * BM
    b_dk, b_dv = zero_columns(BN, BD, TAIL), zero_columns(BN, BD, TAIL)
    b_dk, b_dv = _dkdv_step(
        b_dk, b_dv, b_k, b_v, p_q, p_g, p_lse, p_delta, last + i_m, n,
        stride_qt, stride_gt, scale * LOG2_E, D, BD, TAIL, True,
    )  # fmt: skip
    for s in range(0, last, BM):
        b_dk, b_dv = _dkdv_step(
            b_dk, b_dv, b_k, b_v, p_q, p_g, p_lse, p_delta, s + i_m, n,
            stride_qt, stride_gt, scale * LOG2_E, D, BD, TAIL, False,
        )  # fmt: skip
    store_columns(dv + first * stride_dvt + i_h * stride_dvh, i_n, n, stride_dvt, b_dv, D, BD, TAIL)
    b_dk = _unrotated(b_dk, scale, table, first, i_n, n, TAIL, ROPE)
    store_columns(dk + first * stride_dkt + i_h * stride_dkh, i_n, n, stride_dkt, b_dk, D, BD, TAIL)


_INTERPRETER = (Tiling(64, 64, 1, 1),)


@dataclass(frozen=True)
class BackwardTilings:
    """Tile sizes of the kernels of a backward, each largest first."""

    dq: tuple[Tiling, ...]
    dkdv: tuple[Tiling, ...]


def select_tilings(arch: str, head_dim: int, dtype: torch.dtype) -> BackwardTilings:
    """Tile sizes for a chip, a head_dim and a dtype."""
    if arch == "interpreter":
        return BackwardTilings(_INTERPRETER, _INTERPRETER)
    row = arch, table_head_dim(head_dim), dtype.itemsize
    return BackwardTilings(*(tile_choices(table, *row) for table in ("DQ", "DKDV")))


@dataclass(frozen=True)
class _Inputs(Problem):
    """What both kernels read; `rope` only where it is folded into them."""

    g: Tensor
    out: Tensor
    lse: Tensor
    delta: Tensor


def _start_dq(x: _Inputs, dq: Tensor, tiling: Tiling) -> None:
    tiles, parts = tile_list(x.segments, tiling)
    varlen_attention_dq[(tiles.shape[0] * parts * x.q.shape[1],)](
        x.q, x.k, x.v, x.out, x.g, dq, x.lse, x.delta, x.segments.cu_seqlens, tiles,
        x.table, x.q.shape[0], x.scale, *strides(x.q, x.k, x.v, x.out, x.g, dq),
        BM=tiling.rows, BN=tiling.step, PARTS=parts,
        ROPE=x.rope is not None, **column_blocks(x.q.shape[2]), **constants(x, tiling),
    )  # fmt: skip


def _start_dkdv(x: _Inputs, dk: Tensor, dv: Tensor, tiling: Tiling) -> None:
    tiles, parts = tile_list(x.segments, tiling)
    varlen_attention_dkdv[(tiles.shape[0] * parts * x.q.shape[1],)](
        x.q, x.k, x.v, x.g, dk, dv, x.lse, x.delta, x.segments.cu_seqlens, tiles,
        x.table, x.q.shape[0], x.scale, *strides(x.q, x.k, x.v, x.g, dk, dv),
        BM=tiling.step, BN=tiling.rows, PARTS=parts,
        ROPE=x.rope is not None, **column_blocks(x.q.shape[2]), **constants(x, tiling),
    )  # fmt: skip


def backward(
    x: Problem,
    g: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    tilings: BackwardTilings | None = None,
    *,
    is_rotated: bool = False,
) -> None:
    """Write `dq`, `dk` and `dv`; `tilings` forces the tile sizes.

    With `is_rotated` q and k come rotated; their gradients are those of before.
    """
    if x.q.numel() == 0:
        return
    if tilings is None:
        tilings = select_tilings(architecture(x.q.device), x.q.shape[2], x.q.dtype)
    with device_guard(x.q):
        x = with_table(as_kernels_read_it(x))
        rope, folded = x.rope, folds_rope(x.q.dtype, x.q.shape[2])
        if rope is not None:
            q, k = (x.q, x.k) if is_rotated else rotated(x.q, x.k, *rope)
            x = replace(x, q=q, k=k, rope=rope if folded else None)
        g, out = unit_stride(g), unit_stride(out)
        inputs = _Inputs(**vars(x), g=g, out=out, lse=lse, delta=torch.empty_like(lse))
        grouped = x.k.shape[1] < x.q.shape[1]
        parts = (_float32_like(x.q), _float32_like(x.q)) if grouped else (dk, dv)

        launch("varlen_attention dq", tilings.dq, partial(_start_dq, inputs, dq))
        launch("varlen_attention dk, dv", tilings.dkdv, partial(_start_dkdv, inputs, *parts))
        if grouped:
            for total, part in zip((dk, dv), parts, strict=True):
                total.copy_(part.unflatten(1, (x.k.shape[1], -1)).sum(2))
        if rope is not None and not folded:
            rotate_heads(dq, dk, *rope, True, dq, dk)


def backward_of_rotated(x: Problem, g: Tensor, out: Tensor, lse: Tensor, dqkv: Tensor) -> None:
    """Write the gradients of q, k and v side by side, ``[T, 3, H, D]``, given q and k rotated."""
    dq, dk, dv = dqkv.unbind(1)
    backward(x, g, out, lse, dq, dk, dv, is_rotated=True)


def _float32_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)
