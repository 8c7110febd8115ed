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
        if packed.batched_grid is not None:
            own = self._positions_of(*packed.batched_grid, always=True)
            return (x.unflatten(0, (packed.images, own.shape[0])) + own).flatten(0, 1)
        side, antialias = self.positions.side, self.positions.antialias
        centres = packed.coords[packed.rows]
        by_row, by_column = (
            bicubic_weights(centres[:, axis], packed.sizes[:, axis], side, antialias=antialias)
            for axis in (0, 1)
        )
        weights = (by_row[:, :, None] * by_column[:, None]).flatten(1)  # [N, side * side]
        square = self.position_embeddings[0, 1:]
        return x + (weights @ square.float()).to(square.dtype)


def bicubic_weights(centres: Tensor, sizes: Tensor, side: int, *, antialias: bool) -> Tensor:
    """What F.interpolate's bicubic takes of each of `side` numbers, ``[N, side]``.

    With t = the distance of a number from the new one's centre, in numbers (in steps of the new
    ones, where antialiasing makes those wider), the weight is Keys' cubic kernel

        (a + 2) |t|^3 - (a + 3) |t|^2 + 1         |t| <= 1
        a |t|^3 - 5a |t|^2 + 8a |t| - 4a          1 < |t| < 2

    with a = -0.75, numbers beyond the ends being those at the ends; or antialiased with a = -0.5,
    numbers beyond the ends left out and the weights divided by their sum.

    Args:
        centres: ``[N]``: of the new numbers, in [-1, 1].
        sizes: ``[N]``: how many new numbers there are in each one's image.
        side: How many numbers there are.
        antialias: As F.interpolate's.
    """
    a = -0.5 if antialias else -0.75
    beyond = 0 if antialias else 2
    centre = (centres.float() + 1) * (side / 2)
    number = torch.arange(-beyond, side + beyond, device=centres.device)
    t = (number + 0.5 - centre[:, None]).abs()
    if antialias:
        t = t / (side / sizes.float()).clamp(min=1)[:, None]
    near, far = ((a + 2) * t - (a + 3)) * t * t + 1, ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    weights = torch.where(t <= 1, near, torch.where(t < 2, far, torch.zeros_like(t)))
    if antialias:
        return weights / weights.sum(1, keepdim=True)
    at_ends = number.clamp(0, side - 1)[:, None] == number[beyond : side + beyond]
    return weights @ at_ends.to(weights.dtype)
