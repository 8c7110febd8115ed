"""Kernels as a textbook has them, in plain Triton: what ours are compared with."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hrvlm_kernels.triton_kernels.linear_gelu import multiply
from hrvlm_kernels.triton_kernels.pixel_shuffle_linear import locate_tile, tile_arguments
from hrvlm_kernels.triton_kernels.tilings import GemmConfig, Tiling


@triton.jit
def _load_rows(p, m_n, m_d, MASKED: tl.constexpr, PADDED: tl.constexpr):
    if MASKED and PADDED:
        return tl.load(p, mask=m_n[:, None] & m_d[None, :], other=0.0)
    if MASKED:
        return tl.load(p, mask=m_n[:, None], other=0.0)
    if PADDED:
        return tl.load(p, mask=m_d[None, :], other=0.0)
    return tl.load(p)


@triton.jit
def flash_attention_2(
    q, k, v, out, lse, n, scale, stride_t, stride_h,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """FlashAttention-2's forward as the paper has it, for one sequence [n, H, D]; not causal.

    MASKED checks the end in every block; without it, n is a multiple of BM and BN. BD is D, or the
    next power of two, to which tiles are padded.
    """
    PADDED: tl.constexpr = D != BD
    start, head = tl.program_id(0) * BM, tl.program_id(1)
    i_m, i_d, j = start + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BN)
    m_d = i_d < D
    rows = i_m[:, None] * stride_t + head * stride_h + i_d[None, :]
    b_q = _load_rows(q + rows, i_m < n, m_d, MASKED, PADDED)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    factor = scale * 1.4426950408889634
    for s in range(0, n, BN):
        i_n = s + j
        keys = i_n[:, None] * stride_t + head * stride_h + i_d[None, :]
        scores = tl.dot(b_q, _load_rows(k + keys, i_n < n, m_d, MASKED, PADDED).T)
        if MASKED:
            scores = tl.where((i_n < n)[None, :], scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1) * factor)
        p = tl.exp2(scores * factor - new[:, None])
        fade = tl.exp2(top - new)
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None]
        b_v = _load_rows(v + keys, i_n < n, m_d, MASKED, PADDED)
        acc = tl.dot(p.to(b_v.dtype), b_v, acc)
        top = new
    acc = (acc / total[:, None]).to(out.dtype.element_ty)
    if PADDED:
        tl.store(out + rows, acc, mask=(i_m < n)[:, None] & m_d[None, :])
    elif MASKED:
        tl.store(out + rows, acc, mask=(i_m < n)[:, None])
    else:
        tl.store(out + rows, acc)
    if MASKED:
        tl.store(lse + head * n + i_m, top + tl.log2(total), mask=i_m < n)
    else:
        tl.store(lse + head * n + i_m, top + tl.log2(total))


def start_flash_attention_2(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiling: Tiling
) -> None:
    """Heads are the slow axis of the grid."""
    n, heads, head_dim = q.shape
    flash_attention_2[(triton.cdiv(n, tiling.rows), heads)](
        q, k, v, out, lse, n, head_dim**-0.5, *q.stride()[:2],
        D=head_dim, BD=triton.next_power_of_2(head_dim), BM=tiling.rows, BN=tiling.step,
        MASKED=n % tiling.rows != 0 or n % tiling.step != 0,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip


@triton.jit
def matmul(
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr
):
    """C [M, N] = a [M, K] @ b[N, K].T, all contiguous; K is a multiple of BK."""
    n_m, n_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    per_group = GROUP * n_n
    first = tl.program_id(0) // per_group * GROUP
    height = tl.minimum(n_m - first, GROUP)
    i_m = (first + tl.program_id(0) % per_group % height) * BM + tl.arange(0, BM)
    i_n = (tl.program_id(0) % per_group // height) * BN + tl.arange(0, BN)
    i_k = tl.arange(0, BK)
    p_a = a + (i_m % M)[:, None] * K + i_k[None, :]
    p_b = b + (i_n % N)[None, :] * K + i_k[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    for _ in range(0, tl.cdiv(K, BK)):
        acc = tl.dot(tl.load(p_a), tl.load(p_b), acc)
        p_a += BK
        p_b += BK
    p_c = c + i_m[:, None] * N + i_n[None, :]
    tl.store(p_c, acc.to(c.dtype.element_ty), mask=(i_m < M)[:, None] & (i_n < N)[None, :])


@triton.jit
def linear(
    x, weight, out, T, F, C, stride_xt, stride_xc, stride_wf, stride_wc, EVEN_C: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """linear_gelu_forward without bias and GELU: the same loop, the same store."""
    i_t, i_f = locate_tile(tl.program_id(0), tl.cdiv(T, BM), tl.cdiv(F, BN), GROUP)
    i_t = i_t.to(tl.int64) * BM + tl.arange(0, BM)
    i_f = i_f * BN + tl.arange(0, BN)
    m_t, m_f = i_t < T, i_f < F
    p_w = weight + tl.where(m_f, i_f, 0).to(tl.int64) * stride_wf
    acc = multiply(
        x, tl.where(m_t, i_t, 0), stride_xt, stride_xc, p_w, stride_wc, C, EVEN_C,
        BM, BN, BK, "ieee",
    )  # fmt: skip
    p_out = out + (i_t * F)[:, None] + i_f[None, :]
    tl.store(p_out, acc.to(out.dtype.element_ty), mask=m_t[:, None] & m_f[None, :])


def start_linear(x: Tensor, weight: Tensor, out: Tensor, config: GemmConfig) -> None:
    """With the tile sizes of ours."""
    (tokens, channels), width = x.shape, weight.shape[0]
    linear[(triton.cdiv(tokens, config.block_m) * triton.cdiv(width, config.block_n),)](
        x, weight, out, tokens, width, channels, *x.stride(), *weight.stride(),
        EVEN_C=channels % config.block_k == 0, **tile_arguments(config),
    )  # fmt: skip


def start_matmul(a: Tensor, b: Tensor, c: Tensor, config: GemmConfig) -> None:
    """With the tile sizes of ours."""
    (m, k), n = a.shape, b.shape[0]
    matmul[(triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)](
        a, b, c, m, n, k, BM=config.block_m, BN=config.block_n, BK=config.block_k,
        GROUP=config.group, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
