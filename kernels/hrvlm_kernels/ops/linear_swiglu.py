"""linear_swiglu: both products before SwiGLU's gate, and the gate in their epilogue, for inference.

    out[t, f] = silu(x[t] . gate[f] + gate_bias[f]) * (x[t] . up[f] + up_bias[f])

(Shazeer 2020, arXiv 2002.05202; swiglu.py). Neither product is written. When "auto" takes it, and
that it has no gradient, is as for linear_gelu.py; the table is LINEAR_SWIGLU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..replay import replayed
from .linear_gelu import check_bias, check_product, takes_kernel
from .swiglu import swiglu
from .torch_op import ops, register_backward


def _empty_output(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None
) -> Tensor:
    return torch.empty(x.shape[0], gate.shape[0], dtype=x.dtype, device=x.device)


register_backward(
    "linear_swiglu",
    "(Tensor x, Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias) -> Tensor",
    "linear_swiglu:forward",
    fake=_empty_output,
)


@replayed
def linear_swiglu(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """``silu(x @ gate.T + gate_bias) * (x @ up.T + up_bias)``; the Triton path has no gradient.

    Args:
        x: ``[T, C]`` float32, float16 or bfloat16 on the Triton path; any strides.
        gate: ``[F, C]`` in the dtype of `x`.
        up: As `gate`, and with its strides.
        gate_bias: ``[F]`` in the dtype of `x`, or None.
        up_bias: As `gate_bias`; both or none.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`; "triton" takes the kernel where it
            was not measured, too.

    Returns:
        ``[T, F]`` in the dtype of `x`, contiguous on the Triton path.

    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit; on the torch path torch's own
            errors.
        RuntimeError: "triton" can't run here, or a gradient is needed.
    """
    if not takes_kernel("linear_swiglu", backend, x, gate, up, gate_bias, up_bias):
        return swiglu(F.linear(x, gate, gate_bias), F.linear(x, up, up_bias), backend=backend)
    check_product(x, gate=gate, up=up)
    if gate.stride() != up.stride():
        raise ValueError(f"up must have the strides of gate, {gate.stride()}, got {up.stride()}")
    if (gate_bias is None) != (up_bias is None):
        raise ValueError("gate_bias and up_bias must both be given, or none")
    if gate_bias is not None and up_bias is not None:
        check_bias(gate, gate_bias=gate_bias, up_bias=up_bias)
    return ops.linear_swiglu(x, gate, up, gate_bias, up_bias)
