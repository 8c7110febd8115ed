"""linear_rope_2d: the product that makes q, k and v, and RoPE of q and k in its epilogue.

    q, k, v = split(x @ weight^T + bias);  out = (rope(q), rope(k), v)

(rope_2d.py). q and k are rotated in float32 before they are rounded, in the tile that has just
computed them: no pass over them, and attention has nothing left to rotate. When "auto" takes it is
as for linear_gelu.py; the table of tile sizes is LINEAR_ROPE_2D. The kernel has no gradient of its
own: qkv_attention.py calls it in training too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..replay import replayed
from .linear_gelu import check_bias, check_product, takes_kernel
from .rope_2d import check_constant, check_rope_inputs, check_table, rope_2d_, rope_table
from .torch_op import ops, register_backward


def _empty_output(x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor) -> Tensor:
    head_dim = table.shape[1]
    shape = x.shape[0], 3, weight.shape[0] // (3 * head_dim), head_dim
    return torch.empty(shape, dtype=x.dtype, device=x.device)


register_backward(
    "linear_rope_2d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor table) -> Tensor",
    "linear_rope_2d:forward",
    fake=_empty_output,
)


@replayed
def linear_rope_2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rope: tuple[Tensor, ...],
    *,
    backend: str = "auto",
) -> Tensor:
    """``x @ weight.T + bias`` as q, k and v, with q and k rotated; the Triton path has no gradient.

    Args:
        x: ``[T, C]`` float32, float16 or bfloat16 on the Triton path; any strides.
        weight: ``[3 H D, C]`` in the dtype of `x`, the rows of q, k and v; any strides.
        bias: ``[3 H D]`` in the dtype of `x`, or None.
        rope: ``(coords, inv_freq)`` of :func:`hrvlm_kernels.rope_2d`, where D is four times the
            number of frequencies; a third tensor is the table of
            :func:`hrvlm_kernels.ops.rope_2d.rope_table`: without it every call of the kernel
            writes one.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`; "triton" takes the kernel where it
            was not measured, too.

    Returns:
        ``[T, 3, H, D]`` in the dtype of `x`, contiguous on the Triton path.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on the torch path torch's own errors.
        RuntimeError: "triton" can't run here, or a gradient is needed.
    """
    coords, inv_freq, *tables = rope
    head_dim = 4 * len(inv_freq)
    if weight.ndim != 2 or head_dim == 0 or weight.shape[0] % (3 * head_dim):
        raise ValueError(
            f"weight must be [3 H D, C] with D = 4 * {len(inv_freq)} as inv_freq has it, got "
            f"{tuple(weight.shape)}"
        )
    if not takes_kernel("linear_rope_2d", backend, x, weight, bias):
        qkv = F.linear(x, weight, bias).unflatten(1, (3, -1, head_dim))
        rope_2d_(qkv[:, 0], qkv[:, 1], coords, inv_freq, backend=backend)
        return qkv
    check_product(x, weight=weight)
    if bias is not None:
        check_bias(weight, bias=bias)
    like = x[:, :1, None].expand(-1, 1, head_dim)
    check_rope_inputs(like, like, coords, inv_freq)
    check_table(like, tables[0] if tables else None)
    check_constant(coords, inv_freq)
    table = tables[0] if tables else rope_table(coords, inv_freq)
    return ops.linear_rope_2d(x, weight, bias, table)
