"""What only checkpoints of DINOv2 have: one matrix for gate and up, positions, their own config."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from .keys import GATE_AND_UP, Layout, own_name, split_layer
from .sizes import ViTSizes, dinov2_mlp_size

_POSITIONS = "embeddings.position_embeddings"
_CLS = "embeddings.cls_token"
_HEAD_DIM = 64  # of all released ones


def position_of_cls(canonical: dict[str, Tensor]) -> None:
    """Give CLS a position of zeros where it has none: timm adds it to the token, with registers."""
    stored = canonical[_POSITIONS]
    if stored.ndim == 3 and isqrt(stored.shape[1]) ** 2 == stored.shape[1]:
        canonical[_POSITIONS] = torch.cat([torch.zeros_like(stored[:, :1]), stored], dim=1)


def write(
    canonical: Mapping[str, Tensor], layout: Layout, joined: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Complete weights as Meta, timm or transformers name them.

    Args:
        canonical: The weights.
        layout: Any but ``fused``.
        joined: For Meta's and timm's: q, k and v in one, under their own keys.
    """
    gated = "layer.0.mlp.gate_proj.weight" in canonical
    in_memory, out = layout == "transformers_memory", dict(joined)
    blocks = "blocks" if layout in ("meta", "timm") else "encoder.layer"
    for key, tensor in canonical.items():
        index, rest = split_layer(key)
        if joined and rest.startswith(("attention.q_", "attention.k_", "attention.v_")):
            continue
        as_it_is = in_memory and rest.startswith(
            ("attention.", "mlp.") if gated else ("attention.",)
        )
        if gated and not as_it_is and rest.startswith("mlp.up_proj."):
            continue
        if gated and not as_it_is and rest.startswith("mlp.gate_proj."):
            up = canonical[f"layer.{index}.{rest.replace('gate', 'up')}"]
            tensor = torch.cat([tensor, up])
            rest = rest.replace("mlp.gate_proj", GATE_AND_UP)
        names: Layout = "transformers" if in_memory else layout
        name = rest if as_it_is else own_name(rest, names, "dinov2", gated=gated)
        if name is not None:
            out[name if index is None else f"{blocks}.{index}.{name}"] = tensor
    if layout == "timm" and "reg_token" in out:
        position = out["pos_embed"][:, :1]
        out |= {"cls_token": out["cls_token"] + position, "pos_embed": out["pos_embed"][:, 1:]}
    return out


def config_fields(sizes: ViTSizes) -> dict[str, Any]:
    """Fields of ``Dinov2Config``, or of ``Dinov2WithRegistersConfig``, that follow from sizes.

    The number of heads is among them where they have as many channels as in all released models.

    Raises:
        ValueError: no config of transformers says such sizes.
    """
    assert sizes.positions is not None
    size, inner = sizes.hidden_size, sizes.intermediate_size
    ratios = [r for r in range(1, 65) if dinov2_mlp_size(size, r, sizes.use_gated_mlp) == inner]
    if not ratios:
        raise ValueError(
            f"hidden_size {size} with an MLP of {inner}: expected a whole multiple, or two thirds "
            "of one where it is gated"
        )
    fields = {} if size % _HEAD_DIM else {"num_attention_heads": size // _HEAD_DIM}
    fields |= {
        "hidden_size": size,
        "num_hidden_layers": sizes.num_hidden_layers,
        "mlp_ratio": ratios[0],
        "use_swiglu_ffn": sizes.use_gated_mlp,
        "qkv_bias": sizes.query_bias,
        "patch_size": sizes.patch_size,
        "num_channels": sizes.num_channels,
        "image_size": sizes.positions.side * sizes.patch_size,
    }
    if sizes.has_registers:
        return fields | {"num_register_tokens": sizes.num_register_tokens}
    return fields | {"use_mask_token": sizes.has_mask_token}
