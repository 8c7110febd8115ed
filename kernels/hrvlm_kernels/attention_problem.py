"""What attention is computed of, as one record: it walks through all layers of varlen_attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .packed_tables import Segments


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
        deterministic: Whether the backward gives the same bits for the same inputs.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    segments: Segments
    rope: tuple[Tensor, Tensor] | None
    table: Tensor | None
    scale: float
    deterministic: bool

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
        deterministic: bool,
    ) -> Problem:
        """What the torch ops get: tensors and numbers alone."""
        segments = Segments(cu_seqlens, tiles_64, tiles_128, short_segments)
        rope = None if coords is None or inv_freq is None else (coords, inv_freq)
        return Problem(q, k, v, segments, rope, table, scale, deterministic)
