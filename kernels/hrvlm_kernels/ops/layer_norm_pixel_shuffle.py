"""layer_norm_pixel_shuffle: the encoder's last LayerNorm, stored in pixel-shuffled order.

    xhat[t, c]                     = (x[t, c] - mean_c x[t]) / sqrt(var_c x[t] + eps)
    rows[m, (dy * s + dx) * C + c] = xhat[t, c] * weight[c] + bias[c]

for output token m at (i, j) and t the row of patch (i * s + dy, j * s + dx): ``pixel_shuffle`` of
``layer_norm(x)`` (Ba et al. 2016; the order of nanoVLM's ``models/modality_projector.py``), prefix
tokens dropped. The norm reads and writes every token anyway, so the shuffle costs no pass of its
own, and the projection that follows is the library's plain GEMM: the second route, beside
pixel_shuffle_linear, from the encoder's last block to the language model.

Gradients, with g = d rows, h = g * weight and means over c:

    dx[t]          = (h - mean(h) - xhat * mean(h * xhat)) / sqrt(var + eps)
    dx[prefix row] = 0
    dweight        = sum_t g * xhat              dbias = sum_t g
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import check_floats, check_result_dtype, choose_backend
from ..packed_grids import PackedGrids, check_packed
from .pixel_shuffle_linear import check_pixel_shuffle_inputs, compute_dtype, pixel_shuffle_linear
from .torch_op import ops, register, register_backward

MAX_CHANNELS = 8192
ROUTES = ("auto", "fused", "layernorm_gemm")


def _empty_rows(
    x: Tensor,
    index: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    num_prefix_tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(index.shape[0], index.shape[1] * x.shape[1], dtype=dtype, device=x.device)


def _empty_grads(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, torch.empty(2, x.shape[1], dtype=torch.float32, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, cu_seqlens, weight, bias, ctx.eps, ctx.num_prefix_tokens, _ = inputs
    ctx.save_for_backward(x, index, cu_seqlens, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, index, cu_seqlens, weight = ctx.saved_tensors
    dx, sums = ops.layer_norm_pixel_shuffle_backward(
        dy, x, index, cu_seqlens, weight, ctx.eps, ctx.num_prefix_tokens
    )
    db = None if ctx.bias_dtype is None else sums[1].to(ctx.bias_dtype)
    return dx, None, None, sums[0].to(weight.dtype), db, None, None, None


register(
    "layer_norm_pixel_shuffle",
    "(Tensor x, Tensor index, Tensor cu_seqlens, Tensor weight, Tensor? bias, float eps, "
    "int num_prefix_tokens, ScalarType dtype) -> Tensor",
    "layer_norm_pixel_shuffle:forward",
    fake=_empty_rows,
    setup_context=_save,
    backward=_differentiate,
    arguments=lambda x, index, _, weight, bias, eps, *others: (x, index, weight, bias, eps),
)
register_backward(
    "layer_norm_pixel_shuffle_backward",
    "(Tensor dy, Tensor x, Tensor index, Tensor cu_seqlens, Tensor weight, float eps, "
    "int num_prefix_tokens) -> (Tensor, Tensor)",
    "layer_norm_pixel_shuffle:backward",
    fake=_empty_grads,
)


def layer_norm_pixel_shuffle(
    x: Tensor,
    packed: PackedGrids,
    factor: int,
    norm_weight: Tensor,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Normalise each token and gather s x s patches of each image into one row.

    Prefix tokens are dropped. Mean, variance and the affine map are float32 whatever the dtypes.

    Args:
        x: ``[T, C]`` packed tokens, prefix tokens included, C at most 8192; rows may be strided.
        packed: Their layout.
        factor: Pixel-shuffle factor s; must divide every patch grid.
        norm_weight: ``[C]``, any float dtype.
        norm_bias: ``[C]`` or None.
        eps: Added to the variance.
        dtype: Of the result; default: that of `x`.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`.

    Returns:
        ``[sum gh*gw, s*s*C]``, in (dy, dx, channel) order.

    Raises:
        ValueError: the factor does not divide an image's grid, or shapes, dtypes or devices do not
            fit.
        RuntimeError: the backend asked for can't run here.
    """
    _check_norm(x, packed, factor, norm_weight, norm_bias)
    dtype = x.dtype if dtype is None else dtype
    check_result_dtype(dtype)
    if choose_backend("layer_norm_pixel_shuffle", backend, x) == "triton":
        return ops.layer_norm_pixel_shuffle(
            x,
            packed.shuffle_index(factor),
            packed.cu_seqlens,
            norm_weight,
            norm_bias,
            eps,
            packed.num_prefix_tokens,
            dtype,
        )
    from .. import reference

    return reference.pixel_shuffle(
        _layer_norm(x, norm_weight, norm_bias, eps).to(dtype), packed, factor
    )


