"""rope_2d: DINOv3's axial rotary position embedding on packed q and k.

    angle[t, j]         = 2 pi * y[t] * inv_freq[j]            j in [0, D/4)
    angle[t, D/4 + j]   = 2 pi * x[t] * inv_freq[j]
    first  = a[:D/2] * cos(angle) - a[D/2:] * sin(angle)
    second = a[D/2:] * cos(angle) + a[:D/2] * sin(angle)

for each head vector ``a`` of token t (DINOv3's ``layers/rope_position_encoding.py`` and
``layers/attention.py``: the D/2 angles are tiled twice and the halves rotated). Angle, cos, sin and
the rotation are float32 whatever the dtype of q and k. Tokens at (0, 0), the prefix tokens, pass
through unchanged. The backward is the inverse rotation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import resolve


def rope_2d(
    q: Tensor, k: Tensor, coords: Tensor, inv_freq: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by their tokens' positions; returns new tensors.

    Args:
        q: ``[T, H, D]`` float32, float16 or bfloat16; may be a strided slice of a packed qkv, last
            stride 1.
        k: ``[T, Hk, D]``, as `q`.
        coords: ``[T, 2]`` float32 (y, x), e.g. ``PackedGrids.coords``.
        inv_freq: ``[D / 4]`` float32.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`.

    Returns:
        The rotated q and k, shapes and dtypes unchanged.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        RuntimeError: the backend asked for can't run here.
    """
    check_rope_inputs(q, k, coords, inv_freq)
    if resolve("rope_2d", backend, q) == "triton":
        from .rope_2d_triton import rope_2d as rope_2d_kernel

        return rope_2d_kernel(q, k, coords, inv_freq)
    return _rope_2d_eager(q, k, coords, inv_freq)


def _rope_2d_eager(q: Tensor, k: Tensor, coords: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    from . import reference

    upcast = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_out, k_out = reference.rope_2d(q, k, coords, inv_freq, upcast=upcast)
    return q_out.to(q.dtype), k_out.to(k.dtype)


def check_rope_inputs(q: Tensor, k: Tensor, coords: Tensor, inv_freq: Tensor) -> None:
    """Raise ValueError unless the four tensors fit together as :func:`rope_2d` needs them."""
    if q.ndim != 3 or k.ndim != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            "q and k must be [T, H, D] with equal T and D, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    tokens, head_dim = q.shape[0], q.shape[2]
    if head_dim % 4:
        raise ValueError(
            f"q: head_dim must be a multiple of 4 (two axes, two halves), got {head_dim}"
        )
    if q.dtype != k.dtype:
        raise ValueError(f"q and k must have one dtype, got {q.dtype} and {k.dtype}")
    if coords.shape != (tokens, 2) or coords.dtype != torch.float32:
        raise ValueError(
            f"coords must be float32 [{tokens}, 2], got {coords.dtype} {tuple(coords.shape)}"
        )
    if inv_freq.shape != (head_dim // 4,) or inv_freq.dtype != torch.float32:
        raise ValueError(
            f"inv_freq must be float32 [{head_dim // 4}], "
            f"got {inv_freq.dtype} {tuple(inv_freq.shape)}"
        )
    if len({q.device, k.device, coords.device, inv_freq.device}) > 1:
        raise ValueError(
            f"q, k, coords and inv_freq must be on one device, got {q.device}, {k.device}, "
            f"{coords.device}, {inv_freq.device}"
        )
