"""DINOv3 ViT checkpoints of every origin, to the layout of transformers' files and back.

    transformers         layer.N.attention.{q,k,v,o}_proj, layer_scale1.lambda1, mlp.{up,down}_proj
    transformers_memory  the same with model.layer.N: transformers' DINOv3ViTModel.state_dict()
    fused                the same with attention.qkv.weight, qkv_bias.{q,k,v}_bias: DINOv3Encoder
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

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..images.processor import IMAGENET, SAT493M
from .differences import KeyDifferences, compare
from .family import CONFIGS, check_overrides, config_of, make_config, periods_of
from .files import WEIGHT_SUFFIXES, load_checkpoint, read_json, summary, write_checkpoint
from .keys import Layout, find_prefix, layout_of, unwrapped
from .tensors import (
    CheckpointInfo,
    Reading,
    architecture,
    check_layout,
    expected_shapes,
    read,
    write,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import DINOv3ViTConfig

__all__ = [
    "CheckpointInfo",
    "KeyDifferences",
    "Layout",
    "OpenedCheckpoint",
    "compare",
    "convert",
    "detect_layout",
    "foreign_base",
    "from_transformers",
    "infer_config",
    "is_foreign",
    "load_checkpoint",
    "load_foreign",
    "load_into",
    "open_checkpoint",
    "to_transformers",
]

_PIXEL_STATISTICS = {"imagenet": IMAGENET, "sat493m": SAT493M}


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
        out["rope_embed.periods"] = periods_of(config or infer_config(canonical))
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
    check_overrides(overrides)
    return config_of(read(state_dict), overrides)


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
    weights = _weights_of(source)
    with _naming(source):
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
    if layout == "meta":  # periods are the model's own; a model without mask_k_bias has no masks
        own = {key: own[key] for key in own if key in actual or not key.endswith(".bias_mask")}
        own["rope_embed.periods"] = target[actual["rope_embed.periods"]]
    differences = compare(own, {key: target[name] for key, name in actual.items()})
    if differences:
        with _naming(source):
            raise ValueError(
                f"the checkpoint ({reading.info.layout} layout) does not fit the model:\n"
                f"{differences}"
            )
    on_meta = any(value.is_meta for value in target.values())
    model.load_state_dict({actual[key]: value for key, value in own.items()}, assign=on_meta)
    return reading.info


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint of any layout, as :func:`convert` would write it.

    Attributes:
        tensors: Weights under the keys of transformers' files.
        config: That fits them.
        preprocessor: The document of an image processor.
        info: What was found.
    """

    tensors: dict[str, Tensor]
    config: DINOv3ViTConfig
    preprocessor: dict[str, Any]
    info: CheckpointInfo


def open_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    config: DINOv3ViTConfig | None = None,
    pixel_statistics: str | None = None,
    strict: bool = True,
    **overrides: Any,
) -> OpenedCheckpoint:
    """Read a checkpoint of any known layout; the arguments are those of :func:`convert`.

    Args:
        source: A path for :func:`load_checkpoint`, or a state dict.
        config: Default: the config.json of transformers beside the weights, else what fits them.
        pixel_statistics: As in :func:`convert`.
        strict: Raise where keys are missing or unexpected, or the config does not fit.
        **overrides: Fields of DINOv3ViTConfig.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: as :func:`load_checkpoint`, :func:`to_transformers` and :func:`infer_config`, or
            the config does not fit the weights.
        TypeError: an override is no field of DINOv3ViTConfig.
    """
    given = config is not None
    if pixel_statistics is not None and pixel_statistics not in _PIXEL_STATISTICS:
        raise ValueError(
            f"pixel_statistics must be {' or '.join(_PIXEL_STATISTICS)}, got {pixel_statistics!r}"
        )
    check_overrides(overrides)
    weights = _weights_of(source)
    stored, preprocessor = _documents_beside(source)
    with _naming(source):
        reading = read(weights, strict=strict)
        if config is None and stored:
            config = _stored_config(source, stored, overrides)
        elif config is None:
            config = config_of(reading, overrides)
        if strict and (difference := _config_difference(reading.tensors, config)):
            raise ValueError(f"the config does not fit the weights:\n{difference}")
    if not given:
        config.dtype = reading.tensors["embeddings.patch_embeddings.weight"].dtype
    if preprocessor is None or pixel_statistics is not None:
        preprocessor = _preprocessor_config(pixel_statistics or _likely_statistics(reading))
    return OpenedCheckpoint(reading.tensors, config, preprocessor, reading.info)


