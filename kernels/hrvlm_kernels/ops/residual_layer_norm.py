"""residual_layer_norm: the residual connection with LayerScale and the norm behind it, in one pass.

    out[t, c]    = x[t, c] + scale[c] * update[t, c]
    normed[t, c] = (out[t, c] - mean_c out[t]) / sqrt(var_c out[t] + eps) * weight[c] + bias[c]

LayerScale (Touvron et al. 2021, arXiv 2103.17239) and LayerNorm (Ba et al. 2016): what stands
between two halves of DINOv3's blocks. `out` is read and written once instead of three times.

Gradients, with g and h the cotangents of `out` and `normed`, k = h * weight, xhat the norm before
weight and bias, and means over c:

    dx      = g + (k - mean(k) - xhat * mean(k * xhat)) / sqrt(var + eps)
    dupdate = scale * dx         dscale = sum_t update * dx
    dweight = sum_t h * xhat     dbias  = sum_t h
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import check_floats, choose_backend
from ..replay import replayed
from .torch_op import ops, register, register_backward

MAX_WIDTH = 4096  # the backward of wider rows spills


def _empty_outputs(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    out, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    return out, normed


def _empty_grads(g: Tensor, h: Tensor, out: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.empty(3, out.shape[1], dtype=torch.float32, device=out.device)
    return *_empty_outputs(out), sums


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, update, scale, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(output[0], update, scale, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: checkpointing refuses a second time
    _, _, scale, weight = saved
    dx, dupdate, sums = ops.residual_layer_norm_backward(g, h, *saved, ctx.eps)
    db = None if ctx.bias_dtype is None else sums[2].to(ctx.bias_dtype)
    return dx, dupdate, sums[0].to(scale.dtype), sums[1].to(weight.dtype), db, None


register(
    "residual_layer_norm",
    "(Tensor x, Tensor update, Tensor scale, Tensor weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor)",
    "residual_layer_norm:forward",
    fake=_empty_outputs,
    setup_context=_save,
    backward=_differentiate,
    arguments=lambda x, update, scale, *norm: (x, update, scale, None, *norm),
)
register_backward(
    "residual_layer_norm_backward",
    "(Tensor g, Tensor h, Tensor out, Tensor update, Tensor scale, Tensor weight, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    "residual_layer_norm:backward",
    fake=_empty_grads,
)


@replayed
def residual_layer_norm(
    x: Tensor,
    update: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``x + scale * update``, and the LayerNorm of it.

    The norm sees `out` as it is stored, in the dtype of `x`; all arithmetic is float32.

    Args:
        x: ``[T, C]``, C at most 4096; any strides.
        update: As `x`; cast to its dtype.
        scale: ``[C]``, LayerScale's factors.
        weight: ``[C]`` of the norm.
        bias: ``[C]`` of the norm, or None.
        eps: Added to the variance.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`.

    Returns:
        `out` and `normed`, both ``[T, C]`` in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        RuntimeError: the backend asked for can't run here, or a gradient of the kernels' gradient
            was asked for.
    """
    _check(x, update, {"scale": scale, "weight": weight, "bias": bias})
    update = update.to(x.dtype)
    if choose_backend("residual_layer_norm", backend, x) == "triton":
        return ops.residual_layer_norm(x, update, scale, weight, bias, eps)
    from .. import reference

    return reference.residual_layer_norm(x, update, scale, weight, bias, eps)


def _check(x: Tensor, update: Tensor, parameters: dict[str, Tensor | None]) -> None:
    check_floats(x=x, update=update)
    if x.ndim != 2 or x.shape != update.shape:
        raise ValueError(
            f"x and update must be [T, C] both, got {tuple(x.shape)} and {tuple(update.shape)}"
        )
    if not 0 < x.shape[1] <= MAX_WIDTH:
        raise ValueError(f"x: C must be between 1 and {MAX_WIDTH}, got {x.shape[1]}")
    for name, a in (("update", update), *parameters.items()):
        if a is None:
            continue
        if name != "update" and (a.shape != x.shape[1:] or not a.is_floating_point()):
            raise ValueError(
                f"{name} must be a float tensor [{x.shape[1]}], got {a.dtype} {tuple(a.shape)}"
            )
        if a.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {a.device}")
