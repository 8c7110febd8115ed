"""Learned positions, as DINOv2 has them, beside RoPE: weights that are added to the embeddings.

They are those of a square of patches. Any other grid gets them by bicubic interpolation in float32,
as transformers' ``Dinov2Model`` and ``Dinov2WithRegistersModel`` do, the second with antialiasing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hrvlm_kernels import PackedGrids
from hrvlm_kernels.traced_grids import TracedGrids

from ..checkpoints.sizes import ViTSizes
from .layers import EncoderEmbeddings


class LearnedPositionEmbeddings(EncoderEmbeddings):
    """Patch embedding, prefix tokens, and positions of CLS and patches; registers have none."""

    def __init__(self, sizes: ViTSizes):
        super().__init__(sizes)
        assert sizes.positions is not None
        self.positions = sizes.positions
        if self.positions.side < 1:
            raise ValueError("config.image_size: expected at least one patch")
        size = sizes.hidden_size
        self.position_embeddings = nn.Parameter(torch.randn(1, self.positions.count, size))
        self.mask_token = nn.Parameter(torch.zeros(1, size)) if sizes.has_mask_token else None
        if not sizes.has_registers:
            self.register_tokens = None

    def init_weights(self, std: float) -> None:
        """Random tokens and positions, as the family's training begins."""
        for parameter in (self.position_embeddings, self.cls_token):
            init.trunc_normal_(parameter, mean=0.0, std=std)
        for token in (self.mask_token, self.register_tokens):
            if token is not None:
                init.zeros_(token)

    def prefix(self) -> Tensor:
        """``[P, C]``: CLS with its position, and the registers."""
        cls = self.cls_token[0] + self.position_embeddings[:, 0]
        return cls if self.register_tokens is None else torch.cat((cls, self.register_tokens[0]))

    def placed(self, x: Tensor, packed: PackedGrids) -> Tensor:
        """Patches ``[N, C]`` with their positions."""
        if isinstance(packed, TracedGrids):
            return self._placed_in_graph(x, packed)
        of_grid = {grid: self._positions_of(*grid) for grid in dict.fromkeys(packed.grids or ())}
        return x + torch.cat([of_grid[grid] for grid in packed.grids or ()]) if of_grid else x

    def _positions_of(self, hp: Any, wp: Any, *, always: bool = False) -> Tensor:
        """``[hp * wp, C]`` of a patch grid, row by row."""
        side, square = self.positions.side, self.position_embeddings[0, 1:]
        if not always and (hp, wp) == (side, side):
            return square
        maps = square[None].unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
        new = nn.functional.interpolate(
            # Otherwise torch 2.11's antialiasing on a CPU is wrong where wp is 1.
            maps.contiguous(memory_format=torch.channels_last),
            size=(hp, wp),
            mode="bicubic",
            antialias=self.positions.antialias,
        )
        return new.to(square.dtype)[0].permute(1, 2, 0).flatten(0, 1)

    def _placed_in_graph(self, x: Tensor, packed: TracedGrids) -> Tensor:
        if packed.batched_grid is None:
            raise ValueError(
                "grids: a graph for any mixed pack can't hold learned positions, which are "
                "interpolated for each grid; export or trace a batch [B, 3, H, W]"
            )
        own = self._positions_of(*packed.batched_grid, always=True)
        return (x.unflatten(0, (packed.images, own.shape[0])) + own).flatten(0, 1)
