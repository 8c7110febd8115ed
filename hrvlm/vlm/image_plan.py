"""What the host knows of the images of a batch, which no graph of torch.compile has to know.

A compiled model calls these functions as they are. So the number of images and their grids are in
no graph and in no guard: what is compiled takes tensors and layouts, of whatever images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from hrvlm_kernels import PackedGrids

from .output import ImageFeatures
from .placeholders import Grid

Output = TypeVar("Output")


@dataclass(eq=False)
class ImagePlan:
    """The images of a batch.

    Attributes:
        grids: Patch grid of each.
        tokens: Of each.
        factor: Of the pixel shuffle.
        output: What ``get_image_features`` says of them, once they are encoded.
    """

    grids: list[Grid]
    tokens: list[int]
    factor: int
    output: ImageFeatures | None = None

    @torch.compiler.disable
    def layout(self, prefix: int, device: torch.device, *, shuffled: bool = True) -> PackedGrids:
        """Where they lie in a pack with so many prefix tokens; if asked, how it is shuffled."""
        return PackedGrids.from_grids(
            self.grids,
            num_prefix_tokens=prefix,
            device=device,
            shuffle_factors=(self.factor,) if shuffled else (),
        )

    @torch.compiler.disable
    def keep(self, features: Tensor, **fields: Any) -> None:
        """Keep the projected features by image, beside what else the encoder gave."""
        self.output = ImageFeatures(pooler_output=features.split(self.tokens), **fields)

    @torch.compiler.disable
    def told(self, make: Callable[..., Output], **fields: Any) -> Output:
        """An output of the model that tells of its images, too."""
        return make(image_outputs=self.output, **fields)
