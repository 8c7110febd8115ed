"""How transformers' loading and saving map the keys of its files to those of the encoders.

Of DINOv3 they differ in q, k and v, which are one matrix here. DINOv2's are first renamed to the
canonical ones (:mod:`hrvlm.checkpoints.keys`), and gate and up, one matrix there, are two here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    WeightConverter,
    WeightRenaming,
)

from .differences import natural_order
from .keys import (
    GATE_AND_UP,
    Family,
    canonical_keys_of_dinov2,
    dinov2_key,
    own_name,
    split_layer,
)

# Attribute of a model while it is loaded: key of the model, and the keys of its absent parts.
ABSENT_PARTS = "_absent_parts"
_PART = "vision_encoder."  # of a VisionLanguageModel
_MEMORY_LAYER = re.compile(r"(vision_encoder\.|)model\.(?=layer\.\d)")
_DINOV2_FILE = re.compile(
    r"(vision_encoder\.|)"
    r"(encoder\.layer\.\d+\..+|layernorm\..+|embeddings\.patch_embeddings\.projection\..+)"
)
_QKV = {"q": "query", "k": "key", "v": "value"}
_FUSED = re.compile(
    r"((?:vision_encoder\.|)layer\.\d+\.attention\.)qkv(?:\.weight|_bias\.([qkv])_bias)"
)


def keys_in_files(key: str) -> tuple[str, ...]:
    """Of a model or a checkpoint: the keys that this one has in transformers' files.

    Those of DINOv2 come under their canonical names: to compare, not to show.
    """
    keys = canonical_keys(key)
    if not (match := _FUSED.fullmatch(keys[0])):
        return keys
    head, bias = match.groups()
    return (
        (f"{head}{bias}_proj.bias",)
        if bias
        else tuple(f"{head}{name}_proj.weight" for name in "qkv")
    )


def key_in_file(model: Any, key: str) -> str:
    """What a canonical key of a model is called in its files, for people to read."""
    encoder, head = model, ""
    if key.startswith(_PART) and hasattr(model, "vision_encoder"):
        encoder, head, key = model.vision_encoder, _PART, key.removeprefix(_PART)
    if getattr(encoder, "family", None) != "dinov2":
        return head + key
    index, rest = split_layer(key)
    gated = encoder.sizes.use_gated_mlp
    if gated:
        rest = re.sub(r"^mlp\.(gate|up)_proj(?=\.)", GATE_AND_UP, rest)
    with suppress(KeyError):  # of a file's own name, or one that no DINOv2 has
        rest = own_name(rest, "transformers", "dinov2", gated=gated) or rest
    return head + (rest if index is None else f"encoder.layer.{index}.{rest}")


def without_converted_keys(
    missing: Iterable[str], unexpected: Iterable[str]
) -> tuple[list[str], list[str]]:
    """The keys that differ, apart from those that loading makes of one another.

    Trainer compares the keys of a checkpoint in shards with those of the model by itself.
    """
    wanted = {key: set(keys_in_files(key)) for key in missing}
    given = {key: set(keys_in_files(key)) for key in unexpected}
    there = set().union(*given.values())
    absent = {key for key, stored in wanted.items() if not stored <= there}
    made = set().union(*(wanted[key] for key in wanted.keys() - absent))
    left_over = {key for key, stored in given.items() if not stored <= made}
    return sorted(absent, key=natural_order), sorted(left_over, key=natural_order)


def canonical_keys(key: str) -> tuple[str, ...]:
    """Of a key of transformers' models or files: two for DINOv2's gate and up in one matrix."""
    if match := _DINOV2_FILE.fullmatch(key):
        return tuple(match[1] + canonical for canonical in canonical_keys_of_dinov2(match[2]))
    return (_MEMORY_LAYER.sub(r"\1", key, count=1) if _MEMORY_LAYER.match(key) else key,)


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


class FromDINOv2(WeightRenaming):
    """transformers' names of DINOv2 in the encoder's; q, k, v, gate and up are left to converters.

    Written are the names of its files, by :class:`ToDINOv2`.
    """

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(".+", ".+")

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """As of the class above."""
        matched = self._scoped_match(source_key)
        if matched is None:
            return source_key, None
        renamed = (matched[0] or "") + self.renamed(matched[1])
        return renamed, None if renamed == source_key else self.source_patterns[0]

    def renamed(self, key: str) -> str:
        """The key of the encoder, or what a converter knows."""
        index, rest = split_layer(key)
        head = "" if index is None else f"layer.{index}."
        if rest.startswith(("attention.attention.", "mlp.weights_in.")):
            name, _, leaf = rest.removeprefix("attention.attention.").partition(".")
            if leaf == "bias" and name in _QKV.values():
                return f"{head}attention.qkv_bias.{name[0]}_bias"
            return head + rest
        return head + canonical_keys_of_dinov2(rest)[0]

    def reverse_transform(self) -> WeightRenaming:
        """Back to the names in files."""
        back = ToDINOv2()
        back.scope_prefix, back.base_model_prefix = self.scope_prefix, self.base_model_prefix
        return back


class ToDINOv2(FromDINOv2):
    """The inverse of :class:`FromDINOv2`."""

    __slots__ = ()

    def renamed(self, key: str) -> str:
        """The key of transformers' files."""
        index, rest = split_layer(key)
        head = "" if index is None else f"encoder.layer.{index}."
        if match := re.fullmatch(r"attention\.qkv_bias\.([qkv])_bias", rest):
            return f"{head}attention.attention.{_QKV[match[1]]}.bias"
        return head + dinov2_key(rest)


