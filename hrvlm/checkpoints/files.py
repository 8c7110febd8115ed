"""Reading checkpoint files of any container format, and writing transformers' directory layout."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import all_or_nothing

SAFETENSORS_NAME = "model.safetensors"
_NAMES_IN_DIRECTORY = (
    SAFETENSORS_NAME,
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SAFETENSORS_SUFFIX = ".safetensors"
WEIGHT_SUFFIXES = (SAFETENSORS_SUFFIX, ".pth", ".pt", ".bin")
_ZIP_MAGIC = b"PK"
_PICKLE_MAGIC = b"\x80"
_LFS_POINTER = b"version https://git-lfs"


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint, on the CPU, keys as they are in the file.

    Takes safetensors, ``torch.save`` files (loaded with ``weights_only=True``: no code in them
    runs), a sharded checkpoint by its ``*.index.json``, or a directory that holds one of these.
    What a file is, its first bytes say, not its name. Nested containers such as ``{"teacher":
    {...}}`` become keys with dots, other objects are left out.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing.
        TypeError: `path` is no path.
        ValueError: the file is damaged, is no checkpoint, holds Python objects besides tensors and
            plain containers, or a directory holds no checkpoint or several.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"checkpoint: expected a file or directory, got {type(path).__name__}")
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    if path.is_dir():
        path = _file_in(path)
    tensors = _load_sharded(path) if path.suffix == ".json" else read_weights(path)
    if not tensors:
        raise ValueError(f"{path}: no tensors in it")
    return tensors


def check_file(path: Path) -> None:
    """Read a weight file, or the JSON or chat template of a checkpoint's directory.

    Raises:
        ValueError: it is damaged.
    """
    if path.name.endswith(".index.json"):
        _weight_map(path)
        if not isinstance((read_json(path) or {}).get("metadata"), dict):
            raise ValueError(f"{path}: no metadata in it")  # transformers can't do without
    elif path.suffix == ".json":
        read_json(path)
    elif path.suffix == ".jinja":
        _check_template(path)
    else:
        read_weights(path)


def _check_template(path: Path) -> None:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 ({error})") from error


def flatten_tensors(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dicts, keys joined by dots; anything else is left out.

    Dicts within may have numbers for keys, as the state of an optimizer has.

    Raises:
        ValueError: the key of a tensor is no string, or two tensors would have one key.
    """
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        found: dict[str, Tensor] = {}
        if isinstance(value, Tensor):
            if not isinstance(key, str) and not prefix:
                raise ValueError(f"the key {key!r} of a tensor is no string")
            found = {f"{prefix}{key}": value}
        elif isinstance(value, Mapping):
            found = flatten_tensors(value, f"{prefix}{key}.")
        if twice := sorted(flat.keys() & found.keys()):
            raise ValueError(f"two tensors have the key {twice[0]!r}")
        flat |= found
    return flat


def write_checkpoint(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    documents: Mapping[str, Mapping[str, Any]],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write ``model.safetensors`` and JSON documents, each file whole or not at all.

    Args:
        directory: Made if need be.
        tensors: Weights by key.
        documents: Contents of the JSON files.
        dtype: Cast floating-point weights to it.
        overwrite: Replace files that are there already.

    Raises:
        FileExistsError: one of the files is there and `overwrite` is False.
    """
    from safetensors.torch import save_file

    directory = Path(directory).expanduser()
    names = [*documents, SAFETENSORS_NAME]
    present = [name for name in names if (directory / name).exists()]
    if present and not overwrite:
        raise FileExistsError(
            f"{directory} already holds {', '.join(present)}; pass overwrite=True to replace them"
        )
    with all_or_nothing(directory) as folder:
        for name, document in documents.items():
            (folder / name).write_text(
                json.dumps(document, indent=2, sort_keys=True) + "\n", "utf-8"
            )
        stored = {key: _storable(tensor, dtype) for key, tensor in tensors.items()}
        save_file(stored, folder / SAFETENSORS_NAME, metadata={"format": "pt"})
    return directory


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, None when there is no such file.

    Raises:
        ValueError: the file is not a JSON object.
    """
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}){_pointer_note(path)}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(document).__name__}")
    return document


