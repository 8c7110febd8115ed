"""Damaged files: random changes to bytes, to the pickle inside a torch.save file, and to JSON."""

from __future__ import annotations

import io
import json
import random
import zipfile
from typing import Any

_VALUES: tuple[Any, ...] = (
    None,
    "",
    "x",
    -1,
    0,
    3,
    1.5,
    10**6,
    True,
    [],
    [1],
    {},
    {"a": 1},
    "\ud800",
)
_MAGIC = (
    b"PK\x03\x04",
    b"\x80\x02",
    b"version https://git-lfs.github.com/spec/v1\n",
    b"{",
    b"\x00" * 9,
)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """`content` with one to four changes: bytes flipped, cut, filled, moved or put in."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, length = _place(len(data), rng), rng.choice([1, 1, 2, 8, 64, 1024])
        kind = rng.randrange(8)
        if kind <= 2:
            for i in range(at, min(at + rng.choice([1, 1, 4]), len(data))):
                data[i] ^= 1 << rng.randrange(8)
        elif kind == 3:
            del data[at : None if rng.random() < 0.3 else at + length]
        elif kind == 4:
            data[at : at + length] = bytes([rng.choice([0, 255, 0x80, 0x2E])]) * length
        elif kind == 5:
            data[at:at] = rng.randbytes(length)
        elif kind == 6:
            source = _place(len(data), rng)
            data[at : at + length] = data[source : source + length]
        else:
            magic = rng.choice(_MAGIC)
            data[: len(magic)] = magic
    return bytes(data)


def _place(length: int, rng: random.Random) -> int:
    """Anywhere, but often near the start or the end, where the structure is."""
    near = min(length, 1500)
    where = rng.randrange(3)
    if where == 0:
        return rng.randrange(length + 1)
    return rng.randrange(near + 1) if where == 1 else length - rng.randrange(near + 1)


def mutate_pickle_in_zip(content: bytes, rng: random.Random) -> bytes:
    """A whole zip, as ``torch.save`` writes it, with a damaged ``data.pkl``."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("data.pkl"):
                data = mutate(data, rng)
            elif rng.random() < 0.01:
                continue
            new.writestr(info.filename, data)
    return out.getvalue()


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Bytes as in :func:`mutate`, or another value, one less, in the tree."""
    if rng.random() < 0.3:
        return mutate(content, rng)
    tree = json.loads(content)
    for _ in range(rng.randint(1, 2)):
        node = tree
        while isinstance(node, (dict, list)) and len(node):
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            if rng.random() < 0.6 or not isinstance(node[key], (dict, list)):
                if rng.random() < 0.3:
                    del node[key]
                else:
                    node[key] = rng.choice(_VALUES)
                break
            node = node[key]
    return json.dumps(tree if rng.random() < 0.97 else rng.choice(_VALUES)).encode()
