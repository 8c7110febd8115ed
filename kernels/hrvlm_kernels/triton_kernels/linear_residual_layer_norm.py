"""The Triton kernel of the parameters' gradients of linear_residual_layer_norm; see there.

They are of the size of the weight, not of the tokens: one launch, which adds up the parts of the
norm's backward too, instead of a dozen small ones.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .bound import bound
from .launch import cdiv, device_guard, next_power_of_2


@triton.jit
def _sum_of_parts(parts, count, C, i_c, m_c, BP: tl.constexpr):
    """The sum of parts [count, C] in their order, of these columns."""
    total = tl.zeros([BP, i_c.shape[0]], tl.float32)
    for start in range(0, count, BP):
        i_p = start + tl.arange(0, BP)
        mask = (i_p < count)[:, None] & m_c[None, :]
        total += tl.load(parts + i_p[:, None] * C + i_c[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@bound
@triton.jit(do_not_specialize=["count"])
def linear_residual_layer_norm_gradients(
    product, weight, scale, bias, parts, dweight, vectors, of_norm, count, C,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """BC rows of dweight [C, K], (dscale, dbias) and (dnorm_weight, dnorm_bias), the last [C]."""
    i_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = i_c < C
    o_row = (i_c.to(tl.int64) * K)[:, None]
    b_s = tl.load(scale + i_c, mask=m_c, other=0.0).to(tl.float32)
    b_sum = _sum_of_parts(parts, count, C, i_c, m_c, BP)
    total = tl.zeros([BC, BK], tl.float32)
    for k in range(0, K, BK):
        i_k = k + tl.arange(0, BK)
        mask = m_c[:, None] & (i_k < K)[None, :]
        at = o_row + i_k[None, :]
        b_p = tl.load(product + at, mask=mask, other=0.0).to(tl.float32)  # [BC, BK]
        total += b_p * tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dweight + at, (b_s[:, None] * b_p).to(dweight.dtype.element_ty), mask=mask)
    dscale = tl.sum(total, 1)
    if HAS_BIAS:
        dscale += tl.load(bias + i_c, mask=m_c, other=0.0).to(tl.float32) * b_sum
    tl.store(vectors + i_c, dscale.to(vectors.dtype.element_ty), mask=m_c)
    tl.store(vectors + C + i_c, (b_s * b_sum).to(vectors.dtype.element_ty), mask=m_c)
    b_dw = _sum_of_parts(parts + count * C, count, C, i_c, m_c, BP)
    b_db = _sum_of_parts(parts + 2 * count * C, count, C, i_c, m_c, BP)
    tl.store(of_norm + i_c, b_dw.to(of_norm.dtype.element_ty), mask=m_c)
    tl.store(of_norm + C + i_c, b_db.to(of_norm.dtype.element_ty), mask=m_c)


# Eight columns of the parts are a sector of memory; C / 8 programs are about one a multiprocessor.
ROWS, COLUMNS, PARTS, WARPS = 8, 512, 64, 8


def launch(
    product: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    parts: Tensor,
    norm_weight: Tensor,
    dweight: Tensor,
    vectors: Tensor,
    of_norm: Tensor,
) -> None:
    """Write the contiguous `dweight` ``[C, K]``, and `vectors` and `of_norm` ``[2, C]``."""
    width, inner = weight.shape
    with device_guard(weight):
        linear_residual_layer_norm_gradients[(cdiv(width, ROWS),)](
            product.contiguous(), weight.contiguous(), scale.contiguous(),
            None if bias is None else bias.contiguous(), parts, dweight, vectors, of_norm,
            parts.shape[1], width, K=inner, HAS_BIAS=bias is not None, BC=ROWS,
            BK=min(COLUMNS, next_power_of_2(inner)), BP=PARTS, num_warps=WARPS,
        )  # fmt: skip
