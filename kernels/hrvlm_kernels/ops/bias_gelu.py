"""bias_gelu: the exact GELU of a product and its bias.

    out[t, f] = z Phi(z),  z = x[t, f] + bias[f],  Phi(z) = (1 + erf(z / sqrt(2))) / 2

(Hendrycks and Gimpel 2016, arXiv 1606.08415). With the gradient's

    dx[t, f] = g[t, f] (Phi(z) + z phi(z))       phi(z) = exp(-z^2 / 2) / sqrt(2 pi)

the sum over the tokens that is the bias's gradient is had on the way, instead of reading dx again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .torch_op import ops, register, register_backward


def _empty_output(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    return ops.bias_gelu_backward(g.contiguous(), *ctx.saved_tensors)


def _empty_grads(g: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dx, dbias = (torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in (x, bias))
    return dx, dbias


register(
    "bias_gelu",
    "(Tensor x, Tensor bias) -> Tensor",
    "bias_gelu:forward",
    fake=_empty_output,
    setup_context=_save,
    backward=_differentiate,
)
register_backward(
    "bias_gelu_backward",
    "(Tensor g, Tensor x, Tensor bias) -> (Tensor, Tensor)",
    "bias_gelu:backward",
    fake=_empty_grads,
)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """``gelu(x + bias)`` by the kernels, in float32 throughout; `x` ``[T, F]`` is contiguous."""
    return ops.bias_gelu(x, bias)
