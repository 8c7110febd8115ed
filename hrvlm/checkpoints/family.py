"""Configurations of DINOv3 and DINOv2 ViTs: by name, and as weights tell them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import dinov2
from .architecture import architecture
from .keys import Family
from .tensors import Reading

if TYPE_CHECKING:
    from transformers import Dinov2Config, Dinov2WithRegistersConfig, DINOv3ViTConfig

    Config = DINOv3ViTConfig | Dinov2Config | Dinov2WithRegistersConfig

_NOT_IN_WEIGHTS = (
    "num_attention_heads",
    "rope_theta",
    "layerscale_value",
    "layer_norm_eps",
    "drop_path_rate",
)
_GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def _preset(*sizes: int, **options: Any) -> Mapping[str, Any]:
    common = {"patch_size": 16, "num_register_tokens": 4}
    return MappingProxyType(dict(zip(_SIZES, sizes, strict=True)) | common | options)


# Arguments of DINOv3ViTConfig by Meta's names of the models (dinov3's hub/backbones.py; vitt16 is
# EUPE's, whose ViT-S and ViT-B have the sizes of DINOv3's).
CONFIGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "vitt16": _preset(192, 12, 3, 768),
        "vits16": _preset(384, 12, 6, 1536),
        "vits16plus": _preset(384, 12, 6, 1536, **_GATED),
        "vitb16": _preset(768, 12, 12, 3072),
        "vitl16": _preset(1024, 24, 16, 4096),
        "vith16plus": _preset(1280, 32, 20, 5120, **_GATED),
        "vit7b16": _preset(4096, 40, 32, 8192, query_bias=False, value_bias=False, **_GATED),
    }
)
STAGES = ("out_features", "out_indices")  # which a backbone returns, by name or by number
_NUM_HEADS = {preset["hidden_size"]: preset["num_attention_heads"] for preset in CONFIGS.values()}


def get_config(name: str, **overrides: Any) -> DINOv3ViTConfig:
    """Configuration of a model of the family, by its name in :data:`CONFIGS`.

    Raises:
        ValueError: no such model.
        TypeError: an override is no field of DINOv3ViTConfig.
    """
    if name not in CONFIGS:
        raise ValueError(f"name must be one of {', '.join(CONFIGS)}; got {name!r}")
    from transformers import DINOv3ViTConfig

    check_overrides(DINOv3ViTConfig, overrides)
    return DINOv3ViTConfig.from_dict({**CONFIGS[name], **overrides})


def field_names(kind: type[Config]) -> set[str]:
    """What a config of this class is given by name; of a backbone's, the stages too."""
    names = {field.name for field in fields(kind)}
    return names | {name for name in STAGES if hasattr(kind, name)}


def check_overrides(kind: type[Config], overrides: Mapping[str, Any]) -> None:
    """Raise TypeError unless all are fields of a class of configs."""
    if unknown := sorted(overrides.keys() - field_names(kind)):
        raise TypeError(f"no fields of {kind.__name__}: {', '.join(unknown)}")


def config_classes(family: Family) -> tuple[type[Config], ...]:
    """The classes of transformers for configs of a family."""
    from transformers import Dinov2Config, Dinov2WithRegistersConfig, DINOv3ViTConfig

    if family == "dinov2":
        return Dinov2Config, Dinov2WithRegistersConfig
    return (DINOv3ViTConfig,)


def config_class_of(model_type: str | None) -> type[Config] | None:
    """The class for a config.json of an encoder here; None for any other."""
    classes = (*config_classes("dinov3"), *config_classes("dinov2"))
    return {kind.model_type: kind for kind in classes}.get(model_type or "")


def config_class_for(reading: Reading) -> type[Config]:
    """The class of the config that fits the weights."""
    registers = "embeddings.register_tokens" in reading.tensors
    return config_classes(reading.family)[registers and reading.family == "dinov2"]


def config_of(reading: Reading, overrides: Mapping[str, Any]) -> Config:
    """The config that fits the weights; see :func:`hrvlm.checkpoints.convert.infer_config`."""
    kind, sizes = config_class_for(reading), architecture(reading.tensors)
    if reading.family == "dinov2":
        found = dinov2.config_fields(sizes)
        if "num_attention_heads" not in {**found, **overrides}:
            raise ValueError(_no_heads(sizes.hidden_size, "one of DINOv2's"))
        return kind.from_dict({**found, **overrides})
    names = {field.name for field in fields(kind)} - set(_NOT_IN_WEIGHTS)
    found = {name: value for name, value in asdict(sizes).items() if name in names}
    size = sizes.hidden_size
    if reading.periods is not None:
        pairs = reading.periods.numel()
        if not pairs or size % (4 * pairs) or reading.periods.ndim != 1:
            raise ValueError(
                f"rope_embed.periods {[*reading.periods.shape]}: expected head_dim / 4 numbers, "
                f"of a head_dim that divides the hidden_size {size}"
            )
        found["num_attention_heads"] = size // (4 * pairs)
        if "rope_theta" not in overrides:
            found["rope_theta"] = _theta(reading.periods)
    elif "num_attention_heads" not in overrides:
        if size not in _NUM_HEADS:
            family = ", ".join(map(str, sorted(_NUM_HEADS)))
            raise ValueError(_no_heads(size, f"in the family ({family})"))
        found["num_attention_heads"] = _NUM_HEADS[size]
    return kind.from_dict({**found, **overrides})


def _no_heads(size: int, known: str) -> str:
    return (
        f"hidden_size {size} is not {known}, so the number of heads can't "
        "be told from the weights: pass num_attention_heads"
    )


def periods_of(config: Any) -> Tensor:
    """``theta ** (4 j / D)``, j < D / 4: dinov3's ``layers/rope_position_encoding.py``."""
    count = config.hidden_size // config.num_attention_heads // 4
    return config.rope_theta ** (2 * torch.arange(count, dtype=torch.float32) / (2 * count))


def _theta(periods: Tensor) -> float:
    stored = periods.detach().double().cpu()
    count = stored.numel()
    exponents = torch.arange(count, dtype=torch.float64) / count
    # Released files hold bfloat16 values of the family's theta; another one has to be told exactly.
    if torch.allclose(stored, 100.0**exponents, rtol=2**-8, atol=0):
        return 100.0
    theta = float(f"{float(stored[-1]) ** (count / max(count - 1, 1)):.6g}")
    if torch.allclose(stored, theta**exponents, rtol=1e-5, atol=0):
        return theta
    raise ValueError(
        f"rope_embed.periods {stored[:4].tolist()}... are not exact powers of one rope_theta "
        "(made from min_period and max_period? rounded?): pass rope_theta"
    )