def is_foreign(source: str | os.PathLike[str]) -> bool:
    """Whether `source` is for :func:`open_checkpoint`, and not a directory of transformers.

    That is a weight file, be it there or not, or a local directory with weights but no config.json
    of transformers.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        return path.is_file() or path.suffix in WEIGHT_SUFFIXES
    if (path / "adapter_config.json").is_file():
        return False
    return "model_type" not in (read_json(path / "config.json") or {})


def foreign_base(directory: str | os.PathLike[str]) -> str | None:
    """What the adapter in `directory` was trained on, where that is foreign; else None."""
    base = (read_json(Path(directory, "adapter_config.json")) or {}).get("base_model_name_or_path")
    return base if isinstance(base, str) and is_foreign(base) else None


def load_foreign(
    load: Callable[..., Any], path: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    """Call ``load``, a ``from_pretrained``, with what :func:`open_checkpoint` makes of `path`.

    Args:
        load: Of a model of DINOv3ViTConfig.
        path: See :func:`is_foreign`.
        *args: Passed on.
        **kwargs: Fields of the config where no ``config`` is given; the others are passed on.
    """
    from transformers import DINOv3ViTConfig

    config, overrides = kwargs.pop("config", None), {}
    if config is None:
        names = {field.name for field in fields(DINOv3ViTConfig)} - {"dtype"}
        overrides = {name: kwargs.pop(name) for name in names & kwargs.keys()}
    elif not isinstance(config, DINOv3ViTConfig):
        config = DINOv3ViTConfig.from_pretrained(config)
    else:
        config = copy.deepcopy(config)
    lenient = not kwargs.get("strict", True) or kwargs.get("ignore_mismatched_sizes", False)
    opened = open_checkpoint(path, config=config, strict=not lenient, **overrides)
    kwargs.pop("subfolder", None)
    opened.config.name_or_path = str(path)  # for errors; loading forgets it
    loaded = load(None, *args, config=opened.config, state_dict=opened.tensors, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config.name_or_path = str(path)
    return loaded


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
        FileExistsError: files are there and `overwrite` is False.
        FileNotFoundError, ValueError, TypeError: as :func:`open_checkpoint`.
    """
    opened = open_checkpoint(source, pixel_statistics=pixel_statistics, **overrides)
    opened.config.architectures = ["DINOv3ViTModel"]
    if dtype is not None:
        opened.config.dtype = dtype
    documents = {
        "config.json": json.loads(opened.config.to_json_string()),
        "preprocessor_config.json": opened.preprocessor,
    }
    write_checkpoint(directory, opened.tensors, documents, dtype=dtype, overwrite=overwrite)
    return opened.info


def _weights_of(source: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    return source if isinstance(source, Mapping) else load_checkpoint(source)


@contextmanager
def _naming(source: str | os.PathLike[str] | Mapping[str, Any]) -> Iterator[None]:
    """Errors of what is in a file name it."""
    try:
        yield
    except Exception as error:  # tensors of a damaged file may have any shape and dtype
        if isinstance(source, Mapping) or str(source) in str(error):
            raise
        what = str(error) if isinstance(error, ValueError) else summary(error)
        raise ValueError(f"{source}: {what}") from error


def _documents_beside(
    source: str | os.PathLike[str] | Mapping[str, Any],
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Config and preprocessor config in the directory of a transformers checkpoint, else None."""
    if isinstance(source, Mapping):
        return None, None
    home = _home(source)
    stored = read_json(home / "config.json")
    if stored is None or stored.get("model_type") != "dinov3_vit":
        return None, None
    return stored, read_json(home / "preprocessor_config.json")


def _home(source: str | os.PathLike[str]) -> Path:
    path = Path(source).expanduser()
    return path if path.is_dir() else path.parent


def _stored_config(
    source: Any, stored: Mapping[str, Any], overrides: Mapping[str, Any]
) -> DINOv3ViTConfig:
    try:
        return make_config(stored, overrides)
    except Exception as error:  # the fields of a damaged config may have any type and value
        path = _home(source) / "config.json"
        raise ValueError(f"{path}: no config of a DINOv3 ViT ({summary(error)})") from error


def _config_difference(
    tensors: Mapping[str, Tensor], config: DINOv3ViTConfig
) -> KeyDifferences | str:
    found = architecture(tensors)["num_hidden_layers"]
    if config.num_hidden_layers != found:  # told first: the config may say any number
        return f"num_hidden_layers={config.num_hidden_layers}, the weights have {found}"
    return compare(tensors, expected_shapes(vars(config)))


def _likely_statistics(reading: Reading) -> str:
    size = reading.tensors["embeddings.patch_embeddings.weight"].shape[0]
    large = size == CONFIGS["vitl16"]["hidden_size"]
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
