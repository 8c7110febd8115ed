"""DINOv3 and DINOv2 checkpoints of every origin, to the layout of transformers' files and back.

DINOv3, and EUPE, which has its parts:

    transformers         layer.N.attention.{q,k,v,o}_proj, layer_scale1.lambda1, mlp.{up,down}_proj
    transformers_memory  the same with model.layer.N: transformers' DINOv3ViTModel.state_dict()
    fused                the same with attention.qkv.weight, qkv_bias.{q,k,v}_bias: DINOv3Encoder
    meta                 blocks.N.attn.{qkv,proj}, ls1.gamma, mlp.{fc1,fc2}, storage_tokens
    timm                 blocks.N.attn.{qkv,q_bias,v_bias,proj}, gamma_1, mlp.{fc1,fc2}, reg_token

DINOv2, with and without registers, which has learned positions:

    transformers         encoder.layer.N.attention.attention.{query,key,value}, mlp.{fc1,fc2}
    transformers_memory  encoder.layer.N.attention.{q,k,v,o}_proj: its models from 5.24 on
    fused                as of DINOv3, with embeddings.position_embeddings: DINOv2Encoder
    meta                 blocks.N.attn.{qkv,proj}, ls1.gamma, register_tokens, pos_embed, mask_token
    timm                 the same with reg_token and no mask_token

Gated MLPs of DINOv3 add mlp.gate_proj; they are mlp.{w1,w2,w3} in Meta's files, mlp.{fc1_g,fc1_x,
fc2} in timm's. In DINOv2's gate and up are one matrix: mlp.weights_in, mlp.w12 or mlp.fc1.
A layout is recognised by its keys, behind any prefix (``module.``, ``teacher.backbone.``,
``vision_encoder.``, ...). Renaming, splitting and joining move data only, so a round trip is equal
bit for bit; but timm has added the position of CLS to its token where there are registers.

The bias of k in DINOv3: Meta multiplies ``qkv.bias`` by a buffer ``bias_mask`` that is 0 over k,
and whose stored values are not to be relied on (NaN in some files). With a ``bias_mask``, or where
the middle third is all zero or NaN, k has no bias, as in transformers. A middle third with other
values and no mask is kept, and the config says ``key_bias=True``.

RoPE's ``periods`` are not carried over: transformers, timm and hrvlm compute them in float32 from
``rope_theta``, while released files hold them rounded to bfloat16.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .differences import KeyDifferences, compare
from .family import check_overrides, config_class_for, config_of, periods_of
from .files import load_checkpoint, write_checkpoint
from .foreign import naming, open_checkpoint, weights_of
from .keys import Layout, find_prefix, layout_of, unwrapped
from .tensors import (
    CheckpointInfo,
    check_layout,
    read,
    write,
)

if TYPE_CHECKING:
    from torch import nn

    from .family import Config

__all__ = [
    "CheckpointInfo",
    "KeyDifferences",
    "Layout",
    "compare",
    "convert",
    "detect_layout",
    "from_transformers",
    "infer_config",
    "load_checkpoint",
    "load_into",
    "to_transformers",
]


# transformers' models, by the model_type of their configs.
_STOCK_MODELS = {
    "dinov3_vit": "DINOv3ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}


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
    return write(read(state_dict, layout).tensors, "transformers")


def from_transformers(
    state_dict: Mapping[str, Any], layout: Layout, config: Config | None = None
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
    reading = read(state_dict)
    out = write(reading.tensors, layout)
    if layout == "meta" and reading.family == "dinov3":
        out["rope_embed.periods"] = periods_of(config or config_of(reading, {}))
    return out


def infer_config(state_dict: Mapping[str, Any], **overrides: Any) -> Config:
    """Configuration that fits the weights.

    Sizes, biases and the kind of MLP come from keys and shapes; of DINOv3 head_dim and
    ``rope_theta`` from Meta's stored periods where there are any, else from the family by hidden
    size; heads of DINOv2 have 64 channels. The rest are the family's defaults.

    Args:
        state_dict: Weights in any layout that :func:`to_transformers` reads.
        **overrides: Fields of the config, e.g. ``num_attention_heads`` for a model outside the
            family.

    Raises:
        ValueError: the number of heads can't be told, or the periods are not those of a single
            ``rope_theta``.
        TypeError: an override is no field of the config.
    """
    reading = read(state_dict)
    check_overrides(config_class_for(reading), overrides)
    return config_of(reading, overrides)


def load_into(
    model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any]
) -> CheckpointInfo:
    """Load a checkpoint of any known layout into a model of any known layout, strictly.

    Args:
        model: ``DINOv3Encoder`` or ``DINOv2Encoder``, transformers' models or backbones of either,
            timm's ``vit_*_dinov3`` or ``vit_*_dinov2``, or Meta's model; weights on the meta device
            are replaced instead of filled.
        source: A path for :func:`load_checkpoint`, or a state dict.

    Raises:
        TypeError: it is no model.
        ValueError: keys are missing, unexpected or of the wrong shape; nothing is loaded then.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a model of torch, got {type(model).__name__}")
    weights = weights_of(source)
    with naming(source):
        reading = read(weights)
    target = model.state_dict()
    actual = {unwrapped(key): key for key in target}
    prefix = find_prefix(actual)
    if prefix:
        raise ValueError(
            f"model: its encoder is {prefix.rstrip('.')!r}; pass that part of the model"
        )
    layout = layout_of(actual)
    own = write(reading.tensors, layout)
    if layout == "meta" and reading.family == "dinov3":
        # Periods are the model's own; a model without mask_k_bias has no masks.
        own = {key: own[key] for key in own if key in actual or not key.endswith(".bias_mask")}
        own["rope_embed.periods"] = target[actual["rope_embed.periods"]]
    differences = compare(own, {key: target[name] for key, name in actual.items()})
    if differences:
        with naming(source):
            raise ValueError(
                f"the checkpoint ({reading.info.layout} layout) does not fit the model:\n"
                f"{differences}"
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
        **overrides: Fields of the config.

    Raises:
        FileExistsError: files are there and `overwrite` is False.
        FileNotFoundError, ValueError, TypeError: as :func:`open_checkpoint`.
    """
    opened = open_checkpoint(source, pixel_statistics=pixel_statistics, **overrides)
    opened.config.architectures = [_STOCK_MODELS[opened.config.model_type]]
    if dtype is not None:
        opened.config.dtype = dtype
    documents = {
        "config.json": json.loads(opened.config.to_json_string()),
        "preprocessor_config.json": opened.preprocessor,
    }
    write_checkpoint(directory, opened.tensors, documents, dtype=dtype, overwrite=overwrite)
    return opened.info
