"""What a ViT consists of, whatever family its config is of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..images.geometry import positive_int, square_side, true_or_false

# model_type of their configs; of DINOv3BackboneConfig, too
DINOV2_TYPES = ("dinov2", "dinov2_with_registers")
DINOV3_TYPES = ("dinov3_vit", "hrvlm_dinov3")


@dataclass(frozen=True)
class LearnedPositions:
    """Positions that are weights, for a square of patches and CLS.

    Attributes:
        side: Patches down and across.
        antialias: How they become those of another grid: with or without.
    """

    side: int
    antialias: bool

    @property
    def count(self) -> int:
        """With that of CLS."""
        return self.side**2 + 1


@dataclass(frozen=True)
class ViTSizes:
    """What parameters and blocks depend on, in the words of ``DINOv3ViTConfig``.

    Attributes:
        rope_theta: Base of RoPE; None where q and k are not rotated.
        positions: None where there are no learned ones.
        has_registers: Whether there is a tensor of registers, be it an empty one.
        has_mask_token: Whether there is one.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_register_tokens: int
    num_channels: int
    patch_size: int
    hidden_act: str
    use_gated_mlp: bool
    query_bias: bool
    key_bias: bool
    value_bias: bool
    proj_bias: bool
    mlp_bias: bool
    layerscale_value: float
    layer_norm_eps: float
    drop_path_rate: float
    rope_theta: float | None = None
    positions: LearnedPositions | None = None
    has_registers: bool = True
    has_mask_token: bool = True

    @property
    def num_prefix_tokens(self) -> int:
        """CLS and registers."""
        return 1 + self.num_register_tokens


_SAME_NAMES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "layerscale_value",
    "layer_norm_eps",
    "drop_path_rate",
)
_OF_DINOV3 = (
    "hidden_act",
    "intermediate_size",
    "num_register_tokens",
    "use_gated_mlp",
    "query_bias",
    "key_bias",
    "value_bias",
    "proj_bias",
    "mlp_bias",
)


def sizes_of(config: Any) -> ViTSizes:
    """The sizes in a config of DINOv3, or of DINOv2 with or without registers.

    Raises:
        ValueError: patches are not square, learned positions are not for a square of them, or a
            size is no positive int.
    """
    fields = {name: getattr(config, name) for name in _SAME_NAMES}
    fields["patch_size"] = patch_size_of(config)
    for name in ("patch_size", "hidden_size", "num_channels"):
        positive_int(f"config.{name}", fields[name])
    if is_dinov2(config):
        return ViTSizes(**fields, **_of_dinov2(config, fields["patch_size"]))
    fields |= {name: getattr(config, name) for name in _OF_DINOV3}
    positive_int("config.intermediate_size", fields["intermediate_size"])
    rotated = true_or_false("config.use_rope", getattr(config, "use_rope", True))
    return ViTSizes(**fields, rope_theta=config.rope_theta if rotated else None)


def is_dinov2(config: Any) -> bool:
    """Whether a config is of DINOv2, with or without registers."""
    return config.model_type in DINOV2_TYPES


def patch_size_of(config: Any) -> int:
    """The side of a square patch in pixels.

    Raises:
        ValueError: the config has patches that are not square.
    """
    return square_side("config.patch_size", config.patch_size)


def dinov2_mlp_size(hidden_size: int, ratio: int, gated: bool) -> int:
    """Width of the MLP: of a gated one two thirds, in eights, as transformers computes it."""
    width = int(hidden_size * ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if gated else width


def _of_dinov2(config: Any, patch_size: int) -> dict[str, Any]:
    gated = config.use_swiglu_ffn
    registers = getattr(config, "num_register_tokens", None)
    qkv = {f"{name}_bias": config.qkv_bias for name in ("query", "key", "value")}
    side = square_side("config.image_size", config.image_size) // patch_size
    return qkv | {
        "hidden_act": "silu" if gated else config.hidden_act,
        "intermediate_size": dinov2_mlp_size(config.hidden_size, config.mlp_ratio, gated),
        "num_register_tokens": registers or 0,
        "use_gated_mlp": gated,
        "proj_bias": True,
        "mlp_bias": True,
        # transformers' models differ in this, as Meta's do.
        "positions": LearnedPositions(side, antialias=registers is not None),
        "has_registers": registers is not None,
        "has_mask_token": getattr(config, "use_mask_token", True),
    }
