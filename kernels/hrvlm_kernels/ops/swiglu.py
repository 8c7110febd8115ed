"""swiglu: the gated activation in the MLP of DINOv3's larger models, in one pass.

    out[t, f] = silu(gate[t, f]) * up[t, f],      silu(a) = a * s(a),      s(a) = 1 / (1 + exp(-a))

Shazeer 2020, arXiv 2002.05202. Neither silu(gate) nor anything else is written beside the result.

Gradients, with g the cotangent of `out` and s = s(gate), which the backward computes again, so that
only gate and up are kept for it:

    dup = g * gate * s,      dgate = g * up * s * (1 + gate * (1 - s))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import check_floats, choose_backend
from ..replay import replayed
from .torch_op import ops, register, register_backward


def _empty_output(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _empty_grads(g: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_output(gate, up), _empty_output(gate, up)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    return ops.swiglu_backward(g, *ctx.saved_tensors)


register(
    "swiglu",
    "(Tensor gate, Tensor up) -> Tensor",
    "swiglu:forward",
    fake=_empty_output,
    setup_context=_save,
    backward=_differentiate,
)
register_backward(
    "swiglu_backward",
    "(Tensor g, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    "swiglu:backward",
    fake=_empty_grads,
)


@replayed
def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """``silu(gate) * up``, the arithmetic in float32 on the Triton path.

    Args:
        gate: ``[T, F]`` float32, float16 or bfloat16 (the torch path: also float64); any strides,
            so the halves of one ``[T, 2F]`` product are read where they are.
        up: As `gate`, in its dtype.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`.

    Returns:
        ``[T, F]`` in the dtype of `gate`, contiguous on the Triton path.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        RuntimeError: the backend asked for can't run here, or a gradient of the kernels' gradient
            was asked for.
    """
    check_floats(gate=gate, up=up)
    if gate.ndim != 2 or gate.shape != up.shape:
        raise ValueError(
            f"gate and up must be [T, F] both, got {tuple(gate.shape)} and {tuple(up.shape)}"
        )
    if gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            "gate and up must have one dtype and device, "
            f"got {gate.dtype} on {gate.device} and {up.dtype} on {up.device}"
        )
    if choose_backend("swiglu", backend, gate) == "triton":
        return ops.swiglu(gate, up)
    from .. import reference

    return reference.swiglu(gate, up)
