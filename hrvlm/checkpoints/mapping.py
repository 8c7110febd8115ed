"""How transformers' loading and saving map the keys of its files to those of DINOv3Encoder."""

from __future__ import annotations

import re
from typing import Any

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming

# Attribute of a model while it is loaded: key of the model, and the keys of its absent parts.
ABSENT_PARTS = "_absent_parts"
_MEMORY_LAYER = re.compile(r"(vision_encoder\.|)model\.(?=layer\.\d)")
_FUSED = re.compile(
    r"((?:vision_encoder\.|)layer\.\d+\.attention\.)qkv(?:\.weight|_bias\.([qkv])_bias)"
)


def keys_in_files(key: str) -> tuple[str, ...]:
    """Of a model or a checkpoint: the keys that this one has in transformers' files."""
    key = _MEMORY_LAYER.sub(r"\1", key, count=1) if _MEMORY_LAYER.match(key) else key
    if not (match := _FUSED.fullmatch(key)):
        return (key,)
    head, bias = match.groups()
    return (
        (f"{head}{bias}_proj.bias",)
        if bias
        else tuple(f"{head}{name}_proj.weight" for name in "qkv")
    )


class LoadOnlyRenaming(WeightRenaming):
    """A key that is known in loading and never written."""

    def reverse_transform(self) -> WeightRenaming:
        """Rename nothing."""
        return WeightRenaming("(?!)", "")


class FuseAll(Concatenate):
    """Concatenates its sources if all are there; else the model's key is missing.

    Those that are absent are noted at the model, for :mod:`hrvlm.checkpoints.strict` to name.
    """

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """``{target: tensor}``, or nothing."""
        absent = [source for source in source_patterns if source not in input_dict]
        if not absent:
            shapes = {source: list(input_dict[source][0].shape) for source in source_patterns}
            if len(set(map(str, shapes.values()))) > 1:
                raise ValueError(f"parts of one matrix have different shapes: {shapes}")
            convert: Any = super().convert
            return convert(input_dict, source_patterns, target_patterns, **kwargs)
        target = self.get_target_pattern(target_patterns)
        parts = [full_layer_name.replace(target, source) for source in absent]
        vars(model).setdefault(ABSENT_PARTS, {})[full_layer_name] = parts
        return {}


def register(class_name: str) -> None:
    """Let a class fuse q, k and v in loading and split them again in saving, bit for bit.

    Keys may be those of transformers' files (``layer.N``) or of its models in memory
    (``model.layer.N``); written are those of the files.
    """
    register_checkpoint_conversion_mapping(
        class_name,
        [
            LoadOnlyRenaming(r"^model\.layer\.", "layer."),
            WeightConverter(
                [f"attention.{name}_proj.weight" for name in "qkv"],
                "attention.qkv.weight",
                [FuseAll(dim=0)],
            ),
            *(
                WeightRenaming(f"attention.{name}_proj.bias", f"attention.qkv_bias.{name}_bias")
                for name in "qkv"
            ),
        ],
        overwrite=True,
    )
