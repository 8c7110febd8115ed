"""What attention is computed of, as one record: it walks through all layers of varlen_attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .packed_tables import Segments


def folds_rope(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernels of attention rotate q and k themselves; else a pass before them does.

    The halves of a head change places in registers, which takes heads that fill the tile; in
    float32 there are too few registers.
    """
    return dtype.itemsize == 2 and head_dim >= 16 and head_dim & (head_dim - 1) == 0


@dataclass(frozen=True)
class Problem:
    """q, k and v, their segments, and how to attend.

    Attributes:
        q: ``[T, H, D]``.
        k: ``[T, Hk, D]``.
        v: As `k`.
        segments: Of the T tokens.
        rope: (coords, inv_freq) to rotate q and k by, or None. Launchers drop it once both are
            rotated; the kernels then get what is left for them to do.
        table: Cos and sin of `rope`, ``[T, D]`` float32, if they are there already.
        scale: Factor of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    segments: Segments
    rope: tuple[Tensor, Tensor] | None
    table: Tensor | None
    scale: float

    @staticmethod
    def from_arguments(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        tiles_64: Tensor,
        tiles_128: Tensor,
        short_segments: Tensor,
        coords: Tensor | None,
        inv_freq: Tensor | None,
        table: Tensor | None,
        scale: float,
    ) -> Problem:
        """What the torch ops get: tensors and numbers alone."""
        segments = Segments(cu_seqlens, tiles_64, tiles_128, short_segments)
        rope = None if coords is None or inv_freq is None else (coords, inv_freq)
        return Problem(q, k, v, segments, rope, table, scale)
