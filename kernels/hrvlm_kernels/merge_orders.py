"""Orders in which models merge s x s patches into one token, as presets of pixel_shuffle_linear.

Three choices make an order, and a preset for each known model says them:

    patches   in which order they come     "rows": row by row over the image's patch grid
                                           "blocks": block by block, each block row by row
    columns   of the projection's weight   "patches": (dy * s + dx) * C + c
                                           "channels": c * s * s + dy * s + dx
    tokens    in which order they go       "rows": row by row over the token grid
                                           "columns": column by column

The kernels know the first and the third by the index that they read patches through, and the second
by a weight with its columns in another order.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MergeOrder(NamedTuple):
    """How a model merges patches; see the top of this file.

    Attributes:
        patches: "rows" or "blocks".
        columns: "patches" or "channels".
        tokens: "rows" or "columns".
    """

    patches: str = "rows"
    columns: str = "patches"
    tokens: str = "rows"

    @property
    def key(self) -> str:
        """What tells its index from that of other orders; empty for row by row."""
        moved = self._replace(columns="patches")
        return "" if moved == MergeOrder() else f" {self.patches} {self.tokens}"


# Beside each what does so: the class, or the function, of transformers that has the order.
MERGE_ORDERS = {
    "nanovlm": MergeOrder(),  # its ModalityProjector; Idefics3Connector, SmolVLMConnector
    "raster": MergeOrder(),  # PaddleOCRProjector, Lfm2VlMultiModalProjector, Llama4's pixel_shuffle
    "internvl_v2": MergeOrder(),  # InternVLModel.pixel_shuffle: ps_version "v2"
    "internvl_v1": MergeOrder(tokens="columns"),  # ps_version "v1": height and width stay swapped
    "qwen": MergeOrder(patches="blocks"),  # PatchMerger of Qwen2-VL to Qwen3.5: a view
    "mistral": MergeOrder(columns="channels"),  # Mistral3PatchMerger, LightOnOcrPatchMerger: unfold
    "glm": MergeOrder(patches="blocks", columns="channels"),  # downsample of GLM-4.xV and GLM-OCR
}


def merge_order(name: str) -> MergeOrder:
    """The order of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in MERGE_ORDERS:
        raise ValueError(f"order={name!r}: expected one of {', '.join(MERGE_ORDERS)}")
    return MERGE_ORDERS[name]


def patch_columns(weight: Tensor, factor: int, order: MergeOrder) -> Tensor:
    """`weight` ``[N, s*s*C]`` with its columns patch by patch; a copy where they were not."""
    if order.columns == "patches":
        return weight
    return weight.unflatten(1, (-1, factor * factor)).transpose(1, 2).flatten(1)
