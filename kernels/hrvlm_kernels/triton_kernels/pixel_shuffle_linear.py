"""The forward Triton kernel of pixel_shuffle_linear and its launcher.

The products read and write the packed tokens through the index ``[M, s*s]`` of packed rows, so that
the shuffled tensor never exists in memory. The axis K = s*s*C is walked patch by patch: within a
patch, the C elements of a token are neighbours in memory. The patches of one output token lie at

    row(m, dy, dx) = index[m, 0] + dy * step(m) + dx
    step(m)        = index[m, s] - index[m, 0]                        the width of its image's grid

    out[m, n] = sum over (dy, dx, c) of  x[row, c] * weight[n, (dy, dx, c)]

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

from .bound import bound
from .launch import architecture, cdiv, device_guard, launch, multiprocessors, tile_choices
from .tilings import GemmConfig


@triton.jit
def locate_tile(pid, n_m, n_n, GROUP: tl.constexpr):
    """Tiles in groups of GROUP rows of tiles: neighbours in time share operands in L2."""
    per_group = GROUP * n_n
    first = (pid // per_group) * GROUP
    height = tl.minimum(n_m - first, GROUP)
    return first + (pid % per_group) % height, (pid % per_group) // height


@bound
@triton.jit(do_not_specialize=["M", "steps"])
def pixel_shuffle_linear_forward(
    x, index, weight, bias, out, M, N, steps,
    stride_xt, stride_xc, stride_wn, stride_wk, stride_b, stride_op, stride_om,
    C: tl.constexpr, S: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tile [BM, BN] of part program_id(1) of the sum over K: `steps` blocks of BK."""
    i_m, i_n = locate_tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
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


@bound
@triton.jit(do_not_specialize=["n_parts", "size"])
def pixel_shuffle_linear_add_parts(
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


_INTERPRETER = (GemmConfig(32, 32, 32, 1, 1, 2),)
_MAX_PARTS = 16
_MIN_STEPS = 8  # of a part: fewer, and starting the pipeline costs more than the part


def select_configs(arch: str, dtype: torch.dtype) -> tuple[GemmConfig, ...]:
    """Tile sizes for a chip and a dtype, largest first; forward, dx and dweight share them."""
    return _INTERPRETER if arch == "interpreter" else tile_choices("GEMM", arch, dtype.itemsize)


def parts_config(arch: str, dtype: torch.dtype, config: GemmConfig) -> GemmConfig:
    """Tile sizes for parts of a sum where `config` is for whole sums."""
    return (tile_choices("GEMM_PARTS", arch, dtype.itemsize) or (config,))[0]


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: as torch's products on a GPU are.

    Whichever of torch's settings was used: ``torch.get_float32_matmul_precision`` raises after
    ``torch.backends.fp32_precision`` was set.
    """
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def count_parts(tiles: int, steps: int, processors: int) -> int:
    """How many parts of a sum of `steps` blocks make `tiles` output tiles fill the chip twice."""
    if tiles == 0 or tiles >= processors:
        return 1
    return max(1, min(2 * processors // tiles, steps // _MIN_STEPS, _MAX_PARTS))


def cut(tiles: int, steps: int, processors: int, parts: int | None = None) -> tuple[int, int]:
    """(parts, steps of each): as asked for, else by :func:`count_parts`; no part is empty."""
    parts = count_parts(tiles, steps, processors) if parts is None else parts
    each = max(1, cdiv(steps, parts))
    return max(1, cdiv(steps, each)), each


@dataclass(frozen=True)
class Plan:
    """How one product is computed."""

    config: GemmConfig
    tiles: int
    parts: int
    steps: int  # of each part


def plan_product(
    config: GemmConfig,
    count: Callable[[GemmConfig], tuple[int, int]],
    x: Tensor,
    parts: int | None,
) -> Plan:
    """How to compute a product that `count` says takes (tiles, steps) with some tile sizes."""
    processors = multiprocessors(x.device)
    if cut(*count(config), processors, parts)[0] > 1:
        config = parts_config(architecture(x.device), x.dtype, config)
    tiles, steps = count(config)
    return Plan(config, tiles, *cut(tiles, steps, processors, parts))


def add_parts(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the sum of `parts` ``[P, M, N]``, plus `bias`, into the contiguous `out`."""
    block = 1024
    pixel_shuffle_linear_add_parts[(cdiv(out.numel(), block),)](
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
    (rows, width_out), width, factor = out.shape, x.shape[1], factor_of(index)
    if out.numel() == 0:
        return

    def count(config: GemmConfig) -> tuple[int, int]:
        tiles = cdiv(rows, config.block_m) * cdiv(width_out, config.block_n)
        return tiles, factor**2 * cdiv(width, config.block_k)

    def start(config: GemmConfig) -> None:
        plan = plan_product(config, count, x, parts)
        target = out if plan.parts == 1 else parts_like(out, plan.parts)
        own_bias = bias if plan.parts == 1 else None
        pixel_shuffle_linear_forward[(plan.tiles, plan.parts)](
            x, index.contiguous(), weight, own_bias, target, rows, width_out, plan.steps,
            *x.stride(), *weight.stride(), _step(own_bias), out.numel(), out.stride(0),
            C=width, S=factor, HAS_BIAS=own_bias is not None, PRECISION=dot_precision(x.dtype),
            **tile_arguments(plan.config),
        )  # fmt: skip
        if plan.parts > 1:
            add_parts(target, bias, out)

    with device_guard(x):
        launch("pixel_shuffle_linear", select_configs(architecture(x.device), x.dtype), start)


def parts_like(out: Tensor, n_parts: int) -> Tensor:
    """Room for the parts of `out`."""
    return torch.empty(n_parts, *out.shape, dtype=torch.float32, device=out.device)


def _step(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.stride(0)


def factor_of(index: Tensor) -> int:
    """The pixel-shuffle factor of a shuffle index ``[M, s*s]``."""
    return round(index.shape[1] ** 0.5)


def tile_arguments(config: GemmConfig) -> dict[str, int]:
    """The kernels' arguments that `config` gives."""
    return {
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
        "GROUP": config.group,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
