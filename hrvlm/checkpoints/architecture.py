"""What the weights of an encoder say about it, and which weights it has."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

from torch import Tensor

from .differences import Shape
from .keys import split_layer
from .sizes import LearnedPositions, ViTSizes


def architecture(canonical: Mapping[str, Tensor]) -> ViTSizes:
    """Sizes that follow from keys and shapes: all but the number of heads, which is 0 here.

    Raises:
        ValueError: the patch embedding is no convolution with a square kernel, or learned positions
            are not those of CLS and a square.
    """
    patch = tuple(canonical["embeddings.patch_embeddings.weight"].shape)
    if len(patch) != 4 or patch[2] != patch[3]:
        raise ValueError(
            f"patch embedding: expected a weight [C, channels, p, p], got {list(patch)}"
        )
    layers: dict[str, Tensor] = {}
    num_layers = 0
    for key, tensor in canonical.items():
        index, rest = split_layer(key)
        if index is not None:
            layers.setdefault(rest, tensor)
            num_layers = max(num_layers, index + 1)
    gated = "mlp.gate_proj.weight" in layers
    registers = canonical.get("embeddings.register_tokens")
    positions = _positions(canonical, registers is not None)
    return ViTSizes(
        patch_size=patch[2],
        num_channels=patch[1],
        hidden_size=patch[0],
        num_hidden_layers=num_layers,
        num_attention_heads=0,
        intermediate_size=layers["mlp.up_proj.weight"].shape[0]
        if "mlp.up_proj.weight" in layers and layers["mlp.up_proj.weight"].ndim
        else 4 * patch[0],
        # Of a shape without such an axis, any number says that it is another shape.
        num_register_tokens=0 if registers is None else [*registers.shape, 0, 0][1],
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        query_bias="attention.q_proj.bias" in layers,
        key_bias="attention.k_proj.bias" in layers,
        value_bias="attention.v_proj.bias" in layers,
        proj_bias=positions is not None or "attention.o_proj.bias" in layers,
        mlp_bias=positions is not None or "mlp.up_proj.bias" in layers,
        layerscale_value=1.0,
        layer_norm_eps=1e-6 if positions else 1e-5,
        drop_path_rate=0.0,
        positions=positions,
        has_registers=positions is None or registers is not None,
        has_mask_token=positions is None or "embeddings.mask_token" in canonical,
    )


def expected_shapes(sizes: ViTSizes) -> dict[str, Shape]:
    """Canonical key and shape of every weight of an encoder of these sizes."""
    size, inner, patch = sizes.hidden_size, sizes.intermediate_size, sizes.patch_size
    shapes: dict[str, Shape] = {
        "embeddings.cls_token": (1, 1, size),
        "embeddings.patch_embeddings.weight": (size, sizes.num_channels, patch, patch),
        "embeddings.patch_embeddings.bias": (size,),
        "norm.weight": (size,),
        "norm.bias": (size,),
    }
    if sizes.has_mask_token:
        shapes["embeddings.mask_token"] = (1, size) if sizes.positions else (1, 1, size)
    if sizes.has_registers:
        shapes["embeddings.register_tokens"] = (1, sizes.num_register_tokens, size)
    if sizes.positions:
        shapes["embeddings.position_embeddings"] = (1, sizes.positions.count, size)
    linears = {
        "attention.q_proj": ((size, size), sizes.query_bias),
        "attention.k_proj": ((size, size), sizes.key_bias),
        "attention.v_proj": ((size, size), sizes.value_bias),
        "attention.o_proj": ((size, size), sizes.proj_bias),
        "mlp.up_proj": ((inner, size), sizes.mlp_bias),
        "mlp.down_proj": ((size, inner), sizes.mlp_bias),
    }
    if sizes.use_gated_mlp:
        linears["mlp.gate_proj"] = ((inner, size), sizes.mlp_bias)
    layer: dict[str, Shape] = {
        f"norm{i}.{leaf}": (size,) for i in (1, 2) for leaf in ("weight", "bias")
    }
    layer |= {f"layer_scale{i}.lambda1": (size,) for i in (1, 2)}
    for name, (shape, has_bias) in linears.items():
        layer[f"{name}.weight"] = shape
        if has_bias:
            layer[f"{name}.bias"] = shape[:1]
    for i in range(sizes.num_hidden_layers):
        shapes |= {f"layer.{i}.{rest}": shape for rest, shape in layer.items()}
    return shapes


def _positions(canonical: Mapping[str, Tensor], registers: bool) -> LearnedPositions | None:
    stored = canonical.get("embeddings.position_embeddings")
    if stored is None:
        return None
    count = stored.shape[1] if stored.ndim == 3 else 0
    side = isqrt(max(count - 1, 0))
    if side < 1 or side**2 != count - 1:
        raise ValueError(
            f"position embeddings {list(stored.shape)}: expected [1, 1 + n, C], those of CLS and "
            "of a square of n patches"
        )
    return LearnedPositions(side, antialias=registers)
