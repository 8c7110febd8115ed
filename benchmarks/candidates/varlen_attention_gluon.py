"""A forward kernel of varlen_attention in Gluon, Triton's lower level; for Hopper.

Two groups of four warps compute 64 queries each, and a single warp loads: Q once, then K and V
block by block (TMA) into a ring of NB buffers. For each buffer there are two barriers: `full` is
passed when the load has arrived, `empty` when both groups are done with it. A group issues q.k of
the next block, then does the softmax of this one while the tensor cores work (the order "ahead"),
and only the last block is masked.

Timed beside the shipped forward by ``python -m pytest benchmarks/bench_varlen_attention.py``. Its
compiled code is right when executed on a CPU; on a GPU it has not run yet, and Gluon has no
interpreter. q and k have to be rotated before, and D is 64 or 128.
"""

from __future__ import annotations

import contextvars

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from benchmarks.attention_peers import Attention
from benchmarks.case import Unavailable
from hrvlm_kernels import PackedGrids
from hrvlm_kernels.triton_kernels.launch import device_guard
from hrvlm_kernels.triton_kernels.varlen_attention import fits_descriptor

GROUPS = 2  # of four warps that compute, 64 rows each: a tile of the list of 128
REGISTERS = 240  # of a thread that computes; one that loads has 24
ROWS = gl.constexpr(64)
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _load(q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty,
          start, blocks, GROUPS: gl.constexpr, NB: gl.constexpr, BN: gl.constexpr):  # fmt: skip
    for c in gl.static_range(GROUPS):
        mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            q_desc, [start + c * ROWS, 0], q_full.index(c), q_smem.index(c)
        )
    for i in range(blocks):
        s = i % NB
        phase = (i // NB) & 1
        mbarrier.wait(k_empty.index(s), phase ^ 1)
        mbarrier.expect(k_full.index(s), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [i * BN, 0], k_full.index(s), k_smem.index(s))
        mbarrier.wait(v_empty.index(s), phase ^ 1)
        mbarrier.expect(v_full.index(s), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, [i * BN, 0], v_full.index(s), v_smem.index(s))


@gluon.jit
def _softmax_step(qk, peak, total, acc, qk_scale, ACC_ROWS: gl.constexpr):
    peak_new = gl.maximum(peak, gl.max(qk, 1) * qk_scale)
    p = gl.exp2(qk * qk_scale - peak_new[:, None])
    fade = gl.exp2(peak - peak_new)
    acc = acc * gl.convert_layout(fade, ACC_ROWS)[:, None]
    return p, peak_new, total * fade + gl.sum(p, 1), acc


@gluon.jit
def _compute(p_out, p_lse, stride_ot, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full,
             v_empty, start, n, blocks, qk_scale, GROUP_ID: gl.constexpr,
             NB: gl.constexpr, BN: gl.constexpr, D: gl.constexpr):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # noqa: E741
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O)
    dtype: gl.constexpr = p_out.dtype.element_ty
    peak = gl.full([ROWS], float("-inf"), gl.float32, S_ROWS)
    total = gl.full([ROWS], 0.0, gl.float32, S_ROWS)
    acc = gl.zeros([ROWS, D], gl.float32, O)
    zeros = gl.zeros([ROWS, BN], gl.float32, S)
    mbarrier.wait(q_full.index(GROUP_ID), 0)
    b_q = q_smem.index(GROUP_ID)
    mbarrier.wait(k_full.index(0), 0)
    b_k = k_smem.index(0).permute((1, 0))
    qk = warpgroup_mma(b_q, b_k, zeros, use_acc=False, is_async=True)
    qk = warpgroup_mma_wait(0, (qk,))
    mbarrier.arrive(k_empty.index(0), count=1)
    for i in range(blocks - 1):
        s = i % NB
        s_next = (i + 1) % NB
        mbarrier.wait(k_full.index(s_next), ((i + 1) // NB) & 1)
        b_k = k_smem.index(s_next).permute((1, 0))
        qk_next = warpgroup_mma(b_q, b_k, zeros, use_acc=False, is_async=True)
        p, peak, total, acc = _softmax_step(qk, peak, total, acc, qk_scale, O_ROWS)
        b_p = gl.convert_layout(p.to(dtype), P)
        mbarrier.wait(v_full.index(s), (i // NB) & 1)
        acc = warpgroup_mma(b_p, v_smem.index(s), acc, is_async=True)
        qk = warpgroup_mma_wait(1, (qk_next,))
        mbarrier.arrive(k_empty.index(s_next), count=1)
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(v_empty.index(s), count=1)
    last = blocks - 1
    i_n = last * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, S))
    qk = gl.where((i_n < n)[None, :], qk, float("-inf"))
    p, peak, total, acc = _softmax_step(qk, peak, total, acc, qk_scale, O_ROWS)
    b_p = gl.convert_layout(p.to(dtype), P)
    mbarrier.wait(v_full.index(last % NB), (last // NB) & 1)
    acc = warpgroup_mma(b_p, v_smem.index(last % NB), acc, is_async=False)
    acc = acc / gl.convert_layout(total, O_ROWS)[:, None]
    i_m = start + GROUP_ID * ROWS + gl.arange(0, ROWS, layout=O_ROWS)
    i_d = gl.arange(0, D, layout=gl.SliceLayout(0, O))
    p_rows = p_out + i_m.to(gl.int64)[:, None] * stride_ot + i_d[None, :]
    gl.store(p_rows, acc.to(dtype), mask=(i_m < n)[:, None])
    i_s = start + GROUP_ID * ROWS + gl.arange(0, ROWS, layout=S_ROWS)
    gl.store(p_lse + i_s, peak + gl.log2(total), mask=i_s < n)


@gluon.jit(do_not_specialize=["T"])
def varlen_attention_gluon(
    q, k, v, out, lse, cu_seqlens, tiles, T, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    H: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, NB: gl.constexpr,
    GROUPS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """A tile of out [T, H, D] and lse [H, T]: 64 rows for each of the groups."""
    i_h = (gl.program_id(0) % H).to(gl.int64)
    p_tile = tiles + 2 * (gl.program_id(0) // H)
    p_ends = cu_seqlens + gl.load(p_tile)
    first = gl.load(p_ends)
    n = gl.load(p_ends + 1) - first
    start = gl.load(p_tile + 1) * (GROUPS * ROWS)
    first = first.to(gl.int64)
    i_hk = i_h // GROUP
    blocks = (n + BN - 1) // BN

    dtype: gl.constexpr = q.dtype.element_ty
    Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    KV: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], dtype)
    # Descriptors of the segment alone: rows past its end are zeros, not the neighbour's.
    p_q = q + first * stride_qt + i_h * stride_qh
    p_k = k + first * stride_kt + i_hk * stride_kh
    p_v = v + first * stride_vt + i_hk * stride_vh
    q_desc = tma.make_tensor_descriptor(p_q, [n, D], [stride_qt, 1], [ROWS, D], Q)
    k_desc = tma.make_tensor_descriptor(p_k, [n, D], [stride_kt, 1], [BN, D], KV)
    v_desc = tma.make_tensor_descriptor(p_v, [n, D], [stride_vt, 1], [BN, D], KV)
    p_out = out + first * stride_ot + i_h * stride_oh
    p_lse = lse + i_h * T + first

    q_smem = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, D], Q)
    k_smem = gl.allocate_shared_memory(dtype, [NB, BN, D], KV)
    v_smem = gl.allocate_shared_memory(dtype, [NB, BN, D], KV)
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(c), count=1)
    for s in gl.static_range(NB):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=GROUPS)
        mbarrier.init(v_empty.index(s), count=GROUPS)
    qk_scale = scale * LOG2_E
    gl.warp_specialize(
        [
            (_compute, (p_out, p_lse, stride_ot, q_smem, k_smem, v_smem, q_full, k_full, k_empty,
                        v_full, v_empty, start, n, blocks, qk_scale, 0, NB, BN, D)),
            (_compute, (p_out, p_lse, stride_ot, q_smem, k_smem, v_smem, q_full, k_full, k_empty,
                        v_full, v_empty, start, n, blocks, qk_scale, 1, NB, BN, D)),
            (_load, (q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, k_full, k_empty,
                     v_full, v_empty, start, blocks, GROUPS, NB, BN)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def gluon_attention(packed: PackedGrids, step: int = 128, buffers: int = 2) -> Attention:
    """The forward in blocks of `step` keys; a call raises Unavailable for what it can't take."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] not in (64, 128) or q.dtype.itemsize != 2 or q.requires_grad:
            raise Unavailable("the Gluon forward takes 16-bit heads of 64 or 128, and no gradient")
        if not all(map(fits_descriptor, (q, k, v))):
            raise Unavailable("the Gluon forward takes what TMA can load")
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        with device_guard(q):
            start(q, k, v, out, lse, packed, q.shape[2] ** -0.5, step, buffers)
        return out

    return attend


def start(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    packed: PackedGrids,
    scale: float,
    step: int,
    buffers: int,
) -> None:
    """Write `out` and `lse` (in base 2); `buffers` blocks of K and V are in flight."""
    heads, head_dim = q.shape[1:]
    tiles = packed.tiles(GROUPS * 64)

    def run() -> None:
        triton.set_allocator(_scratch)  # descriptors made on the device live there
        varlen_attention_gluon[(tiles.shape[0] * heads,)](
            q, k, v, out, lse, packed.cu_seqlens, tiles, q.shape[0], scale,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2],
            H=heads, GROUP=heads // k.shape[1], D=head_dim, BN=step, NB=buffers,
            GROUPS=GROUPS, REGISTERS=REGISTERS, num_warps=4,
        )  # fmt: skip

    contextvars.copy_context().run(run)  # the caller's allocator stays as it is


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
