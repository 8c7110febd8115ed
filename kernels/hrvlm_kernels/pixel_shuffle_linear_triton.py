"""The Triton kernels of pixel_shuffle_linear and their launchers.

All three products read or write the packed tokens through the index ``[M, s*s]`` of packed rows, so
that the shuffled tensor never exists in memory. The axis K = s*s*C is walked patch by patch: within
a patch, the C elements of a token are neighbours in memory. The patches of one output token lie at

    row(m, dy, dx) = index[m, 0] + dy * step(m) + dx
    step(m)        = index[m, s] - index[m, 0]                        the width of its image's grid

    forward    out[m, n]          = sum over (dy, dx, c) of  x[row, c] * weight[n, (dy, dx, c)]
    dx         dx[row, c]         = sum over n of            dy[m, n] * weight[n, (dy, dx, c)]
    dweight    dw[n, (dy, dx, c)] = sum over m of            dy[m, n] * x[row, c]

With few tiles the sum is cut into parts, each in its own float32 buffer, added by a second kernel
in a fixed order: no atomics, so equal inputs give equal bits. The number of parts follows from the
number of output tokens, so what an image is packed with may change the last bits of its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import architecture, device_guard, launch, multiprocessors


@triton.jit
def _tile(pid, n_m, n_n, GROUP: tl.constexpr):
    """Tiles in groups of GROUP rows of tiles: neighbours in time share operands in L2."""
    per_group = GROUP * n_n
    first = (pid // per_group) * GROUP
    height = tl.minimum(n_m - first, GROUP)
    return first + (pid % per_group) % height, (pid % per_group) // height


@triton.jit(do_not_specialize=["M", "steps"])
def forward_kernel(
    x, index, weight, bias, out, M, N, steps,
    stride_xt, stride_xc, stride_wn, stride_wk, stride_b, stride_op, stride_om,
    C: tl.constexpr, S: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tile [BM, BN] of part program_id(1) of the sum over K: `steps` blocks of BK."""
    i_m, i_n = _tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    i_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    i_n = i_n * BN + tl.arange(0, BN)
    m_m, m_n = i_m < M, i_n < N
    # Rows and columns past the end read row 0: no mask in the loop, and nothing of them is stored.
    p_index = index + tl.where(m_m, i_m, 0) * (S * S)
    first = tl.load(p_index).to(tl.int64)  # [BM]
    o_x = first * stride_xt
    o_step = o_x * 0
    if S > 1:
        o_step = (tl.load(p_index + S).to(tl.int64) - first) * stride_xt
    o_w = tl.where(m_n, i_n, 0).to(tl.int64) * stride_wn
    i_k = tl.arange(0, BK)

    BLOCKS: tl.constexpr = (C + BK - 1) // BK  # of one patch
    acc = tl.zeros([BM, BN], tl.float32)
    begin = tl.program_id(1) * steps
    for step in range(begin, tl.minimum(begin + steps, S * S * BLOCKS)):
        patch = step // BLOCKS
        i_c = (step % BLOCKS) * BK + i_k
        o_patch = o_x + (patch // S) * o_step + (patch % S) * stride_xt
        p_x = x + o_patch[:, None] + (i_c.to(tl.int64) * stride_xc)[None, :]
        p_w = weight + o_w[None, :] + ((patch * C + i_c).to(tl.int64) * stride_wk)[:, None]
        if C % BK == 0:
            b_x, b_w = tl.load(p_x), tl.load(p_w)
        else:
            b_x = tl.load(p_x, mask=(i_c < C)[None, :], other=0.0)
            b_w = tl.load(p_w, mask=(i_c < C)[:, None], other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)  # [BM, BK] @ [BK, BN]

    if HAS_BIAS:
        acc += tl.load(bias + i_n * stride_b, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_out = out + tl.program_id(1).to(tl.int64) * stride_op
    p_out += i_m[:, None] * stride_om + i_n[None, :]
    tl.store(p_out, acc.to(out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["M"])
def dx_kernel(
    dy, index, weight, dx, M, N,
    stride_ym, stride_yn, stride_wn, stride_wk, stride_xt,
    C: tl.constexpr, S: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Channels [BN] of one patch of BM output tokens, stored in the patches' packed rows."""
    BLOCKS: tl.constexpr = (C + BN - 1) // BN
    i_m, tile = _tile(tl.program_id(0), tl.cdiv(M, BM), S * S * BLOCKS, GROUP)
    patch = tile // BLOCKS
    i_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    i_c = (tile % BLOCKS) * BN + tl.arange(0, BN)
    m_m, m_c = i_m < M, i_c < C
    o_y = tl.where(m_m, i_m, 0) * stride_ym
    o_w = (patch * C + i_c).to(tl.int64) * stride_wk
    i_k = tl.arange(0, BK)

    acc = tl.zeros([BM, BN], tl.float32)
    for n in range(0, N, BK):
        i_n = (n + i_k).to(tl.int64)
        p_y = dy + o_y[:, None] + (i_n * stride_yn)[None, :]
        p_w = weight + (i_n * stride_wn)[:, None] + o_w[None, :]
        if EVEN_N and C % BN == 0:
            b_y, b_w = tl.load(p_y), tl.load(p_w)
        else:
            b_y = tl.load(p_y, mask=(i_n < N)[None, :], other=0.0)
            b_w = tl.load(p_w, mask=(i_n < N)[:, None] & m_c[None, :], other=0.0)
        acc = tl.dot(b_y, b_w, acc, input_precision=PRECISION)  # [BM, BK] @ [BK, BN]

    row = tl.load(index + i_m * (S * S) + patch, mask=m_m, other=0).to(tl.int64)
    p_dx = dx + (row * stride_xt)[:, None] + i_c[None, :]
    tl.store(p_dx, acc.to(dx.dtype.element_ty), mask=m_m[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["M", "steps"])
def dweight_kernel(
    dy, x, index, dw, M, N, steps,
    stride_ym, stride_yn, stride_xt, stride_xc, stride_dp, stride_dn,
    C: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Rows [BM] of the weight, channels [BN] of one patch: part program_id(1) of the sum."""
    BLOCKS: tl.constexpr = (C + BN - 1) // BN
    i_n, tile = _tile(tl.program_id(0), tl.cdiv(N, BM), S * S * BLOCKS, GROUP)
    patch = tile // BLOCKS
    i_n = i_n.to(tl.int64) * BM + tl.arange(0, BM)
    i_c = (tile % BLOCKS) * BN + tl.arange(0, BN)
    m_n, m_c = i_n < N, i_c < C
    o_y = i_n * stride_yn
    o_x = i_c.to(tl.int64) * stride_xc
    i_k = tl.arange(0, BK).to(tl.int64)

    acc = tl.zeros([BM, BN], tl.float32)
    begin = tl.program_id(1) * steps
    for step in range(begin, tl.minimum(begin + steps, tl.cdiv(M, BK))):
        i_m = i_k + step * BK
        m_m = i_m < M
        row = tl.load(index + i_m * (S * S) + patch, mask=m_m, other=0).to(tl.int64)
        p_y = dy + o_y[:, None] + (i_m * stride_ym)[None, :]
        p_x = x + (row * stride_xt)[:, None] + o_x[None, :]
        b_y = tl.load(p_y, mask=m_n[:, None] & m_m[None, :], other=0.0)
        b_x = tl.load(p_x, mask=m_m[:, None] & m_c[None, :], other=0.0)
        acc = tl.dot(b_y, b_x, acc, input_precision=PRECISION)  # [BM, BK] @ [BK, BN]

    p_dw = dw + tl.program_id(1).to(tl.int64) * stride_dp
    p_dw += i_n[:, None] * stride_dn + (patch * C + i_c)[None, :]
    tl.store(p_dw, acc.to(dw.dtype.element_ty), mask=m_n[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["n_parts", "size"])
def add_parts_kernel(
    parts, bias, out, n_parts, size, N, stride_b, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Flat element i: the sum of its parts, first to last, plus bias[i % N]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    acc = tl.zeros([BLOCK], tl.float32)
    p_part = parts + i
    for _ in range(0, n_parts):
        acc += tl.load(p_part, mask=mask, other=0.0)
        p_part += size
    if HAS_BIAS:
        acc += tl.load(bias + (i % N) * stride_b, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def zero_prefix_kernel(
    dx, cu_seqlens, C, stride_xt, stride_xc, PREFIX: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Zero the prefix rows of segment program_id(0)."""
    start = tl.load(cu_seqlens + tl.program_id(0)).to(tl.int64)
    i_c = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], dx.dtype.element_ty)
    for row in range(0, PREFIX):
        p_row = dx + (start + row) * stride_xt
        for c in range(0, C, BLOCK):
            tl.store(p_row + (c + i_c) * stride_xc, zeros, mask=c + i_c < C)


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes of one product; block_k runs along the sum."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8  # rows of tiles that run together


# architecture -> bytes of an element -> tile sizes; the same for forward, dx and dweight. The rows
# that unknown chips use have a smaller second choice. Chosen by compiling (no spill, asynchronous
# tensor cores on sm_90), not yet measured on a GPU.
_SMALL = {2: GemmConfig(64, 64, 32, 4, 2), 4: GemmConfig(32, 32, 16, 4, 2)}
_CONFIGS: dict[str, dict[int, tuple[GemmConfig, ...]]] = {
    "sm_80": {
        2: (GemmConfig(128, 128, 32, 8, 4), _SMALL[2]),
        4: (GemmConfig(64, 64, 16, 4, 4), _SMALL[4]),
    },
    "sm_90": {2: (GemmConfig(128, 128, 64, 8, 3),), 4: (GemmConfig(64, 64, 16, 4, 4),)},
    "sm_100": {2: (GemmConfig(128, 128, 64, 8, 4),), 4: (GemmConfig(64, 64, 16, 4, 4),)},
    "gfx942": {
        2: (GemmConfig(128, 128, 32, 8, 2), _SMALL[2]),
        4: (GemmConfig(64, 64, 32, 4, 2), _SMALL[4]),
    },
    "interpreter": dict.fromkeys((2, 4), (GemmConfig(32, 32, 32, 1, 1, 2),)),
}
# For parts of a sum, where the float32 store makes ptxas hold up the tensor cores otherwise.
_PARTS_CONFIGS = {("sm_90", 2): GemmConfig(128, 64, 64, 8, 3)}
_MAX_PARTS = 16
_MIN_STEPS = 8  # of a part: fewer, and starting the pipeline costs more than the part


def select_configs(arch: str, dtype: torch.dtype) -> tuple[GemmConfig, ...]:
    """Tile sizes for a chip and a dtype, largest first."""
    return _CONFIGS[arch][dtype.itemsize]


def parts_config(arch: str, dtype: torch.dtype, config: GemmConfig) -> GemmConfig:
    """Tile sizes for parts of a sum where `config` is for whole sums."""
    return _PARTS_CONFIGS.get((arch, dtype.itemsize), config)


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: as ``torch.set_float32_matmul_precision`` says."""
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def count_parts(tiles: int, steps: int, processors: int) -> int:
    """How many parts of a sum of `steps` blocks make `tiles` output tiles fill the chip twice."""
    if tiles == 0 or tiles >= processors:
        return 1
    return max(1, min(2 * processors // tiles, steps // _MIN_STEPS, _MAX_PARTS))


def cut(tiles: int, steps: int, processors: int, parts: int | None = None) -> tuple[int, int]:
    """(parts, steps of each): as asked for, else by :func:`count_parts`; no part is empty."""
    parts = count_parts(tiles, steps, processors) if parts is None else parts
    each = max(1, triton.cdiv(steps, parts))
    return max(1, triton.cdiv(steps, each)), each


@dataclass(frozen=True)
class _Plan:
    config: GemmConfig
    tiles: int
    parts: int
    steps: int  # of each part


def _plan(
    config: GemmConfig,
    count: Callable[[GemmConfig], tuple[int, int]],
    x: Tensor,
    parts: int | None,
) -> _Plan:
    """How to compute a product that `count` says takes (tiles, steps) with some tile sizes."""
    processors = multiprocessors(x.device)
    if cut(*count(config), processors, parts)[0] > 1:
        config = parts_config(architecture(x.device), x.dtype, config)
    tiles, steps = count(config)
    return _Plan(config, tiles, *cut(tiles, steps, processors, parts))


def _add_parts(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    block = 1024
    add_parts_kernel[(triton.cdiv(out.numel(), block),)](
        parts, bias, out, parts.shape[0], out.numel(), out.shape[1], _step(bias),
        HAS_BIAS=bias is not None, BLOCK=block,
    )  # fmt: skip


def forward(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    parts: int | None = None,
) -> None:
    """Write ``gather(x) @ weight.T + bias`` into the contiguous `out`.

    `parts` forces the split of the sum.
    """
    (rows, width_out), width, factor = out.shape, x.shape[1], _factor(index)
    if out.numel() == 0:
        return

    def count(config: GemmConfig) -> tuple[int, int]:
        tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(width_out, config.block_n)
        return tiles, factor**2 * triton.cdiv(width, config.block_k)

    def start(config: GemmConfig) -> None:
        plan = _plan(config, count, x, parts)
        target = out if plan.parts == 1 else _parts_of(out, plan.parts)
        own_bias = bias if plan.parts == 1 else None
        forward_kernel[(plan.tiles, plan.parts)](
            x, index.contiguous(), weight, own_bias, target, rows, width_out, plan.steps,
            *x.stride(), *weight.stride(), _step(own_bias), out.numel(), out.stride(0),
            C=width, S=factor, HAS_BIAS=own_bias is not None, PRECISION=dot_precision(x.dtype),
            **_tiling(plan.config),
        )  # fmt: skip
        if plan.parts > 1:
            _add_parts(target, bias, out)

    with device_guard(x):
        launch("pixel_shuffle_linear", select_configs(architecture(x.device), x.dtype), start)


def backward_dx(
    dy: Tensor,
    weight: Tensor,
    index: Tensor,
    cu_seqlens: Tensor,
    num_prefix_tokens: int,
    dx: Tensor,
) -> None:
    """Write the gradient of x into the contiguous `dx`: each patch row once, prefix rows zero."""
    (rows, width_out), width, factor = dy.shape, dx.shape[1], _factor(index)
    if dx.numel() == 0:
        return

    def start(config: GemmConfig) -> None:
        tiles = triton.cdiv(rows, config.block_m) * factor**2 * triton.cdiv(width, config.block_n)
        dx_kernel[(tiles,)](
            dy, index.contiguous(), weight, dx, rows, width_out,
            *dy.stride(), *weight.stride(), dx.stride(0),
            C=width, S=factor, EVEN_N=width_out % config.block_k == 0,
            PRECISION=dot_precision(dy.dtype), **_tiling(config),
        )  # fmt: skip

    with device_guard(dy):
        if rows:
            configs = select_configs(architecture(dy.device), dy.dtype)
            launch("pixel_shuffle_linear dx", configs, start)
        zero_prefix_rows(dx, cu_seqlens, num_prefix_tokens)


def backward_dweight(
    dy: Tensor, x: Tensor, index: Tensor, dw: Tensor, parts: int | None = None
) -> None:
    """Write the gradient of the weight into the contiguous `dw`; `parts` forces the split."""
    (rows, width_out), width, factor = dy.shape, x.shape[1], _factor(index)
    if dw.numel() == 0:
        return

    def count(config: GemmConfig) -> tuple[int, int]:
        tiles = triton.cdiv(width_out, config.block_m) * triton.cdiv(width, config.block_n)
        return tiles * factor**2, triton.cdiv(rows, config.block_k)

    def start(config: GemmConfig) -> None:
        plan = _plan(config, count, x, parts)
        target = dw if plan.parts == 1 else _parts_of(dw, plan.parts)
        dweight_kernel[(plan.tiles, plan.parts)](
            dy, x, index.contiguous(), target, rows, width_out, plan.steps,
            *dy.stride(), *x.stride(), dw.numel(), dw.stride(0),
            C=width, S=factor, PRECISION=dot_precision(x.dtype), **_tiling(plan.config),
        )  # fmt: skip
        if plan.parts > 1:
            _add_parts(target, None, dw)

    with device_guard(x):
        configs = select_configs(architecture(x.device), x.dtype)
        launch("pixel_shuffle_linear dweight", configs, start)


def zero_prefix_rows(dx: Tensor, cu_seqlens: Tensor, num_prefix_tokens: int) -> None:
    """Zero the first `num_prefix_tokens` rows of each segment of `dx` ``[T, C]``.

    The device of `dx` must be the current one.
    """
    segments = cu_seqlens.shape[0] - 1
    if segments and num_prefix_tokens and dx.numel():
        zero_prefix_kernel[(segments,)](
            dx, cu_seqlens.contiguous(), dx.shape[1], *dx.stride(), PREFIX=num_prefix_tokens,
            BLOCK=min(1024, triton.next_power_of_2(dx.shape[1])),
        )  # fmt: skip


def _parts_of(out: Tensor, n_parts: int) -> Tensor:
    return torch.empty(n_parts, *out.shape, dtype=torch.float32, device=out.device)


def _step(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.stride(0)


def _factor(index: Tensor) -> int:
    return round(index.shape[1] ** 0.5)


def _tiling(config: GemmConfig) -> dict[str, int]:
    return {
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
        "GROUP": config.group,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
