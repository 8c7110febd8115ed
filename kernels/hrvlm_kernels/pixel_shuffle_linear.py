"""pixel_shuffle_linear: space-to-depth over packed rectangular grids, fused with its projection.

    rows[m, (dy * s + dx) * C + c] = x[row of patch (i * s + dy, j * s + dx), c]
    out[m, n]                      = sum_k rows[m, k] * weight[n, k] + bias[n]

for output token m at (i, j), in nanoVLM's order (``models/modality_projector.py``);
output tokens run row by row over each
image's token grid, image after image, and prefix tokens are dropped.
"""

from __future__ import annotations

from torch import Tensor

from .backends import resolve
from .packed_grids import PackedGrids


def pixel_shuffle_linear(
    x: Tensor,
    packed: PackedGrids,
    factor: int,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Project s x s patches of each image onto one output token.

    Args:
        x: ``[T, C]`` packed tokens, prefix tokens included; rows may be strided.
        packed: Their layout.
        factor: Pixel-shuffle factor s; must divide every patch grid.
        weight: ``[N, s*s*C]``.
        bias: ``[N]`` or None.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`.

    Returns:
        ``[sum gh*gw, N]`` in the dtype of `x`.

    Raises:
        ValueError: the factor does not divide an image's grid, or shapes, dtypes or devices do not
            fit.
        RuntimeError: the backend asked for can't run here.
    """
    check_pixel_shuffle_inputs(x, packed, factor, weight, bias)
    if resolve("pixel_shuffle_linear", backend, x) == "triton":
        from .pixel_shuffle_linear_triton import pixel_shuffle_linear as pixel_shuffle_linear_kernel

        return pixel_shuffle_linear_kernel(x, packed, factor, weight, bias)
    from . import reference

    return reference.pixel_shuffle_linear(x, packed, factor, weight, bias)


def check_pixel_shuffle_inputs(
    x: Tensor, packed: PackedGrids, factor: int, weight: Tensor, bias: Tensor | None
) -> None:
    """Raise ValueError unless the tensors fit the layout."""
    packed.shuffle_index(factor)  # raises when the factor does not divide a grid
    if x.ndim != 2:
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
    devices = {x.device, packed.device, weight.device} | (
        {bias.device} if bias is not None else set()
    )
    if len(devices) > 1:
        raise ValueError(
            f"x, packed, weight and bias must be on one device, got {sorted(map(str, devices))}"
        )
