"""What a ViT consists of, whatever family its config is of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..images.geometry import square_side


@dataclass(frozen=True)
class ViTSizes:
    """The fields of a ``DINOv3ViTConfig`` that parameters and blocks depend on, for any family.

    Attributes:
        rope_theta: Base of RoPE; None where q and k are not rotated.
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

    @property
    def num_prefix_tokens(self) -> int:
        """CLS and registers."""
        return 1 + self.num_register_tokens


_SAME_NAMES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "hidden_act",
    "layerscale_value",
    "layer_norm_eps",
    "drop_path_rate",
)
_OF_DINOV3 = (
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
    """The sizes in a ``DINOv3ViTConfig``.

    Raises:
        ValueError: patches are not square.
    """
    fields = {name: getattr(config, name) for name in _SAME_NAMES + _OF_DINOV3}
    theta = config.rope_theta if getattr(config, "use_rope", True) else None
    return ViTSizes(**fields, patch_size=patch_size_of(config), rope_theta=theta)


def patch_size_of(config: Any) -> int:
    """The side of a square patch in pixels.

    Raises:
        ValueError: the config has patches that are not square.
    """
    return square_side("config.patch_size", config.patch_size)
