"""linear_residual_layer_norm: a product, the residual connection behind it, and the next norm.

    out    = x + scale * (a @ weight^T + bias)
    normed = LayerNorm(out)

in training, where the product's result and the scaled gradient of it would each cost memory: the
product itself is torch's, and everything beside it is one pass forward and one backward. With s the
sum over the tokens of dx, the gradient of `out` with what comes through the norm (see
residual_layer_norm.py), and P = dx^T @ a:

    da      = (scale * dx) @ weight          dweight = scale * P
    dscale  = sum_k P * weight + bias * s    dbias   = scale * s

so that the backward needs no result of the product, and none is kept.

Its other half is :func:`shifted_layer_norm`, for inference, where the scale can be folded into the
weight: then the product adds to x in place, and what is left of the connection is its bias, which
the norm adds as it reads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .torch_op import ops, register_backward


def _empty_pair(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    out, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    return out, normed


def _empty_like_x(x: Tensor, *others: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _empty_grads(
    g: Tensor, h: Tensor, out: Tensor, scale: Tensor, weight: Tensor, eps: float, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    parts = torch.empty(3, count, out.shape[1], dtype=torch.float32, device=out.device)
    return *_empty_pair(out), parts


def _empty_parameter_grads(
    product: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, parts: Tensor,
    norm_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    vectors = torch.empty(2, len(scale), dtype=scale.dtype, device=scale.device)
    of_norm = torch.empty(2, len(scale), dtype=norm_weight.dtype, device=scale.device)
    return dweight, vectors, of_norm


register_backward(
    "biased_residual_layer_norm",
    "(Tensor x, Tensor update, Tensor scale, Tensor? shift, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor)",
    "residual_layer_norm:forward",
    fake=_empty_pair,
)
register_backward(
    "biased_residual_layer_norm_backward",
    "(Tensor g, Tensor h, Tensor out, Tensor scale, Tensor weight, float eps, int count) "
    "-> (Tensor, Tensor, Tensor)",
    "residual_layer_norm:backward_in_parts",
    fake=_empty_grads,
)
register_backward(
    "linear_residual_gradients",
    "(Tensor product, Tensor weight, Tensor scale, Tensor? bias, Tensor parts, Tensor norm_weight) "
    "-> (Tensor, Tensor, Tensor)",
    "linear_residual_layer_norm:launch",
    fake=_empty_parameter_grads,
)
register_backward(
    "shifted_layer_norm",
    "(Tensor x, Tensor? shift, Tensor weight, Tensor? bias, float eps) -> Tensor",
    "residual_layer_norm:forward_shifted",
    fake=_empty_like_x,
)


class _LinearResidualLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor,
        norm_weight: Tensor, norm_bias: Tensor | None, eps: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        update = F.linear(a, weight)
        out, normed = ops.biased_residual_layer_norm(
            x, update, scale, bias, norm_weight, norm_bias, eps
        )
        ctx.save_for_backward(a, weight, bias, scale, norm_weight, out)
        ctx.eps, ctx.has_norm_bias = eps, norm_bias is not None
        ctx.set_materialize_grads(False)
        return out, normed

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        a, weight, bias, scale, norm_weight, out = ctx.saved_tensors
        g, h = (torch.zeros_like(out) if grad is None else grad for grad in (g, h))
        from ..triton_kernels.residual_layer_norm import count_parts

        dx, dupdate, parts = ops.biased_residual_layer_norm_backward(
            g, h, out, scale, norm_weight, ctx.eps, count_parts(out)
        )
        da = dupdate @ weight if ctx.needs_input_grad[1] else None
        if not any(ctx.needs_input_grad[2:]):
            return dx, da, *[None] * 6
        dweight, vectors, of_norm = ops.linear_residual_gradients(
            dx.T @ a, weight, scale, bias, parts, norm_weight
        )
        dbias = None if bias is None else vectors[1].to(bias.dtype)
        dnorm_bias = of_norm[1] if ctx.has_norm_bias else None
        return dx, da, dweight, dbias, vectors[0], of_norm[0], dnorm_bias, None


def linear_residual_layer_norm(
    x: Tensor,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``out = x + scale * (a @ weight.T + bias)`` and its LayerNorm, by the kernels.

    Args:
        x: ``[T, C]``, contiguous as all others.
        a: ``[T, K]`` in the dtype of `x`.
        weight: ``[C, K]``, likewise.
        bias: ``[C]`` or None.
        scale: ``[C]``, LayerScale's factors.
        norm_weight: ``[C]``.
        norm_bias: ``[C]`` or None.
        eps: Added to the variance.
    """
    return _LinearResidualLayerNorm.apply(x, a, weight, bias, scale, norm_weight, norm_bias, eps)


def shifted_layer_norm(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """LayerNorm of ``x + shift``, a float32 sum ``[T, C]`` that is never written; no gradient."""
    return ops.shifted_layer_norm(x, shift, weight, bias, eps)
