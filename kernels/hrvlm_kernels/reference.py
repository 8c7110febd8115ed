"""Plain PyTorch versions of the ops: the specification that the kernels are checked against.

`upcast` picks the precision: ``torch.float64`` or ``torch.float32`` computes and returns in that
dtype (the oracle); None computes in the inputs' own dtype (the baseline whose error a kernel has to
beat). All of it is differentiable by autograd. The kernels never import this file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .merge_orders import merge_order
from .packed_grids import PackedGrids


def rope_angles(coords: Tensor, inv_freq: Tensor) -> Tensor:
    """Angles ``2 pi * coord * inv_freq``, y frequencies then x frequencies.

    DINOv3's ``layers/rope_position_encoding.py``, which then tiles them twice: one angle for both
    halves of a head.

    Args:
        coords: ``[T, 2]`` (y, x).
        inv_freq: ``[D / 4]``.

    Returns:
        ``[T, D / 2]`` in the dtype of `coords`.
    """
    return (2 * math.pi * coords[:, :, None] * inv_freq.to(coords.dtype)).flatten(1)


def rope_2d(
    q: Tensor, k: Tensor, coords: Tensor, inv_freq: Tensor, *, upcast: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate both halves of each head ``[T, H, D]``: ``(a1 cos - a2 sin, a2 cos + a1 sin)``.

    The angles are never computed below float32; with ``upcast=None`` cos and sin are then rounded
    to the dtype of `q`, as transformers' DINOv3 does.
    """
    dtype = upcast or q.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = rope_angles(coords.to(wide), inv_freq)[:, None]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return rotate(q.to(dtype), cos, sin), rotate(k.to(dtype), cos, sin)


def rotate(a: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads ``[T, H, D]`` by angles whose cos and sin are ``[T, 1, D / 2]``."""
    first, second = a.chunk(2, dim=-1)
    rotated = (
        torch.addcmul(first * cos, second, sin, value=-1),
        torch.addcmul(second * cos, first, sin),
    )
    return torch.cat(rotated, dim=-1)


def pixel_shuffle(x: Tensor, packed: PackedGrids, factor: int, *, order: str = "nanovlm") -> Tensor:
    """Gather ``factor x factor`` patches into one row, by default in order (dy, dx, channel).

    nanoVLM's ``models/modality_projector.py``, for rectangles; prefix tokens are dropped.

    Args:
        x: ``[T, C]`` packed tokens.
        packed: Their layout.
        factor: Pixel-shuffle factor s.
        order: A name of :data:`~hrvlm_kernels.merge_orders.MERGE_ORDERS`.

    Returns:
        ``[sum gh*gw, s*s*C]``.
    """
    packed.check_rows(x, "x")
    rows = x[packed.shuffle_index(factor, order)]  # [M, s*s, C]
    return (rows if merge_order(order).columns == "patches" else rows.transpose(1, 2)).flatten(1)


def pixel_shuffle_linear(
    x: Tensor,
    packed: PackedGrids,
    factor: int,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: str = "nanovlm",
    upcast: torch.dtype | None = None,
) -> Tensor:
    """:func:`pixel_shuffle`, then ``@ weight.T + bias``; `weight` is ``[N, s*s*C]``."""
    dtype = upcast or x.dtype
    rows = pixel_shuffle(x, packed, factor, order=order).to(dtype)
    return F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))


def residual_layer_norm(
    x: Tensor,
    update: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    upcast: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``out = x + scale * update`` and the LayerNorm of `out`, all ``[T, C]``."""
    dtype = upcast or x.dtype
    x, update, scale, weight = (a.to(dtype) for a in (x, update, scale, weight))
    out = torch.addcmul(x, update, scale)
    bias = None if bias is None else bias.to(dtype)
    return out, F.layer_norm(out, out.shape[-1:], weight, bias, eps)


def swiglu(gate: Tensor, up: Tensor, *, upcast: torch.dtype | None = None) -> Tensor:
    """``silu(gate) * up``, all ``[T, F]``."""
    dtype = upcast or gate.dtype
    return F.silu(gate.to(dtype)) * up.to(dtype)


def normalize_patchify(
    images: Sequence[Tensor],
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    upcast: torch.dtype = torch.float32,
) -> Tensor:
    """``(pixel / 255 - mean) / std``, a row for each patch; uint8 has no precision of its own.

    Args:
        images: ``[B, 3, H, W]`` uint8 each.
        patch_size: Side p of a patch.
        mean: Of red, green and blue, on the scale of [0, 1].
        std: Likewise.
        upcast: Precision and dtype of the result.

    Returns:
        ``[sum B*hp*wp, 3*p*p]``, each row in the order (channel, dy, dx).
    """
    p, rows = patch_size, []
    for image in images:
        batch, channels, height, width = image.shape
        center, spread = (image.new_tensor(v, dtype=upcast).view(-1, 1) for v in (mean, std))
        grid = image.reshape(batch, channels, height // p, p, width // p, p)
        # Cut as bytes, a quarter of the size.
        cut = grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, p * p)
        rows.append(cut.to(upcast).mul_(1 / 255).sub_(center).div_(spread).flatten(1))
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: PackedGrids,
    scale: float | None = None,
    *,
    upcast: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Bidirectional softmax attention inside each segment, the score matrix written out.

    Args:
        q: ``[T, H, D]``.
        k: ``[T, Hk, D]``; Hk divides H, and each k head serves ``H / Hk`` neighbouring q heads.
        v: As `k`.
        packed: Layout of the T tokens.
        scale: Factor of the scores; ``D ** -0.5`` when None.
        upcast: Precision, see the top of this file.

    Returns:
        The output ``[T, H, D]`` and the log-sum-exp of the scores ``[H, T]``.
    """
    dtype = upcast or q.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // max(k.shape[1], 1)
    outputs, lses = (
        [q.new_zeros(0, *q.shape[1:], dtype=dtype)],
        [q.new_zeros(q.shape[1], 0, dtype=dtype)],
    )
    for q_i, k_i, v_i in zip(packed.split(q), packed.split(k), packed.split(v), strict=True):
        q_i = q_i.to(dtype).transpose(0, 1)  # [H, n, D]
        k_i, v_i = (a.to(dtype).transpose(0, 1).repeat_interleave(group, 0) for a in (k_i, v_i))
        scores = q_i @ k_i.mT * scale  # [H, n, n]
        outputs.append((scores.softmax(-1) @ v_i).transpose(0, 1))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(lses, dim=1)
