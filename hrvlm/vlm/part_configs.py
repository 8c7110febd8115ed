"""Configs of the parts of a vision-language model, from dictionaries or from nanoVLM's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..images.geometry import positive_int

ARCHITECTURES = {"dinov3": "dinov3_vit", "siglip": "siglip_vision_model"}

# What a config says by default: DINOv3 ViT-S/16, SigLIP-B/16 at 512 px, SmolLM2 360M.
_VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "dinov3_vit": {"num_register_tokens": 4},
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
_DERIVED = {  # what a config derives from a field unless told, and saves
    "hidden_size": ("head_dim",),
    "num_attention_heads": ("head_dim",),
    "num_hidden_layers": ("layer_types", "stage_names", "out_features", "out_indices"),
}
DINOV3_ONLY = {  # names that siglip has with one value only, and why
    "vit_n_registers": (0, "siglip has no register tokens"),
    "vit_use_rope": (False, "siglip has learned positions; leave it out, or use dinov3"),
    "allow_fp16": (False, "siglip runs in float16 as it is"),
    "backend": ("auto", "siglip runs as transformers' SiglipVisionModel"),
}


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
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{field}: transformers has no model_type {model_type!r}")
    return CONFIG_MAPPING[model_type](**{k: v for k, v in values.items() if k != "model_type"})


def vision_from_names(names: Mapping[str, Any], said: Mapping[str, str]) -> PreTrainedConfig:
    """The encoder's config; `said` has the names of options that were given by another one.

    Raises:
        ValueError: a value does not fit, or fits another architecture.
    """
    given = dict(names)
    architecture = given.get("vit_architecture")
    if architecture is not None and architecture not in ARCHITECTURES:
        raise ValueError(f"vit_architecture={architecture!r}: expected one of {[*ARCHITECTURES]}")
    if source := given.get("vit_model_type"):
        base = AutoConfig.from_pretrained(source)
        base = getattr(base, "vision_config", base)
        found = {v: k for k, v in ARCHITECTURES.items()}.get(base.model_type)
        if found is None or architecture not in (None, found):
            raise ValueError(
                f"vit_model_type={source!r} is a {base.model_type}, "
                f"expected {architecture or ' or '.join(ARCHITECTURES)}"
            )
        architecture = found
    else:
        architecture = architecture or "dinov3"
        model_type = ARCHITECTURES[architecture]
        base = CONFIG_MAPPING[model_type](**_VISION_DEFAULTS[model_type])
    given = {name: value for name, value in given.items() if name in VIT_NAMES}
    if architecture == "siglip":
        for name, (only, why) in DINOV3_ONLY.items():
            if given.pop(name, only) != only:
                raise ValueError(f"{said.get(name, name)}={names[name]!r}: {why}")
    if given.get("vit_img_size") is None:
        given.pop("vit_img_size", None)
    else:
        positive_int("vit_img_size", given["vit_img_size"])
    return _changed(base, {VIT_NAMES[name]: value for name, value in given.items()})


def text_from_names(given: Mapping[str, Any]) -> PreTrainedConfig:
    """The language model's config.

    Raises:
        ValueError: a name is of a field that this kind of model has not.
    """
    if source := given.get("lm_model_type"):
        base = AutoConfig.from_pretrained(source)
    else:
        base = as_config(None, "text_config", "llama")
    changes = {}
    for name, field in LM_NAMES.items():
        if name not in given:
            continue
        if field == "rope_theta":
            rope = getattr(base, "rope_parameters", None) or {"rope_type": "default"}
            changes["rope_parameters"] = rope | {"rope_theta": float(given[name])}
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
