"""How transformers' loading and saving map the keys of its files to those of DINOv3Encoder."""

from __future__ import annotations

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming


class LoadOnlyRenaming(WeightRenaming):
    """A key that is known in loading and never written."""

    def reverse_transform(self) -> WeightRenaming:
        """Rename nothing."""
        return WeightRenaming("(?!)", "")


def register() -> None:
    """Fuse q, k and v into one matrix in loading, and split them again in saving, bit for bit.

    Keys may be those of transformers' files (``layer.N``) or of its models in memory
    (``model.layer.N``); written are those of the files.
    """
    register_checkpoint_conversion_mapping(
        "DINOv3Encoder",
        [
            LoadOnlyRenaming(r"^model\.layer\.", "layer."),
            WeightConverter(
                [f"attention.{name}_proj.weight" for name in "qkv"],
                "attention.qkv.weight",
                [Concatenate(dim=0)],
            ),
            *(
                WeightRenaming(f"attention.{name}_proj.bias", f"attention.qkv_bias.{name}_bias")
                for name in "qkv"
            ),
        ],
        overwrite=True,
    )
