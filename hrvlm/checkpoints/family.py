"""Configurations of the DINOv3 ViT family: by name, and as weights tell them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .tensors import Reading, architecture

if TYPE_CHECKING:
    from transformers import DINOv3ViTConfig

_GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def _preset(*sizes: int, **options: Any) -> Mapping[str, Any]:
    common = {"patch_size": 16, "num_register_tokens": 4}
    return MappingProxyType(dict(zip(_SIZES, sizes, strict=True)) | common | options)


# Arguments of DINOv3ViTConfig by Meta's names of the models (dinov3's hub/backbones.py).
CONFIGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "vits16": _preset(384, 12, 6, 1536),
        "vits16plus": _preset(384, 12, 6, 1536, **_GATED),
        "vitb16": _preset(768, 12, 12, 3072),
        "vitl16": _preset(1024, 24, 16, 4096),
        "vith16plus": _preset(1280, 32, 20, 5120, **_GATED),
        "vit7b16": _preset(4096, 40, 32, 8192, query_bias=False, value_bias=False, **_GATED),
    }
)
_NUM_HEADS = {preset["hidden_size"]: preset["num_attention_heads"] for preset in CONFIGS.values()}


def get_config(name: str, **overrides: Any) -> DINOv3ViTConfig:
    """Configuration of a model of the family, by its name in :data:`CONFIGS`.

    Raises:
        ValueError: no such model.
        TypeError: an override is no field of DINOv3ViTConfig.
    """
    if name not in CONFIGS:
        raise ValueError(f"name must be one of {', '.join(CONFIGS)}; got {name!r}")
    check_overrides(overrides)
    return make_config(CONFIGS[name], overrides)


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Raise TypeError unless all are fields of DINOv3ViTConfig."""
    from transformers import DINOv3ViTConfig

    unknown = sorted(overrides.keys() - {field.name for field in fields(DINOv3ViTConfig)})
    if unknown:
        raise TypeError(f"no fields of DINOv3ViTConfig: {', '.join(unknown)}")


def make_config(known: Mapping[str, Any], overrides: Mapping[str, Any]) -> DINOv3ViTConfig:
    """A config with the fields that are known, or overridden."""
    from transformers import DINOv3ViTConfig

    return DINOv3ViTConfig.from_dict({**known, **overrides})


def config_of(reading: Reading, overrides: Mapping[str, Any]) -> DINOv3ViTConfig:
    """The config that fits the weights; see :func:`hrvlm.checkpoints.convert.infer_config`."""
    found = architecture(reading.tensors)
    size = found["hidden_size"]
    if reading.periods is not None:
        found["num_attention_heads"] = size // (4 * reading.periods.numel())
        if "rope_theta" not in overrides:
            found["rope_theta"] = _theta(reading.periods)
    elif "num_attention_heads" not in overrides:
        if size not in _NUM_HEADS:
            family = ", ".join(map(str, sorted(_NUM_HEADS)))
            raise ValueError(
                f"hidden_size {size} is not in the family ({family}), so the number of heads can't "
                "be told from the weights: pass num_attention_heads"
            )
        found["num_attention_heads"] = _NUM_HEADS[size]
    return make_config(found, overrides)


def periods_of(config: DINOv3ViTConfig) -> Tensor:
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
