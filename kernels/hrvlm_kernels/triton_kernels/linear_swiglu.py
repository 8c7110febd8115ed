"""The Triton kernel of linear_swiglu and its launcher; see ops/linear_swiglu.py.

Rows of the gate's weight and of the other's take turns in a tile. So one product reads x once for
both, and a thread, whose sums are pairs of neighbours, has both factors of an output in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .bound import bound
from .launch import architecture, cdiv, device_guard, launch
from .linear_gelu import configs_of, multiply
from .pixel_shuffle_linear import dot_precision, locate_tile, tile_arguments
from .tilings import GemmConfig


@bound
@triton.jit(do_not_specialize=["T"])
def linear_swiglu_forward(
    x, gate, up, gate_bias, up_bias, out, T, F, C, stride_xt, stride_xc, stride_wf, stride_wc,
    EVEN_C: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tile [BM, BN / 2] of the contiguous out [T, F]; the biases are contiguous too."""
    HALF: tl.constexpr = BN // 2
    i_t, i_f = locate_tile(tl.program_id(0), tl.cdiv(T, BM), tl.cdiv(F, HALF), GROUP)
    i_t = i_t.to(tl.int64) * BM + tl.arange(0, BM)
    m_t, first = i_t < T, i_f * HALF
    # Rows and columns past the end read row 0: no mask in the loop, and nothing of them is stored.
    i_w = tl.arange(0, BN)
    is_gate, i_w = i_w % 2 == 0, first + i_w // 2
    o_w = tl.where(i_w < F, i_w, 0).to(tl.int64) * stride_wf
    acc = multiply(
        x, tl.where(m_t, i_t, 0), stride_xt, stride_xc, tl.where(is_gate, gate, up) + o_w,
        stride_wc, C, EVEN_C, BM, BN, BK, PRECISION,
    )  # fmt: skip
    b_gate, b_up = tl.split(tl.reshape(acc, [BM, HALF, 2]))
    i_f = first + tl.arange(0, HALF)
    m_f = i_f < F
    if HAS_BIAS:
        b_gate += tl.load(gate_bias + i_f, mask=m_f, other=0.0).to(tl.float32)[None, :]
        b_up += tl.load(up_bias + i_f, mask=m_f, other=0.0).to(tl.float32)[None, :]
    b_out = b_gate * tl.sigmoid(b_gate) * b_up
    p_out = out + (i_t * F)[:, None] + i_f[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_t[:, None] & m_f[None, :])


def forward(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    out: Tensor,
) -> None:
    """Write the contiguous `out`."""
    (tokens, width), channels = out.shape, x.shape[1]
    if out.numel() == 0:
        return
    biases = [None if bias is None else bias.contiguous() for bias in (gate_bias, up_bias)]

    def start(config: GemmConfig) -> None:
        tiles = cdiv(tokens, config.block_m) * cdiv(2 * width, config.block_n)
        linear_swiglu_forward[(tiles,)](
            x, gate, up, *biases, out, tokens, width, channels, *x.stride(), *gate.stride(),
            EVEN_C=channels % config.block_k == 0, HAS_BIAS=gate_bias is not None,
            PRECISION=dot_precision(x.dtype), **tile_arguments(config),
        )  # fmt: skip

    with device_guard(x):
        launch("linear_swiglu", configs_of("LINEAR_SWIGLU", architecture(x.device), x.dtype), start)
