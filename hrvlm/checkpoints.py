"""DINOv3 ViT checkpoints of every origin, to the layout of transformers' files and back.

    transformers         layer.N.attention.{q,k,v,o}_proj, layer_scale1.lambda1, mlp.{up,down}_proj
    transformers_memory  the same with model.layer.N: transformers' DINOv3ViTModel.state_dict()
    fused                the same with attention.qkv.{weight,q_bias,k_bias,v_bias}: DINOv3Encoder
    meta                 blocks.N.attn.{qkv,proj}, ls1.gamma, mlp.{fc1,fc2}, storage_tokens
    timm                 blocks.N.attn.{qkv,q_bias,v_bias,proj}, gamma_1, mlp.{fc1,fc2}, reg_token

Gated MLPs add mlp.gate_proj; they are mlp.{w1,w2,w3} in Meta's files, mlp.{fc1_g,fc1_x,fc2} in
timm's.
A layout is recognised by its keys, behind any prefix (``module.``, ``teacher.backbone.``,
``vision_encoder.``, ...). Renaming, splitting and joining move data only, so a round trip is equal
bit for bit.

The bias of k: Meta multiplies ``qkv.bias`` by a buffer ``bias_mask`` that is 0 over k, and whose
stored values are not to be relied on (NaN in some files). With a ``bias_mask``, or where the middle
third is all zero or NaN, k has no bias, as in transformers. A middle third with other values and no
mask is kept, and the config says ``key_bias=True``.

RoPE's ``periods`` are not carried over: transformers, timm and hrvlm compute them in float32 from
``rope_theta``, while released files hold them rounded to bfloat16.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoint_files import load_checkpoint, read_json, write_checkpoint
from .checkpoint_keys import Layout, find_prefix, layout_of, unwrapped
from .checkpoint_report import KeyDifferences, compare
from .checkpoint_tensors import (
    CheckpointInfo,
    Reading,
    architecture,
    check_layout,
    expected_shapes,
    read,
    write,
)
from .image_processing import IMAGENET, SAT493M

if TYPE_CHECKING:
    from torch import nn
    from transformers import DINOv3ViTConfig

__all__ = [
    "CONFIGS",
    "CheckpointInfo",
    "KeyDifferences",
    "Layout",
    "compare",
    "convert",
    "detect_layout",
    "from_transformers",
    "get_config",
    "infer_config",
    "load_checkpoint",
    "load_into",
    "to_transformers",
]

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

_PIXEL_STATISTICS = {"imagenet": IMAGENET, "sat493m": SAT493M}


def get_config(name: str, **overrides: Any) -> DINOv3ViTConfig:
    """Configuration of a model of the family, by its name in :data:`CONFIGS`.

    Raises:
        ValueError: no such model.
        TypeError: an override is no field of DINOv3ViTConfig.
    """
    if name not in CONFIGS:
        raise ValueError(f"name must be one of {', '.join(CONFIGS)}; got {name!r}")
    return _make_config(CONFIGS[name], overrides)


def detect_layout(keys: Iterable[str]) -> Layout:
    """The layout of a checkpoint by its keys, prefixes and wrappers ignored.

    Raises:
        ValueError: the keys are not those of one DINOv3 ViT in a known layout.
    """
    names = [unwrapped(key) for key in keys]
    prefix = find_prefix(names)
    return layout_of(key.removeprefix(prefix) for key in names if key.startswith(prefix))


def to_transformers(
    state_dict: Mapping[str, Any], *, layout: Layout | None = None
) -> dict[str, Tensor]:
    """Weights of any known layout under transformers' on-disk keys.

    The result may share memory with the input. Use :func:`load_into` or :func:`convert` to learn
    what was left out.

    Args:
        state_dict: Weights; nested containers such as ``{"teacher": {...}}`` are looked through.
        layout: Default: recognised by the keys.

    Raises:
        ValueError: the layout is unknown, or keys are missing, unexpected or of the wrong shape (a
            grouped list).
    """
    return read(state_dict, layout).tensors


def from_transformers(
    state_dict: Mapping[str, Any], layout: Layout, config: DINOv3ViTConfig | None = None
) -> dict[str, Tensor]:
    """Inverse of :func:`to_transformers`: weights under the keys of `layout`.

    Args:
        state_dict: Weights in any layout that :func:`to_transformers` reads.
        layout: The layout wanted. For ``meta``, the buffers ``rope_embed.periods`` and
            ``bias_mask`` are made anew as Meta's model initialises them; for ``timm``, gated MLPs
            are written as ``fc1_g`` and ``fc1_x``.
        config: Gives head_dim and ``rope_theta`` for Meta's periods; default: :func:`infer_config`.

    Raises:
        ValueError: `layout` is unknown, or can't express these weights (a bias of k in timm's, a
            bias of only one of q and v in Meta's or timm's).
    """
    check_layout(layout)
    canonical = to_transformers(state_dict)
    out = write(canonical, layout)
    if layout == "meta":
        out["rope_embed.periods"] = _periods(config or infer_config(canonical))
    return out


def infer_config(state_dict: Mapping[str, Any], **overrides: Any) -> DINOv3ViTConfig:
    """Configuration that fits the weights.

    Sizes, biases and the kind of MLP come from keys and shapes; head_dim and ``rope_theta`` from
    Meta's stored periods where there are any, else from the family by hidden size; the rest are the
    family's defaults.

    Args:
        state_dict: Weights in any layout that :func:`to_transformers` reads.
        **overrides: Fields of DINOv3ViTConfig, e.g. ``num_attention_heads`` for a model outside the
            family.

    Raises:
        ValueError: the number of heads can't be told, or the periods are not those of a single
            ``rope_theta``.
        TypeError: an override is no field of DINOv3ViTConfig.
    """
    return _config_of(read(state_dict), overrides)


def load_into(
    model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any]
) -> CheckpointInfo:
    """Load a checkpoint of any known layout into a model of any known layout, strictly.

    Args:
        model: ``DINOv3Encoder``, transformers' ``DINOv3ViTModel`` or ``DINOv3ViTBackbone``, timm's
            ``vit_*_dinov3``, or Meta's model; weights on the meta device are replaced instead of
            filled.
        source: A path for :func:`load_checkpoint`, or a state dict.

    Raises:
        ValueError: keys are missing, unexpected or of the wrong shape; nothing is loaded then.
    """
    reading = read(_weights_of(source))
    target = model.state_dict()
    actual = {unwrapped(key): key for key in target}
    prefix = find_prefix(actual)
    if prefix:
        raise ValueError(
            f"model: its encoder is {prefix.rstrip('.')!r}; pass that part of the model"
        )
    layout = layout_of(actual)
    own = write(reading.tensors, layout)
    if layout == "meta":  # periods are the model's own; a model without mask_k_bias has no masks
        own = {key: own[key] for key in own if key in actual or not key.endswith(".bias_mask")}
        own["rope_embed.periods"] = target[actual["rope_embed.periods"]]
    differences = compare(own, {key: target[name] for key, name in actual.items()})
    if differences:
        raise ValueError(
            f"the checkpoint ({reading.info.layout} layout) does not fit the model:\n{differences}"
        )
    on_meta = any(value.is_meta for value in target.values())
    model.load_state_dict({actual[key]: value for key, value in own.items()}, assign=on_meta)
    return reading.info


def convert(
    source: str | os.PathLike[str] | Mapping[str, Any],
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    pixel_statistics: str | None = None,
    overwrite: bool = False,
    **overrides: Any,
) -> CheckpointInfo:
    """Write a checkpoint of any known layout as a directory for ``from_pretrained``.

    The directory gets ``model.safetensors``, ``config.json`` and ``preprocessor_config.json``.
    Where `source` is a directory of transformers, its own config and preprocessor config are kept.

    Args:
        source: A path for :func:`load_checkpoint`, or a state dict.
        directory: Where to write; made if need be.
        dtype: Cast weights to it.
        pixel_statistics: Mean and std of the pixels, ``imagenet`` or ``sat493m``. By default
            ``sat493m`` for a ViT-L with a ``local_cls_norm`` (only that one has it, dinov3's
            ``hub/backbones.py``), else ``imagenet``: a 7B model trained on satellite images can't
            be told from its keys.
        overwrite: Replace files that are there already.
        **overrides: Fields of DINOv3ViTConfig.

    Raises:
        FileNotFoundError: `source` does not exist.
        FileExistsError: files are there and `overwrite` is False.
        ValueError: as :func:`load_checkpoint`, :func:`to_transformers` and :func:`infer_config`, or
            the config does not fit the weights.
        TypeError: an override is no field of DINOv3ViTConfig.
    """
    if pixel_statistics is not None and pixel_statistics not in _PIXEL_STATISTICS:
        raise ValueError(
            f"pixel_statistics must be {' or '.join(_PIXEL_STATISTICS)}, got {pixel_statistics!r}"
        )
    reading = read(_weights_of(source))
    stored, preprocessor = _documents_beside(source)
    config = _make_config(stored, overrides) if stored else _config_of(reading, overrides)
    differences = compare(reading.tensors, expected_shapes(vars(config)))
    if differences:
        raise ValueError(f"the config does not fit the weights:\n{differences}")
    config.architectures = ["DINOv3ViTModel"]
    config.dtype = dtype or reading.tensors["embeddings.patch_embeddings.weight"].dtype
    if preprocessor is None or pixel_statistics is not None:
        preprocessor = _preprocessor_config(pixel_statistics or _likely_statistics(reading))
    documents = {
        "config.json": json.loads(config.to_json_string()),
        "preprocessor_config.json": preprocessor,
    }
    write_checkpoint(directory, reading.tensors, documents, dtype=dtype, overwrite=overwrite)
    return reading.info


def _weights_of(source: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    return source if isinstance(source, Mapping) else load_checkpoint(source)


def _documents_beside(
    source: str | os.PathLike[str] | Mapping[str, Any],
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Config and preprocessor config in the directory of a transformers checkpoint, else None."""
    if isinstance(source, Mapping):
        return None, None
    path = Path(source).expanduser()
    home = path if path.is_dir() else path.parent
    stored = read_json(home / "config.json")
    if stored is None or stored.get("model_type") != "dinov3_vit":
        return None, None
    return stored, read_json(home / "preprocessor_config.json")


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    from transformers import DINOv3ViTConfig

    unknown = sorted(overrides.keys() - {field.name for field in fields(DINOv3ViTConfig)})
    if unknown:
        raise TypeError(f"no fields of DINOv3ViTConfig: {', '.join(unknown)}")


def _make_config(known: Mapping[str, Any], overrides: Mapping[str, Any]) -> DINOv3ViTConfig:
    from transformers import DINOv3ViTConfig

    _check_overrides(overrides)
    return DINOv3ViTConfig.from_dict({**known, **overrides})


def _config_of(reading: Reading, overrides: Mapping[str, Any]) -> DINOv3ViTConfig:
    _check_overrides(overrides)
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
    return _make_config(found, overrides)


def _periods(config: DINOv3ViTConfig) -> Tensor:
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


def _likely_statistics(reading: Reading) -> str:
    large = reading.tensors["norm.weight"].shape[0] == CONFIGS["vitl16"]["hidden_size"]
    local = any(".local_cls_norm." in f".{key}" for key in reading.info.left_out)
    return "sat493m" if large and local else "imagenet"


def _preprocessor_config(statistics: str) -> dict[str, Any]:
    mean, std = _PIXEL_STATISTICS[statistics]
    return {
        "image_processor_type": "DINOv3ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
