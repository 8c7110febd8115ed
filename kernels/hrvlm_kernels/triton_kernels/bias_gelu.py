"""The Triton kernels of bias_gelu and their launchers; see ops/bias_gelu.py.

Elementwise, so memory alone decides. A program of the backward walks down the rows of its columns
and adds up their part of the bias's gradient; the parts are added afterwards, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bound import bound
from .launch import architecture, cdiv, device_guard, multiprocessors
from .swiglu import select_config
from .tilings import BlockConfig

SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)


@bound
@triton.jit
def bias_gelu_forward(x, bias, out, F, BLOCK: tl.constexpr):
    """A block of a row of out [T, F]; all are contiguous."""
    pieces = tl.cdiv(F, BLOCK)
    i_t = (tl.program_id(0) // pieces).to(tl.int64)
    i_f = (tl.program_id(0) % pieces) * BLOCK + tl.arange(0, BLOCK)
    mask = i_f < F
    z = tl.load(x + i_t * F + i_f, mask=mask, other=0.0).to(tl.float32)
    z += tl.load(bias + i_f, mask=mask, other=0.0).to(tl.float32)
    b_out = z * 0.5 * (tl.erf(z * SQRT_HALF) + 1.0)
    tl.store(out + i_t * F + i_f, b_out.to(out.dtype.element_ty), mask=mask)


@bound
@triton.jit(do_not_specialize=["T", "blocks"])
def bias_gelu_backward(
    g, x, bias, dx, parts, T, F, blocks, BR: tl.constexpr, BF: tl.constexpr
):  # fmt: skip
    """`blocks` times BR rows of BF columns of dx [T, F], and their part of the bias's gradient."""
    pieces = tl.cdiv(F, BF)
    i_part = tl.program_id(0) // pieces
    i_f = (tl.program_id(0) % pieces) * BF + tl.arange(0, BF)
    m_f = i_f < F
    b_bias = tl.load(bias + i_f, mask=m_f, other=0.0).to(tl.float32)[None, :]
    db = tl.zeros([BR, BF], tl.float32)
    i_t = i_part.to(tl.int64) * (blocks * BR) + tl.arange(0, BR)
    for _ in range(0, blocks):
        mask = (i_t < T)[:, None] & m_f[None, :]
        o_row = (i_t * F)[:, None] + i_f[None, :]
        z = tl.load(x + o_row, mask=mask, other=0.0).to(tl.float32) + b_bias  # [BR, BF]
        b_g = tl.load(g + o_row, mask=mask, other=0.0).to(tl.float32)
        inside = 0.5 * (tl.erf(z * SQRT_HALF) + 1.0)
        b_dx = b_g * (inside + z * tl.exp(z * z * -0.5) * INVERSE_SQRT_TWO_PI)
        db += b_dx
        tl.store(dx + o_row, b_dx.to(dx.dtype.element_ty), mask=mask)
        i_t += BR
    tl.store(parts + i_part.to(tl.int64) * F + i_f, tl.sum(db, 0), mask=m_f)


@bound
@triton.jit(do_not_specialize=["count"])
def bias_gelu_add_parts(parts, out, count, F, BF: tl.constexpr):
    """Out [F], the sum of parts [count, F] in their order."""
    i_f = tl.program_id(0) * BF + tl.arange(0, BF)
    mask = i_f < F
    total = tl.zeros([BF], tl.float32)
    for i in range(0, count):
        total += tl.load(parts + i * F + i_f, mask=mask, other=0.0)
    tl.store(out + i_f, total.to(out.dtype.element_ty), mask=mask)


_COLUMNS = 256  # of a program of the backward
SUM_COLUMNS = 64


def tile_of(config: BlockConfig) -> tuple[int, int]:
    """Rows and columns of a tile of the backward."""
    return max(1, config.elements // _COLUMNS), _COLUMNS


def forward(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """Write the contiguous `out`, given the contiguous `x`."""
    tokens, width = x.shape
    if out.numel() == 0:
        return
    config = select_config(architecture(x.device), x.dtype)
    with device_guard(x):
        bias_gelu_forward[(tokens * cdiv(width, config.elements),)](
            x, bias.contiguous(), out, width,
            BLOCK=config.elements, num_warps=config.num_warps,
        )  # fmt: skip


def backward(g: Tensor, x: Tensor, bias: Tensor, dx: Tensor, dbias: Tensor) -> None:
    """Write `dx` and `dbias`; all tensors are contiguous."""
    tokens, width = x.shape
    if x.numel() == 0:
        dbias.zero_()
        return
    config = select_config(architecture(x.device), x.dtype)
    rows, columns = tile_of(config)
    pieces, blocks = cdiv(width, columns), cdiv(tokens, rows)
    # About as many programs as run at once: few parts to add.
    each = max(1, blocks * pieces // (4 * multiprocessors(x.device)))
    count = cdiv(blocks, each)
    parts = torch.empty(count, width, dtype=torch.float32, device=x.device)
    with device_guard(x):
        bias_gelu_backward[(count * pieces,)](
            g, x, bias.contiguous(), dx, parts, tokens, width, each,
            BR=rows, BF=columns, num_warps=config.num_warps,
        )  # fmt: skip
        bias_gelu_add_parts[(cdiv(width, SUM_COLUMNS),)](
            parts, dbias, count, width, BF=SUM_COLUMNS, num_warps=1
        )
