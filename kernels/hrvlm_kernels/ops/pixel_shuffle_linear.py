"""pixel_shuffle_linear: space-to-depth over packed rectangular grids, fused with its projection.

    rows[m, (dy * s + dx) * C + c] = x[row of patch (i * s + dy, j * s + dx), c]
    out[m, n]                      = sum_k rows[m, k] * weight[n, k] + bias[n]

for output token m at (i, j), in nanoVLM's order (``models/modality_projector.py``); output tokens
run row by row over each image's token grid, image after image, and prefix tokens are dropped. Other
models' orders are presets (``merge_orders.py``).

Gradients, with g = d out ``[M, N]``:

    dx[row of k's patch, c] = sum_n g[m, n] * weight[n, k]      dweight = g.T @ rows
    dx[prefix rows]         = 0                                 dbias   = sum_m g[m]

Every patch belongs to one output token, so each row of dx is written once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import autocasts, check_floats, choose_backend
from ..merge_orders import merge_order, patch_columns
from ..packed_grids import PackedGrids, check_packed
from .torch_op import ops, register, register_backward


def _empty_output(x: Tensor, index: Tensor, cu_seqlens: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return torch.empty(index.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)


def _empty_dx(
    dy: Tensor,
    weight: Tensor,
    index: Tensor,
    cu_seqlens: Tensor,
    num_prefix_tokens: int,
    total_tokens: int,
) -> Tensor:
    width = weight.shape[1] // index.shape[1]
    return torch.empty(total_tokens, width, dtype=dy.dtype, device=dy.device)


def _empty_dweight(dy: Tensor, x: Tensor, index: Tensor) -> Tensor:
    return torch.empty(dy.shape[1], index.shape[1] * x.shape[1], dtype=x.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, cu_seqlens, weight, _, num_prefix_tokens = inputs
    needs_x, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    ctx.save_for_backward(
        x if needs_weight else None, index, cu_seqlens, weight if needs_x else None
    )
    ctx.num_prefix_tokens, ctx.total_tokens = num_prefix_tokens, x.shape[0]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, index, cu_seqlens, weight = ctx.saved_tensors
    prefix = ctx.num_prefix_tokens
    needs_x, needs_weight, needs_bias = (ctx.needs_input_grad[i] for i in (0, 3, 4))
    dx = dw = db = None
    if needs_x:
        dx = ops.pixel_shuffle_linear_dx(dy, weight, index, cu_seqlens, prefix, ctx.total_tokens)
    if needs_weight:
        dw = ops.pixel_shuffle_linear_dweight(dy, x, index)
    if needs_bias:
        db = dy.sum(0)
    return dx, None, None, dw, db, None


register(
    "pixel_shuffle_linear",
    "(Tensor x, Tensor index, Tensor cu_seqlens, Tensor weight, Tensor? bias, "
    "int num_prefix_tokens) -> Tensor",
    "pixel_shuffle_linear:forward",
    fake=_empty_output,
    setup_context=_save,
    backward=_backward,
    arguments=lambda x, index, _, weight, bias, prefix: (x, index, weight, bias),
)
register_backward(
    "pixel_shuffle_linear_dx",
    "(Tensor dy, Tensor weight, Tensor index, Tensor cu_seqlens, int num_prefix_tokens, "
    "SymInt total_tokens) -> Tensor",
    "pixel_shuffle_linear_backward:backward_dx",
    fake=_empty_dx,
    arguments=lambda *args: args[:-1],
)
register_backward(
    "pixel_shuffle_linear_dweight",
    "(Tensor dy, Tensor x, Tensor index) -> Tensor",
    "pixel_shuffle_linear_backward:backward_dweight",
    fake=_empty_dweight,
)


def pixel_shuffle_linear(
    x: Tensor,
    packed: PackedGrids,
    factor: int,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: str = "nanovlm",
    backend: str = "auto",
) -> Tensor:
    """Project s x s patches of each image onto one output token.

    Mixed dtypes: `weight` and `bias` are cast to the dtype of `x`, and their gradients come back in
    their own; under autocast all three are cast to its dtype, as ``F.linear`` does.

    For one graph of torch.compile for all packings, call ``packed.shuffle_index(factor, order)``
    once outside it: a table that is first made inside is traced with its grids.

    Args:
        x: ``[T, C]`` packed tokens, prefix tokens included; rows may be strided.
        packed: Their layout.
        factor: Pixel-shuffle factor s; must divide every patch grid.
        weight: ``[N, s*s*C]``.
        bias: ``[N]`` or None.
        order: Of patches, of the weight's columns and of tokens, as one of
            :data:`~hrvlm_kernels.merge_orders.MERGE_ORDERS` has them: "nanovlm", "raster",
            "internvl_v2" (these three are one), "internvl_v1", "qwen", "mistral" or "glm". With
            the last two the kernels are given a copy of `weight`, its columns in their order.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`; "eager" gathers first and calls the
            library's GEMM.

    Returns:
        ``[sum gh*gw, N]`` in the dtype of `x`, or autocast's.

    Raises:
        ValueError: the factor does not divide an image's grid, shapes, dtypes or devices do not
            fit, or there is no such order.
        RuntimeError: the backend asked for can't run here.
    """
    merged = merge_order(order)
    check_pixel_shuffle_inputs(x, packed, factor, weight, bias, order)
    dtype = compute_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if choose_backend("pixel_shuffle_linear", backend, x) == "triton":
        index, prefix = packed.shuffle_index(factor, order), packed.num_prefix_tokens
        weight = patch_columns(weight, factor, merged)
        return ops.pixel_shuffle_linear(x, index, packed.cu_seqlens, weight, bias, prefix)
    from .. import reference

    return reference.pixel_shuffle_linear(x, packed, factor, weight, bias, order=order)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with `x`: its own, or autocast's where that would cast it."""
    if x.dtype != torch.float64 and autocasts(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def check_pixel_shuffle_inputs(
    x: Tensor,
    packed: PackedGrids,
    factor: int,
    weight: Tensor,
    bias: Tensor | None,
    order: str = "nanovlm",
) -> None:
    """Raise ValueError unless the tensors fit the layout."""
    check_packed(packed, x=x, weight=weight)
    check_floats(x=x)
    packed.shuffle_index(factor, order)  # raises when the factor does not divide a grid
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x must be [T, C], got {tuple(x.shape)}")
    packed.check_rows(x, "x")
    width = factor * factor * x.shape[1]
    if weight.ndim != 2 or weight.shape[1] != width:
        raise ValueError(
            f"weight must be [N, factor**2 * C] = [N, {width}] for factor {factor} and "
            f"C = {x.shape[1]}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    for name, a in (("weight", weight), ("bias", bias)):
        if a is not None and not a.is_floating_point():
            raise ValueError(f"{name} must be a float tensor, got {a.dtype}")
    devices = {x.device, packed.device, weight.device} | (
        {bias.device} if bias is not None else set()
    )
    if len(devices) > 1:
        raise ValueError(
            f"x, packed, weight and bias must be on one device, got {sorted(map(str, devices))}"
        )