def layer_norm_pixel_shuffle_linear(
    x: Tensor,
    packed: PackedGrids,
    factor: int,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    route: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """``pixel_shuffle_linear(layer_norm(x), ...)``, by one of two routes.

    Args:
        x: ``[T, C]`` packed tokens before the norm.
        packed: Their layout.
        factor: Pixel-shuffle factor s.
        norm_weight: ``[C]``.
        norm_bias: ``[C]`` or None.
        eps: Added to the variance.
        weight: ``[N, s*s*C]``; mixed dtypes and autocast as in :func:`pixel_shuffle_linear`.
        bias: ``[N]`` or None.
        route: "fused": a plain LayerNorm, then the kernel that gathers while it multiplies;
            "layernorm_gemm": :func:`layer_norm_pixel_shuffle`, then the library's GEMM;
            "auto": as :func:`choose_route` says.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`.

    Returns:
        ``[sum gh*gw, N]`` in the dtype of `x`, or autocast's.

    Raises:
        ValueError: unknown route, the factor does not divide an image's grid, or shapes, dtypes or
            devices do not fit.
        RuntimeError: the backend asked for can't run here.
    """
    if route not in ROUTES:
        raise ValueError(f"route must be one of {', '.join(ROUTES)}; got {route!r}")
    check_pixel_shuffle_inputs(x, packed, factor, weight, bias)
    dtype = compute_dtype(x)
    if route == "auto":
        route = choose_route(weight.shape[0], x.shape[1])
    if route == "fused":
        _check_norm(x, packed, factor, norm_weight, norm_bias)
        normed = _layer_norm(x, norm_weight, norm_bias, eps).to(dtype)
        return pixel_shuffle_linear(normed, packed, factor, weight, bias, backend=backend)
    rows = layer_norm_pixel_shuffle(
        x, packed, factor, norm_weight, norm_bias, eps, dtype=dtype, backend=backend
    )
    return F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))


def choose_route(out_features: int, channels: int) -> str:
    """The route for a projection from `channels` per patch to `out_features`.

    The fused kernel saves one copy of the tokens, which weighs most beside a small product; what
    the library's GEMM gains grows with N. "fused" for ``N <= C``, else "layernorm_gemm": where they
    cross has not been measured on a GPU yet.
    """
    return "fused" if out_features <= channels else "layernorm_gemm"


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm in the dtype of `x`, with float32 statistics."""
    return F.layer_norm(
        x, x.shape[-1:], weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps
    )


def _check_norm(
    x: Tensor, packed: PackedGrids, factor: int, weight: Tensor, bias: Tensor | None
) -> None:
    check_packed(packed, x=x, norm_weight=weight)
    check_floats(x=x)
    packed.shuffle_index(factor)  # raises when the factor does not divide a grid
    if x.ndim != 2:
        raise ValueError(f"x must be [T, C], got {tuple(x.shape)}")
    packed.check_rows(x, "x")
    if not 0 < x.shape[1] <= MAX_CHANNELS:
        raise ValueError(f"x: C must be between 1 and {MAX_CHANNELS}, got {x.shape[1]}")
    for name, a in (("norm_weight", weight), ("norm_bias", bias)):
        if a is not None and (a.shape != x.shape[1:] or not a.is_floating_point()):
            raise ValueError(
                f"{name} must be a float tensor [{x.shape[1]}], got {a.dtype} {tuple(a.shape)}"
            )
        if a is not None and a.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {a.device}")
    if packed.device != x.device:
        raise ValueError(f"x and packed must be on one device, got {x.device} and {packed.device}")
