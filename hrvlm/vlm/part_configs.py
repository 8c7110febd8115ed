"""Configs of the parts of a vision-language model, from dictionaries or from nanoVLM's names."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hrvlm_kernels.backends import check_backend
from hrvlm_kernels.packed_tables import is_int

from ..images.geometry import positive_number, true_or_false
from .tower_classes import architecture_name, config_class_of, tower_class

# Names of encoders of this package, and the model_type of their configs: by default the first. All
# others are towers of transformers.
OWN = {"dinov3": ("dinov3_vit",), "dinov2": ("dinov2", "dinov2_with_registers")}
_OWN_NAME = {kind: name for name, kinds in OWN.items() for kind in kinds}
ENCODERS = (
    "dinov3, dinov2, or a vision tower of transformers: siglip, siglip2, pixtral, idefics3, "
    "smolvlm, qwen2_vl, qwen2_5_vl, qwen3_vl, glm4v, ..."
)

# What a config says by default: DINOv3 ViT-S/16, DINOv2 ViT-S/14, SigLIP-B/16 at 512 px, SigLIP2-B,
# SmolLM2 360M.
_DINOV2_DEFAULTS = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518}
_VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "dinov3_vit": {"num_register_tokens": 4},
    "dinov2": _DINOV2_DEFAULTS,
    "dinov2_with_registers": _DINOV2_DEFAULTS | {"patch_size": 14},
    "siglip_vision_model": {"image_size": 512},
}
_TEXT_DEFAULTS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# nanoVLM's names (models/config.py) and what they are called in transformers' configs.
VIT_NAMES = {
    "vit_hidden_dim": "hidden_size",
    "vit_inter_dim": "intermediate_size",
    "vit_patch_size": "patch_size",
    "vit_n_heads": "num_attention_heads",
    "vit_n_blocks": "num_hidden_layers",
    "vit_dropout": "attention_dropout",
    "vit_ln_eps": "layer_norm_eps",
    "vit_img_size": "image_size",
    "vit_n_registers": "num_register_tokens",
    "vit_use_rope": "use_rope",
    "backend": "backend",
    "allow_fp16": "allow_fp16",
}
LM_NAMES = {
    "lm_hidden_dim": "hidden_size",
    "lm_inter_dim": "intermediate_size",
    "lm_n_heads": "num_attention_heads",
    "lm_n_kv_heads": "num_key_value_heads",
    "lm_n_blocks": "num_hidden_layers",
    "lm_vocab_size": "vocab_size",
    "lm_max_position_embeddings": "max_position_embeddings",
    "lm_rms_eps": "rms_norm_eps",
    "lm_re_base": "rope_theta",
    "lm_dropout": "attention_dropout",
    "lm_tie_weights": "tie_word_embeddings",
}
_COUNTS = {  # whole numbers, of at least so many
    "vit_hidden_dim": 1, "vit_inter_dim": 1, "vit_patch_size": 1, "vit_n_heads": 1,
    "vit_n_blocks": 1, "vit_img_size": 1, "vit_n_registers": 0,
    "lm_hidden_dim": 1, "lm_inter_dim": 1, "lm_n_heads": 1, "lm_n_kv_heads": 1, "lm_n_blocks": 1,
    "lm_vocab_size": 1, "lm_max_position_embeddings": 1,
}  # fmt: skip
_NUMBERS = ("vit_dropout", "vit_ln_eps", "lm_rms_eps", "lm_dropout")  # of 0 or more
_MAY_BE_NONE = ("vit_img_size", "lm_n_kv_heads")
_DERIVED = {  # what a config derives from a field unless told, and saves
    "hidden_size": ("head_dim",),
    "num_attention_heads": ("head_dim",),
    "num_hidden_layers": ("layer_types", "stage_names", "out_features", "out_indices"),
}
# Other names that fields have in configs of towers.
_ALSO = {
    "num_hidden_layers": ("depth",),
    "num_attention_heads": ("num_heads",),
    "hidden_size": ("embed_dim", "out_hidden_size"),
    "layer_norm_eps": ("rms_norm_eps",),
}


def architecture_of(config: PreTrainedConfig) -> str | None:
    """What the encoder with this config is called; None if it can't be one."""
    kind = config.model_type
    if kind in _OWN_NAME:
        return _OWN_NAME[kind]
    return architecture_name(kind) if tower_class(config) else None


