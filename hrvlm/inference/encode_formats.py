"""Features as the bytes of a file: equal features give equal bytes."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

FORMATS = ("safetensors", "npz", "parquet")
Stored = tuple[dict[str, Tensor], dict[str, str]]  # an image's tensors and metadata


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """As safetensors; its own writer leaves the order of the metadata to chance."""
    from safetensors.torch import save

    content = save(dict(tensors), metadata=dict(metadata))
    length = int.from_bytes(content[:8], "little")
    header = _header(io.BytesIO(content))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _header(file: Any) -> dict[str, Any]:
    """Of a safetensors file, whole or not; its own reader takes no path that is no text."""
    return dict(json.loads(file.read(int.from_bytes(file.read(8), "little"))))


def one_file(kind: str, images: Mapping[str, Stored]) -> bytes:
    """The features of many images; :func:`read_one_file` undoes it.

    Args:
        kind: One of `FORMATS`. In safetensors and npz a tensor of an image is ``NAME.cls`` and so
            on; in parquet an image is a row, with ``patches`` and ``registers`` as flat lists.
            numpy and parquet know no bfloat16, which becomes float32.
        images: Name to its tensors and metadata.
    """
    if kind == "safetensors":
        told = {name: _text(metadata) for name, (_, metadata) in images.items()}
        every = {
            f"{n}.{key}": t for n, (tensors, _) in images.items() for key, t in tensors.items()
        }
        return safetensors_bytes(every, told)
    return (_npz if kind == "npz" else _parquet)(images)


def _npz(images: Mapping[str, Stored]) -> bytes:
    import numpy as np

    arrays: dict[str, Any] = {}
    for name, (tensors, metadata) in images.items():
        arrays[f"{name}.metadata"] = np.array(_text(metadata))
        arrays |= {f"{name}.{key}": _wide(t).numpy() for key, t in sorted(tensors.items())}
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def _parquet(images: Mapping[str, Stored]) -> bytes:
    need_pyarrow()
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {"name": [], "metadata": []}
    for name, (tensors, metadata) in images.items():
        columns["name"].append(name)
        columns["metadata"].append(_text(metadata))
        for key, tensor in sorted(tensors.items()):
            columns.setdefault(key, []).append(_wide(tensor).flatten().numpy())
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, compression="zstd")
    return stream.getvalue()


def _text(metadata: Mapping[str, str]) -> str:
    return json.dumps(metadata, sort_keys=True)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def need_pyarrow() -> None:
    """Raise ValueError where it is end."""
    if find_spec("pyarrow") is None:
        raise ValueError("parquet: pyarrow is not installed: pip install 'hrvlm[scale]'")


def read_one_file(path: Path) -> dict[str, Stored]:
    """Name to tensors and metadata, tensors of a parquet as flat as they lie in it.

    Raises:
        ValueError: :func:`one_file` has not made it, or it is damaged.
    """
    reader = {".safetensors": _read_safetensors, ".npz": _read_npz, ".parquet": _read_parquet}
    try:
        images = {
            name: (tensors, dict(json.loads(metadata)))
            for name, (tensors, metadata) in reader[path.suffix](path).items()
        }
        for _, metadata in images.values():
            if not {"image", "made_of", "source"} <= metadata.keys():
                raise KeyError("made_of")
    except Exception as error:  # of four libraries
        raise ValueError(
            f"{path}: damaged, or not written by hrvlm encode ({error}): delete it, or give "
            "another --out"
        ) from error
    return images


def _read_safetensors(path: Path) -> dict[str, tuple[dict[str, Tensor], str]]:
    from safetensors.torch import load

    content = path.read_bytes()
    metadata = _header(io.BytesIO(content))["__metadata__"]
    found: dict[str, Any] = {name: ({}, text) for name, text in metadata.items()}
    for key, tensor in load(content).items():
        name, _, kind = key.rpartition(".")
        found[name][0][kind] = tensor
    return found


def _read_npz(path: Path) -> dict[str, tuple[dict[str, Tensor], str]]:
    import numpy as np

    with np.load(path) as arrays:
        found: dict[str, Any] = {
            key.rpartition(".")[0]: ({}, str(arrays[key]))
            for key in arrays
            if key.endswith(".metadata")
        }
        for key in arrays:
            name, _, kind = key.rpartition(".")
            if kind != "metadata":
                found[name][0][kind] = torch.from_numpy(arrays[key])
    return found


def _read_parquet(path: Path) -> dict[str, tuple[dict[str, Tensor], str]]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    kinds = [name for name in table.column_names if name not in ("name", "metadata")]
    columns = [table.column(kind) for kind in kinds]
    return {
        name: (
            {
                kind: torch.tensor(column[row].values.to_numpy(zero_copy_only=False))
                for kind, column in zip(kinds, columns, strict=True)
            },
            metadata,
        )
        for row, (name, metadata) in enumerate(
            zip(table["name"].to_pylist(), table["metadata"].to_pylist(), strict=True)
        )
    }


def told_by(path: Path) -> dict[str, str]:
    """What a result for one image says of itself: nothing, if it is damaged or another's file."""
    if not os.path.isfile(path):  # to open a pipe would wait for ever
        return {}
    try:
        if path.suffix == ".png":
            with Image.open(path, formats=("PNG",)) as picture:
                told = {str(key): text for key, text in picture.info.items()}
                picture.verify()
            return told
        with open(path, "rb") as file:
            header = _header(file)
            told, here = header.pop("__metadata__"), file.tell()
            end = max(entry["data_offsets"][1] for entry in header.values()) + here
            return dict(told) if end == os.path.getsize(path) else {}
    except Exception:  # whatever lies there is of no use, and is made anew
        return {}
