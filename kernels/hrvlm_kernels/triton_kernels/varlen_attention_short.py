"""The forward Triton kernel of varlen_attention for short images with RoPE.

One program takes one head of one image whose keys all fit one tile: it loads and rotates k once,
loads v once, and walks over tiles of queries with a plain softmax, since no score is missing. k
needs no pass of its own, which would read and write it once more: where images are short, memory is
what the attention waits for.

An image's length alone decides whether it goes here, whatever it is packed with: a pack with short
and long images takes two kernels, each of which leaves the other's segments alone. The backward is
that of all images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_problem import Problem
from .attention_tiles import LOG2_E, PRECISION, constants, load_rows, rotate, store_rows, strides
from .bound import bound
from .launch import launch, tile_choices
from .tilings import Tiling, table_head_dim

_INTERPRETER = (Tiling(64, 256, 1, 1),)


@bound
@triton.jit(do_not_specialize=["T"])
def varlen_attention_short(
    q, k, v, out, lse, segments, table, T, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One head of out [T, H, D] and lse [H, T] for one segment of at most BN tokens."""
    i_h = (tl.program_id(0) % H).to(tl.int64)
    i_hk = i_h // GROUP
    p_segment = segments + 3 * (tl.program_id(0) // H)
    first = tl.load(p_segment).to(tl.int64)
    n = tl.load(p_segment + 1)
    i_n = tl.arange(0, BN)
    b_k = load_rows(k + first * stride_kt + i_hk * stride_kh, i_n, n, stride_kt, D, D, True)
    b_k = rotate(b_k, table, first, i_n, n, False).to(b_k.dtype)
    b_v = load_rows(v + first * stride_vt + i_hk * stride_vh, i_n, n, stride_vt, D, D, True)
    p_q = q + first * stride_qt + i_h * stride_qh
    for s in range(0, n, BM):
        i_m = s + tl.arange(0, BM)
        b_q = load_rows(p_q, i_m, n, stride_qt, D, D, True)
        b_q = rotate(b_q, table, first, i_m, n, False).to(b_q.dtype)
        qk = tl.dot(b_q, b_k.T, input_precision=PRECISION) * (scale * LOG2_E)  # [BM, BN]
        qk = tl.where((i_n < n)[None, :], qk, float("-inf"))
        peak = tl.max(qk, 1)
        p = tl.exp2(qk - peak[:, None])
        total = tl.sum(p, 1)
        acc = tl.dot(p.to(b_v.dtype), b_v, input_precision=PRECISION) * (1.0 / total)[:, None]
        store_rows(out + first * stride_ot + i_h * stride_oh, i_m, n, stride_ot, acc, D, D)
        tl.store(lse + i_h * T + first + i_m, peak + tl.log2(total), mask=i_m < n)


def select_short_tilings(arch: str, head_dim: int, dtype: torch.dtype) -> tuple[Tiling, ...]:
    """Tile sizes for a chip, a head_dim and a dtype; none where k is rotated in a pass."""
    if arch == "interpreter":
        return _INTERPRETER if dtype.itemsize == 2 else ()
    return tile_choices("SHORT", arch, table_head_dim(head_dim), dtype.itemsize)


def forward_short(x: Problem, out: Tensor, lse: Tensor, tilings: Sequence[Tiling]) -> None:
    """Write `out` and `lse` of the short segments, given a problem with a table of RoPE.

    The current device must be that of the tensors.
    """
    segments = x.segments.short
    programs = (segments.shape[0] // 3 - 1) * x.q.shape[1]
    if not programs:
        return

    def start(tiling: Tiling) -> None:
        varlen_attention_short[(programs,)](
            x.q, x.k, x.v, out, lse, segments, x.table, x.q.shape[0], x.scale,
            *strides(x.q, x.k, x.v, out),
            BM=tiling.rows, BN=tiling.step, **constants(x, tiling),
        )  # fmt: skip

    launch("varlen_attention of short images", tilings, start)
