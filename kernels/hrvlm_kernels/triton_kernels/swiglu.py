"""The Triton kernels of swiglu and their launchers; see swiglu.py.

Elementwise, so memory alone decides: a program has one piece of one row, and each of its threads
loads 16 bytes of every 16-bit input at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bound import bound
from .launch import architecture, cdiv, device_guard, tile_choices
from .tilings import BlockConfig


@bound
@triton.jit
def swiglu_forward(
    gate, up, out, F, stride_gt, stride_gf, stride_ut, stride_uf, BLOCK: tl.constexpr
):  # fmt: skip
    """A block of a row of the contiguous out [T, F]."""
    pieces = tl.cdiv(F, BLOCK)
    i_t = (tl.program_id(0) // pieces).to(tl.int64)
    i_f = (tl.program_id(0) % pieces) * BLOCK + tl.arange(0, BLOCK)
    o_f = i_f.to(tl.int64)
    mask = i_f < F
    b_gate = tl.load(gate + i_t * stride_gt + o_f * stride_gf, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(up + i_t * stride_ut + o_f * stride_uf, mask=mask, other=0.0).to(tl.float32)
    b_out = b_gate * tl.sigmoid(b_gate) * b_up
    tl.store(out + i_t * F + i_f, b_out.to(out.dtype.element_ty), mask=mask)


@bound
@triton.jit
def swiglu_backward(
    g, gate, up, dgate, dup, F,
    stride_yt, stride_yf, stride_gt, stride_gf, stride_ut, stride_uf, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a row of the contiguous dgate and dup [T, F]; y is g, the cotangent."""
    pieces = tl.cdiv(F, BLOCK)
    i_t = (tl.program_id(0) // pieces).to(tl.int64)
    i_f = (tl.program_id(0) % pieces) * BLOCK + tl.arange(0, BLOCK)
    o_f = i_f.to(tl.int64)
    mask = i_f < F
    b_g = tl.load(g + i_t * stride_yt + o_f * stride_yf, mask=mask, other=0.0).to(tl.float32)
    b_gate = tl.load(gate + i_t * stride_gt + o_f * stride_gf, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(up + i_t * stride_ut + o_f * stride_uf, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(b_gate)
    b_dup = b_g * b_gate * s
    b_dgate = b_g * b_up * s * (1.0 + b_gate * (1.0 - s))
    tl.store(dgate + i_t * F + i_f, b_dgate.to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + i_t * F + i_f, b_dup.to(dup.dtype.element_ty), mask=mask)


_INTERPRETER = BlockConfig(1024, 1)


def select_config(arch: str, dtype: torch.dtype) -> BlockConfig:
    """Block size for a chip and a dtype; forward and backward share it."""
    if arch == "interpreter":
        return _INTERPRETER
    return tile_choices("SWIGLU", arch, dtype.itemsize)[0]


def forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """Write the contiguous `out`."""
    tokens, width = gate.shape
    if out.numel() == 0:
        return
    config = select_config(architecture(gate.device), gate.dtype)
    with device_guard(gate):
        swiglu_forward[(tokens * cdiv(width, config.elements),)](
            gate, up, out, width, *gate.stride(), *up.stride(),
            BLOCK=config.elements, num_warps=config.num_warps,
        )  # fmt: skip


def backward(g: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Write the contiguous `dgate` and `dup`."""
    tokens, width = gate.shape
    if gate.numel() == 0:
        return
    config = select_config(architecture(gate.device), gate.dtype)
    with device_guard(gate):
        swiglu_backward[(tokens * cdiv(width, config.elements),)](
            g, gate, up, dgate, dup, width, *g.stride(), *gate.stride(), *up.stride(),
            BLOCK=config.elements, num_warps=config.num_warps,
        )  # fmt: skip
