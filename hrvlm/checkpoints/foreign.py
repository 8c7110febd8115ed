"""Checkpoints that are no directory of transformers, opened as if they were.

The layouts are those of :mod:`hrvlm.checkpoints.convert`, which writes what is opened here.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..images.processor import IMAGENET, SAT493M
from .architecture import architecture, expected_shapes
from .differences import KeyDifferences, compare
from .family import (
    CONFIGS,
    STAGES,
    check_overrides,
    config_class_for,
    config_class_of,
    config_classes,
    config_of,
    field_names,
)
from .files import WEIGHT_SUFFIXES, load_checkpoint, read_json, summary
from .keys import Family
from .sizes import DINOV2_TYPES, DINOV3_TYPES, sizes_of
from .tensors import CheckpointInfo, Reading, read, write

if TYPE_CHECKING:
    from .family import Config

_PIXEL_STATISTICS = {"imagenet": IMAGENET, "sat493m": SAT493M}


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
    config: Config
    preprocessor: dict[str, Any]
    info: CheckpointInfo


def open_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    config: Config | None = None,
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
        **overrides: Fields of the config.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: as :func:`load_checkpoint`, :func:`to_transformers` and :func:`infer_config`, or
            the config does not fit the weights.
        TypeError: an override is no field of the config.
    """
    given = config is not None
    if pixel_statistics is not None and pixel_statistics not in _PIXEL_STATISTICS:
        raise ValueError(
            f"pixel_statistics must be {' or '.join(_PIXEL_STATISTICS)}, got {pixel_statistics!r}"
        )
    weights = weights_of(source)
    stored, preprocessor = _documents_beside(source)
    with naming(source):
        reading = read(weights, strict=strict)
    kind = config_class_of((stored or {}).get("model_type")) or config_class_for(reading)
    check_overrides(kind, overrides)
    with naming(source):
        if strict and not architecture(reading.tensors).num_hidden_layers:
            raise ValueError("no layer in it: a part of a checkpoint?")
        if config is None and stored:
            # Stages have two names, and those that are given replace both.
            replaced = STAGES if overrides.keys() & set(STAGES) else ()
            kept = {name: value for name, value in stored.items() if name not in replaced}
            config = _stored_config(source, kind, {**kept, **overrides})
        elif config is None:
            config = config_of(reading, overrides)
        if strict and (difference := _config_difference(reading.tensors, config)):
            raise ValueError(f"the config does not fit the weights:\n{difference}")
    if not given:
        config.dtype = reading.tensors["embeddings.patch_embeddings.weight"].dtype
    if preprocessor is None or pixel_statistics is not None:
        statistics = pixel_statistics or _likely_statistics(reading)
        preprocessor = _preprocessor_config(statistics, reading.family)
    stored_tensors = write(reading.tensors, "transformers")
    return OpenedCheckpoint(stored_tensors, config, preprocessor, reading.info)


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


def check_family(model_class: Any, directory: Path) -> None:
    """Raise ValueError where a local directory says that its weights are of another family."""
    kind = (read_json(directory / "config.json") or {}).get("model_type")
    known = DINOV2_TYPES if model_class.family == "dinov2" else DINOV3_TYPES
    if kind not in (None, model_class.config_class.model_type, *known):
        raise ValueError(
            f"{directory}: weights of {kind}, which are not those of a {model_class.__name__}"
        )


def load_foreign(
    model_class: Any,
    load: Callable[..., Any],
    path: str | os.PathLike[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call ``load``, a ``from_pretrained``, with what :func:`open_checkpoint` makes of `path`.

    Args:
        model_class: Of an encoder; its ``family`` says whose weights they have to be.
        load: Its ``from_pretrained`` for directories of transformers.
        path: See :func:`is_foreign`.
        *args: Passed on.
        **kwargs: Fields of the config where no ``config`` is given; the others are passed on.

    Raises:
        ValueError: they are another family's, or as :func:`open_checkpoint`.
    """
    kinds = config_classes(model_class.family)
    config, overrides = kwargs.pop("config", None), {}
    if config is None:
        names = set[str]().union(*map(field_names, kinds)) - {"dtype"}
        overrides = {name: kwargs.pop(name) for name in names & kwargs.keys()}
    elif not isinstance(config, kinds):
        config = model_class.config_class.from_pretrained(config)
    else:
        config = copy.deepcopy(config)
    lenient = not kwargs.get("strict", True) or kwargs.get("ignore_mismatched_sizes", False)
    opened = open_checkpoint(path, config=config, strict=not lenient, **overrides)
    if not isinstance(opened.config, kinds):
        raise ValueError(
            f"{path}: weights of {opened.config.model_type}, which are not those of a "
            f"{model_class.__name__}"
        )
    kwargs.pop("subfolder", None)
    opened.config.name_or_path = str(path)  # for errors; loading forgets it
    loaded = load(None, *args, config=opened.config, state_dict=opened.tensors, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config.name_or_path = str(path)
    return loaded


def weights_of(source: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict, or that of a file."""
    return source if isinstance(source, Mapping) else load_checkpoint(source)


@contextmanager
def naming(source: str | os.PathLike[str] | Mapping[str, Any]) -> Iterator[None]:
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
    if stored is None or config_class_of(stored.get("model_type")) is None:
        return None, None
    return stored, read_json(home / "preprocessor_config.json")


def _home(source: str | os.PathLike[str]) -> Path:
    path = Path(source).expanduser()
    return path if path.is_dir() else path.parent


def _stored_config(source: Any, kind: type[Config], stored: dict[str, Any]) -> Config:
    try:
        return kind.from_dict(stored)
    except Exception as error:  # the fields of a damaged config may have any type and value
        path = _home(source) / "config.json"
        raise ValueError(f"{path}: no config of a DINO ViT ({summary(error)})") from error


def _config_difference(tensors: Mapping[str, Tensor], config: Config) -> KeyDifferences | str:
    found = architecture(tensors).num_hidden_layers
    if config.num_hidden_layers != found:  # told first: the config may say any number
        return f"num_hidden_layers={config.num_hidden_layers}, the weights have {found}"
    return compare(tensors, expected_shapes(sizes_of(config)))


def _likely_statistics(reading: Reading) -> str:
    if reading.family == "dinov2":
        return "imagenet"
    size = reading.tensors["embeddings.patch_embeddings.weight"].shape[0]
    large = size == CONFIGS["vitl16"]["hidden_size"]
    local = any(".local_cls_norm." in f".{key}" for key in reading.info.left_out)
    return "sat493m" if large and local else "imagenet"


def _preprocessor_config(statistics: str, family: Family) -> dict[str, Any]:
    mean, std = _PIXEL_STATISTICS[statistics]
    sizes = {
        "dinov3": {
            "image_processor_type": "DINOv3ViTImageProcessor",
            "size": {"height": 224, "width": 224},
            "resample": 2,
        },
        "dinov2": {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": 256},
            "do_center_crop": True,
            "crop_size": {"height": 224, "width": 224},
            "resample": 3,
            "do_convert_rgb": True,
        },
    }
    return sizes[family] | {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
