"""varlen_attention: bidirectional softmax attention inside each segment of a packed batch.

    out[t, h] = sum_u softmax_u(scale * q[t, h] . k[u, h]) v[u, h]       u over the segment of t

FlashAttention-2 (Dao 2023) over a list of tiles made on the host: no padding, no mask, nothing
between segments. Windows (Qwen2.5-VL's tower, say) are just more, shorter segments:
``PackedGrids.from_cu_seqlens(window_ends)``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import resolve
from .packed_grids import PackedGrids


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: PackedGrids,
    scale: float | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Attention of each image over itself.

    Args:
        q: ``[T, H, D]``; may be a strided slice of a packed qkv, last stride 1.
        k: ``[T, Hk, D]``; Hk divides H.
        v: As `k`.
        packed: Layout of the T tokens.
        scale: Factor of the scores; ``D ** -0.5`` when None.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`.

    Returns:
        ``[T, H, D]`` in the dtype of `q`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        RuntimeError: the backend asked for can't run here.
    """
    check_attention_inputs(q, k, v, packed)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = resolve("varlen_attention", backend, q)
    if chosen == "triton":
        from .varlen_attention_triton import varlen_attention as varlen_attention_kernel

        return varlen_attention_kernel(q, k, v, packed, scale)
    if chosen == "flash_attn":
        raise NotImplementedError
    if chosen == "sdpa":
        return _sdpa(q, k, v, packed, scale)
    from . import reference

    return reference.varlen_attention(q, k, v, packed, scale)[0]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, packed: PackedGrids, scale: float) -> Tensor:
    """One scaled_dot_product_attention call per run of equally long segments, never with a mask."""
    outputs, start = [], 0
    for count, length in _runs(packed.lengths):
        rows = slice(start, start + count * length)
        q_i, k_i, v_i = (a[rows].unflatten(0, (count, length)).transpose(1, 2) for a in (q, k, v))
        out = F.scaled_dot_product_attention(
            q_i, k_i, v_i, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        start = rows.stop
    if not outputs:
        return torch.zeros_like(q)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _runs(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(count, length) of neighbouring segments of equal length; empty segments are left out."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][1] == length:
            runs[-1] = (runs[-1][0] + 1, length)
        elif length:
            runs.append((1, length))
    return runs


def check_attention_inputs(q: Tensor, k: Tensor, v: Tensor, packed: PackedGrids) -> None:
    """Raise ValueError unless the tensors fit the layout as :func:`varlen_attention` needs them."""
    if (
        q.ndim != 3
        or k.ndim != 3
        or k.shape != v.shape
        or q.shape[0] != k.shape[0]
        or q.shape[2] != k.shape[2]
    ):
        raise ValueError(
            "q must be [T, H, D], k and v [T, Hk, D] with equal T and D; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: its {k.shape[1]} heads must divide the {q.shape[1]} heads of q")
    packed.check_rows(q, "q")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if len({q.device, k.device, v.device, packed.device}) > 1:
        raise ValueError(
            f"q, k, v and packed must be on one device, got {q.device}, {k.device}, {v.device}, "
            f"{packed.device}"
        )