class SplitGateAndUp(Chunk):
    """One matrix into two; the reverse is :class:`JoinGateAndUp`."""

    @property
    def reverse_op(self) -> ConversionOps:
        """As of the class above."""
        return JoinGateAndUp(self.dim)


class JoinGateAndUp(Concatenate):
    """Two matrices into one; where there is no gate, the other is called ``fc1``."""

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        """``{target: tensor}``."""
        if len(input_dict) < 2:
            (tensor,) = input_dict.values()
            return {full_layer_name.replace("weights_in", "fc1"): tensor}
        convert: Any = super().convert
        return convert(input_dict, source_patterns, target_patterns, **kwargs)


class NameDown(ConversionOps):
    """What comes after a gated MLP is called ``weights_out``, and ``fc2`` after another."""

    def convert(
        self,
        input_dict: dict[str, Any],
        *_: Any,
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """``{target: tensor}``."""
        (tensor,) = input_dict.values()
        gated = getattr(model, "vision_encoder", model).sizes.use_gated_mlp
        name = full_layer_name if gated else full_layer_name.replace("weights_out", "fc2")
        return {name: tensor}

    @property
    def reverse_op(self) -> ConversionOps:
        """Itself."""
        return self


def register(class_name: str, family: Family) -> None:
    """Let a class fuse q, k and v in loading and split them again in saving, bit for bit.

    Keys may be those of transformers' files or of its models in memory; written are those of the
    files.
    """
    transforms = _of_dinov3() if family == "dinov3" else _of_dinov2()
    register_checkpoint_conversion_mapping(class_name, transforms, overwrite=True)


def _of_dinov3() -> list[Any]:
    return [
        LoadOnlyRenaming(r"^(?:model\.)?layer\.", "layer."),
        WeightConverter(
            [f"attention.{name}_proj.weight" for name in "qkv"],
            "attention.qkv.weight",
            [FuseAll(dim=0)],
        ),
        WeightRenaming(r"attention\.([qkv])_proj\.bias", r"attention.qkv_bias.\1_bias"),
    ]


def _of_dinov2() -> list[Any]:
    leaves = ("weight", "bias")
    return [
        FromDINOv2(),
        WeightConverter(
            [f"attention.attention.{name}.weight" for name in _QKV.values()],
            "attention.qkv.weight",
            [FuseAll(dim=0)],
        ),
        *(
            WeightConverter(
                f"mlp.weights_in.{leaf}",
                [f"mlp.{name}_proj.{leaf}" for name in ("gate", "up")],
                [SplitGateAndUp(dim=0)],
            )
            for leaf in leaves
        ),
        *(
            WeightConverter(f"mlp.weights_out.{leaf}", f"mlp.down_proj.{leaf}", [NameDown()])
            for leaf in leaves
        ),
    ]