def names_with_one_value(vision: PreTrainedConfig) -> dict[str, tuple[Any, str]]:
    """Names that are for others than the encoder of this config: the value that says nothing, why.

    Which is that of "dinov3", where all have values, for no encoder.
    """
    own = architecture_of(vision)
    if own == "dinov3":
        return {}
    names: dict[str, tuple[Any, str]] = {
        "vit_use_rope": (False, f"{own} has positions of its own; leave it out, or use dinov3"),
        "allow_fp16": (False, f"{own} runs in float16 as it is"),
    }
    if cls := tower_class(vision):
        names |= {
            "vit_n_registers": (0, f"{own} has no register tokens"),
            "backend": ("auto", f"{own} runs as transformers' {cls.__name__}"),
        }
    return names


def as_config(
    config: dict | PreTrainedConfig | None, field: str, default_type: str
) -> PreTrainedConfig:
    """The config of a part from its dictionary; the defaults where there is none.

    Raises:
        ValueError: its `model_type` is unknown; the message names the `field`.
    """
    if isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, dict | None):
        raise ValueError(f"{field}={config!r:.60}: expected a config or a dictionary of its fields")
    if config is None:
        values = _TEXT_DEFAULTS if field == "text_config" else _VISION_DEFAULTS[default_type]
    else:
        values = config
    model_type = values.get("model_type", default_type)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"{field}: transformers has no model_type {model_type!r}")
    return CONFIG_MAPPING[model_type](**{k: v for k, v in values.items() if k != "model_type"})


def checked(names: Mapping[str, Any], said: Mapping[str, str]) -> dict[str, Any]:
    """`names`, with sizes and rates as Python's own; `said` as in :func:`vision_from_names`.

    Raises:
        ValueError: a size or rate is none, or too small; it is named as it was given.
    """
    return {name: _checked(name, value, said.get(name, name)) for name, value in names.items()}


def _checked(name: str, value: Any, said: str) -> Any:
    if value is None and name in _MAY_BE_NONE:
        return None
    if (least := _COUNTS.get(name)) is not None:
        if not is_int(value, least):
            raise ValueError(f"{said}={value!r}: expected a whole number of at least {least}")
        return int(value)
    if name in _NUMBERS:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (real and 0 <= float(value) < math.inf):
            raise ValueError(f"{said}={value!r}: expected a number of at least 0")
        return value if isinstance(value, int) else float(value)
    return value


def vision_from_names(names: Mapping[str, Any], said: Mapping[str, str]) -> PreTrainedConfig:
    """The encoder's config; `said` has the names of options that were given by another one.

    Raises:
        ValueError: a value does not fit, or fits another architecture.
    """
    given = dict(names)
    architecture = given.get("vit_architecture")
    tower = None
    named = isinstance(architecture, str)
    if architecture is not None and not (named and architecture in OWN):
        tower = config_class_of(architecture) if named else None
        if tower is None:
            raise ValueError(f"vit_architecture={architecture!r}: expected {ENCODERS}")
    if source := _source("vit_model_type", given):
        base = AutoConfig.from_pretrained(source)
        base = getattr(base, "vision_config", base)
        found = architecture_of(base)
        if found is None or architecture not in (None, found):
            raise ValueError(
                f"vit_model_type={source!r} is a {base.model_type}, "
                f"expected {architecture or ENCODERS}"
            )
    elif tower is not None:
        base = tower(**_VISION_DEFAULTS.get(tower.model_type, {}))
    else:
        kinds = OWN[architecture or "dinov3"]
        model_type = kinds[-1] if given.get("vit_n_registers") else kinds[0]
        base = CONFIG_MAPPING[model_type](**_VISION_DEFAULTS[model_type])
    given = {name: value for name, value in given.items() if name in VIT_NAMES}
    for name, (only, why) in names_with_one_value(base).items():
        if given.pop(name, only) != only:
            raise ValueError(f"{said.get(name, name)}={names[name]!r}: {why}")
    if "backend" in given:
        check_backend(given["backend"])
    if given.get("allow_fp16") is not None:
        true_or_false("allow_fp16", given["allow_fp16"])
    if given.get("vit_img_size") is None:
        given.pop("vit_img_size", None)
    changes = {VIT_NAMES[name]: value for name, value in given.items()}
    if architecture_of(base) == "dinov2":
        changes = _in_words_of_dinov2(changes, base, said)
    elif tower_class(base):
        changes = _in_words_of_tower(changes, base, said)
    return _changed(base, changes)


