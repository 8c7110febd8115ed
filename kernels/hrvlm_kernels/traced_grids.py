"""Layouts inside an exported or traced graph, whose numbers are those of the input to come.

A PackedGrids is made of ints on the host. A graph for any size has no ints: sizes are symbols of
the shapes, or values of a tensor. Both layouts here are made of tensor operations, and attention
takes them by torch's own: a batch as it is, a mixed pack with a mask ``[T, T]``, which costs memory
with the square of T. Eager and compiled code never get one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .packed_grids import PackedGrids


class TracedGrids(PackedGrids):
    """What an encoder asks of a PackedGrids, computed in the graph.

    Made by :meth:`from_batch` or :meth:`from_tensor`; `grids` and `lengths` of the class above are
    not known, and there are no tiles.
    """

    images: Any  # B: an int or a symbol
    rows: Tensor  # [N] int64: as patch_rows()
    batched: tuple[Any, Any] | None  # (B, n) of a batch, None for a mixed pack
    batched_grid: tuple[Any, Any] | None = None  # (hp, wp) of a batch
    sizes: Tensor  # [N, 2] int64: (hp, wp) of each patch's image, in a mixed pack

    def __init__(
        self,
        images: Any,
        total_tokens: Any,
        num_prefix_tokens: int,
        cu_seqlens: Tensor,
        rows: Tensor,
        patch_coords: Tensor,
        batched: tuple[Any, Any] | None,
    ):
        coords = patch_coords.new_zeros(total_tokens, 2).index_copy(0, rows, patch_coords)
        super().__init__(
            grids=None,
            lengths=(),
            num_prefix_tokens=num_prefix_tokens,
            total_tokens=total_tokens,
            max_seqlen=batched[1] if batched else 0,
            cu_seqlens=cu_seqlens,
            _coords=coords,
            _tables={},
        )
        self.images, self.rows, self.batched = images, rows, batched

    @staticmethod
    def from_batch(
        batch: Any, grid: tuple[Any, Any], *, num_prefix_tokens: int, device: torch.device
    ) -> TracedGrids:
        """`batch` images of one patch grid, each number an int or a symbol."""
        hp, wp = grid
        n = num_prefix_tokens + hp * wp
        index = torch.arange(hp * wp, device=device)
        first = torch.arange(batch, device=device)[:, None] * n
        y, x = (_centre(torch.arange(size, device=device), size) for size in grid)
        coords = torch.stack((y[:, None].expand(hp, wp), x.expand(hp, wp)), -1).flatten(0, 1)
        layout = TracedGrids(
            images=batch,
            total_tokens=batch * n,
            num_prefix_tokens=num_prefix_tokens,
            cu_seqlens=torch.arange(batch + 1, device=device) * n,
            rows=(first + num_prefix_tokens + index).flatten(),
            patch_coords=coords.repeat(batch, 1),
            batched=(batch, n),
        )
        layout.batched_grid = grid
        return layout

    @staticmethod
    def from_tensor(grids: Tensor, num_patches: Any, *, num_prefix_tokens: int) -> TracedGrids:
        """Images of the patch grids ``[B, 2]``, an int tensor, with `num_patches` in all."""
        images, device = grids.shape[0], grids.device
        hp, wp = grids.long().unbind(1)
        ends = (hp * wp).cumsum(0)
        index = torch.arange(num_patches, device=device)
        image = (index[:, None] >= ends).sum(1)  # [N]: how many images end before this patch
        within = index - (ends - hp * wp)[image]
        y, x = _centre(within // wp[image], hp[image]), _centre(within % wp[image], wp[image])
        prefixes = torch.arange(1, images + 1, device=device) * num_prefix_tokens
        layout = TracedGrids(
            images=images,
            total_tokens=num_patches + images * num_prefix_tokens,
            num_prefix_tokens=num_prefix_tokens,
            cu_seqlens=F.pad(ends + prefixes, (1, 0)),
            rows=index + prefixes[image],
            patch_coords=torch.stack((y, x), -1),
            batched=None,
        )
        layout.sizes = torch.stack((hp[image], wp[image]), -1)
        return layout

    @property
    def coords(self) -> Tensor:
        """As of the class above."""
        assert self._coords is not None
        return self._coords

    def patch_rows(self) -> Tensor:
        """As of the class above."""
        return self.rows

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of each image over itself, by scaled_dot_product_attention."""
        sizes, mask = self.batched or (1, self.total_tokens), None
        if self.batched is None:
            token = torch.arange(self.total_tokens, device=q.device)
            image = (token[:, None] >= self.cu_seqlens[1:]).sum(1)
            mask = image[:, None] == image
        q, k, v = (a.unflatten(0, sizes).transpose(1, 2) for a in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=bool(q.shape[1] != k.shape[1])
        )
        return out.transpose(1, 2).flatten(0, 1)

    def split(self, x: Tensor) -> list[Tensor]:
        """Not in a graph: how many parts there are is a number of the input."""
        raise ValueError(
            "an exported graph has no parts by image: export last_hidden_state and pooler_output, "
            "and divide them outside"
        )


def _centre(index: Tensor, size: Any) -> Tensor:
    return 2.0 * ((index.float() + 0.5) / size) - 1.0