def _storable(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    tensor = tensor.contiguous()
    # q, k and v are views of one matrix: safetensors refuses tensors that share memory.
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _file_in(directory: Path) -> Path:
    for name in _NAMES_IN_DIRECTORY:
        if (directory / name).is_file():
            return directory / name
    found = sorted(
        file for file in directory.iterdir() if file.suffix in WEIGHT_SUFFIXES and file.is_file()
    )
    if len(found) != 1:
        names = ", ".join(file.name for file in found)
        what = f"several checkpoints ({names})" if found else "no checkpoint"
        expected = " or ".join((*_NAMES_IN_DIRECTORY, "a single weight file"))
        raise ValueError(f"{directory}: {what} in it; expected {expected}")
    return found[0]


def _load_sharded(index: Path) -> dict[str, Tensor]:
    weight_map = _weight_map(index)
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index}: its shard {name} is missing")
        shard = read_weights(index.parent / name)
        if twice := sorted(tensors.keys() & shard.keys()):
            raise ValueError(f"{index}: {twice[0]} is in several shards")
        tensors |= shard
    absent = sorted(weight_map.keys() - tensors.keys())
    if absent:
        raise ValueError(
            f"{index}: {len(absent)} tensors are in no shard, the first is {absent[0]}"
        )
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = (read_json(index) or {}).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ValueError(
            f"{index}: no weight_map in it, so it is not the index of a sharded checkpoint"
        )
    for name in weight_map.values():
        if not name or Path(name).name != name:
            raise ValueError(f"{index}: shard {name!r} is not a plain file name")
    return weight_map


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of one file of weights; see :func:`load_checkpoint`.

    Raises:
        ValueError: it is damaged, or no such file.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":  # asked first: before it is a length, which may begin like the others
        return _load_safetensors(path)
    if start[:2] == _ZIP_MAGIC or start[:1] == _PICKLE_MAGIC:
        return _load_pickle(path, mmap=start[:2] == _ZIP_MAGIC)
    raise ValueError(f"{path}: neither safetensors nor a file of torch.save{_pointer_note(path)}")


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # a damaged header raises all kinds
        raise ValueError(f"{path}: damaged safetensors file ({summary(error)})") from error


def _load_pickle(path: Path, *, mmap: bool) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if "Unsupported global" not in str(error):
            raise ValueError(f"{path}: damaged torch.save file ({summary(error)})") from error
        raise ValueError(
            f"{path}: holds Python objects besides tensors, which are not loaded because they can "
            "run code; save its state_dict alone"
        ) from error
    except Exception as error:  # a damaged pickle raises all kinds
        raise ValueError(f"{path}: damaged torch.save file ({summary(error)})") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(loaded).__name__}")
    try:
        tensors = flatten_tensors(loaded)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # a dict inside itself, say
        raise ValueError(f"{path}: damaged torch.save file ({summary(error)})") from error
    for key, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            what = "on meta, without values" if tensor.is_meta else tensor.layout
            raise ValueError(f"{path}: {key} is {what}; expected a dense tensor")
    if mmap:
        _check_storages(path, tensors)
    return tensors


def _check_storages(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise for tensors longer than what is stored of them: torch would read what comes behind."""
    storages = (tensor.untyped_storage() for tensor in tensors.values())
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
    try:
        with zipfile.ZipFile(path) as file:
            stored = Counter(info.file_size for info in file.infolist())
    except Exception as error:  # torch has read it; a damaged list of parts raises all kinds
        raise ValueError(f"{path}: damaged torch.save file ({summary(error)})") from error
    if missing := Counter(sizes.values()) - stored:
        what = f"a tensor of {min(missing)} bytes is not stored whole"
        raise ValueError(f"{path}: damaged torch.save file ({what})")


def _pointer_note(path: Path) -> str:
    with path.open("rb") as file:
        is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    return ": it is a pointer of Git LFS, fetch the file by git lfs pull" if is_pointer else ""


def summary(error: BaseException) -> str:
    """The kind of an error and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
