"""Features as the bytes of a file: equal features give equal bytes."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

FORMATS = ("safetensors", "npz", "parquet")


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """As safetensors; its own writer leaves the order of the metadata to chance."""
    from safetensors.torch import save

    content = save(dict(tensors), metadata=dict(metadata))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def one_file(
    kind: str, images: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]], made_of: str
) -> bytes:
    """The features of many images.

    Args:
        kind: One of `FORMATS`. In safetensors and npz a tensor of an image is ``NAME.cls`` and so
            on; in parquet an image is a row, with ``patches`` and ``registers`` as flat lists.
            numpy and parquet know no bfloat16, which becomes float32.
        images: Name to its tensors and metadata.
        made_of: A digest of what went in, kept in the file.
    """
    if kind == "safetensors":
        told = {name: json.dumps(metadata) for name, (_, metadata) in images.items()}
        every = {
            f"{n}.{key}": t for n, (tensors, _) in images.items() for key, t in tensors.items()
        }
        return safetensors_bytes(every, told | {"made_of": made_of})
    return (_npz if kind == "npz" else _parquet)(images, made_of)


def _npz(images: Mapping[str, Any], made_of: str) -> bytes:
    import numpy as np

    arrays: dict[str, Any] = {"made_of": np.array(made_of)}
    for name, (tensors, metadata) in images.items():
        arrays[f"{name}.metadata"] = np.array(json.dumps(metadata))
        arrays |= {f"{name}.{key}": _wide(tensor).numpy() for key, tensor in tensors.items()}
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def _parquet(images: Mapping[str, Any], made_of: str) -> bytes:
    need_pyarrow()
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {"name": [], "metadata": []}
    for name, (tensors, metadata) in images.items():
        columns["name"].append(name)
        columns["metadata"].append(json.dumps(metadata))
        for key, tensor in tensors.items():
            columns.setdefault(key, []).append(_wide(tensor).flatten().numpy())
    table = pa.table(columns).replace_schema_metadata({"made_of": made_of})
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    return stream.getvalue()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def need_pyarrow() -> None:
    """Raise ValueError where it is missing."""
    if find_spec("pyarrow") is None:
        raise ValueError("parquet: pyarrow is not installed: pip install 'hrvlm[scale]'")


def made_of(path: Any) -> str | None:
    """The digest in a file that :func:`one_file` or `safetensors_bytes` made; None if none is."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as stored:
                return (stored.metadata() or {}).get("made_of")
        if path.suffix == ".npz":
            import numpy as np

            with np.load(path) as arrays:
                return str(arrays["made_of"])
        import pyarrow.parquet as pq

        own = pq.read_metadata(path).metadata or {}
        return own.get(b"made_of", b"").decode() or None
    except Exception:  # whatever lies there is of no use, and is made anew
        return None