def _in_words_of_tower(
    changes: dict[str, Any], base: PreTrainedConfig, said: Mapping[str, str]
) -> dict[str, Any]:
    """Fields of DINOv3's config as that of a tower of transformers has them.

    Raises:
        ValueError: it has no such field.
    """
    new: dict[str, Any] = {}
    for field, value in changes.items():
        fields = [name for name in (field, *_ALSO.get(field, ())) if hasattr(base, name)]
        if not fields and field != "image_size":  # of which it takes any
            name = next(name for name, own in VIT_NAMES.items() if own == field)
            kind = base.model_type
            raise ValueError(f"{said.get(name, name)}={value!r}: a {kind} config has no {field}")
        new |= dict.fromkeys(fields, value)
    return new


def _in_words_of_dinov2(
    changes: dict[str, Any], base: PreTrainedConfig, said: Mapping[str, str]
) -> dict[str, Any]:
    """Fields of DINOv3's config as DINOv2's has them.

    Raises:
        ValueError: the MLP is no multiple of the hidden size, or a checkpoint without registers is
            to have some.
    """
    new = dict(changes)
    if "attention_dropout" in new:
        new["attention_probs_dropout_prob"] = new.pop("attention_dropout")
    if (inner := new.pop("intermediate_size", None)) is not None:
        size = new.get("hidden_size", getattr(base, "hidden_size", 1))
        if inner % size:
            raise ValueError(f"vit_inter_dim={inner}: expected a multiple of vit_hidden_dim={size}")
        new["mlp_ratio"] = inner // size
    if not hasattr(base, "num_register_tokens") and (count := new.pop("num_register_tokens", 0)):
        name = said.get("vit_n_registers", "vit_n_registers")
        raise ValueError(f"{name}={count}: the checkpoint has no register tokens")
    return new


def _source(name: str, given: Mapping[str, Any]) -> str | None:
    source = given.get(name)
    if not isinstance(source, str | None):
        raise ValueError(f"{name}={source!r:.60}: expected a hub id or a directory")
    return source


def text_from_names(given: Mapping[str, Any]) -> PreTrainedConfig:
    """The language model's config.

    Raises:
        ValueError: a name is of a field that this kind of model has not.
    """
    if source := _source("lm_model_type", given):
        base = AutoConfig.from_pretrained(source)
    else:
        base = as_config(None, "text_config", "llama")
    changes = {}
    for name, field in LM_NAMES.items():
        if name not in given:
            continue
        if field == "rope_theta":
            rope = getattr(base, "rope_parameters", None) or {"rope_type": "default"}
            try:
                theta = positive_number(name, float(given[name]))
            except (TypeError, ValueError):
                raise ValueError(f"{name}={given[name]!r}: expected a positive number") from None
            changes["rope_parameters"] = rope | {"rope_theta": theta}
        elif not hasattr(base, field):
            raise ValueError(f"{name}={given[name]!r}: a {base.model_type} config has no {field}")
        else:
            changes[field] = given[name]
    return _changed(base, changes)


def _changed(base: PreTrainedConfig, changes: dict[str, Any]) -> PreTrainedConfig:
    if not changes:
        return base
    values = base.to_dict() | changes
    for field, derived in _DERIVED.items():
        if field in changes:
            for name in derived:
                values.pop(name, None)
    return type(base).from_dict(values)
