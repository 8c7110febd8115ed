"""What a random source makes of an input: other texts, bytes and plain values.

All draws come from one `random.Random`, so that a case is its number and the seed, that hypothesis
can give its own source and make a find small, and that atheris can give one made of its bytes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import torch

WHOLE = (0, 1, 2, 3, 4, 7, 8, 13, 14, 15, 16, 17, 32, 64, 100, 224, 255, 256, 1000, 1024, 4096)
LARGE = (65535, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 10**30)
WORDS = (
    "",
    " ",
    "a",
    "0",
    "16",
    "-1",
    "true",
    "null",
    "nan",
    "\x00",
    "é",
    "\ud800",
    "<image>",
    "x" * 300,
)


def odd_value(draw: Random) -> Any:
    """A value that is seldom meant."""
    kind = draw.randrange(12)
    if kind < 4:
        return draw.choice(WHOLE) * draw.choice((1, 1, 1, -1))
    if kind == 4:
        return draw.choice(LARGE) * draw.choice((1, -1))
    if kind == 5:
        return draw.choice(
            (0.0, 0.5, 1.0, 16.0, -0.0, 1e-300, 1e300, math.nan, math.inf, -math.inf)
        )
    if kind == 6:
        return draw.choice((None, True, False))
    if kind == 7:
        return draw.choice(WORDS)
    if kind == 8:
        return draw.choice(([], {}, (), [[]], [None], {"": None}, [1, 2], {"type": "image"}, set()))
    if kind == 9:
        return draw.choice(
            (np.int64(16), np.float32(2), np.bool_(True), np.array([1, 2]), np.array(4))
        )
    if kind == 10:
        return draw.choice(
            (torch.tensor(4), torch.tensor([1, 2]), torch.tensor(True), torch.zeros(0))
        )
    return draw.choice((b"", b"\xff", 1j, range(3), object, int, Ellipsis))


def changed(draw: Random, value: Any, times: int | None = None) -> Any:
    """A copy of plain data with a few places in it changed."""
    value = copy.deepcopy(value)
    for _ in range(draw.randrange(4) if times is None else times):
        value = _change(draw, value)
    return value


def _change(draw: Random, value: Any) -> Any:
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        how = draw.randrange(8)
        if how == 0:
            del value[key]
        elif how == 1:
            value[odd_key(draw)] = value[key]
        elif how == 2:
            other = draw.choice(list(value))
            value[key], value[other] = value[other], value[key]
        else:
            value[key] = _change(draw, value[key])
        return value
    if isinstance(value, list) and value and draw.random() < 0.9:
        index = draw.randrange(len(value))
        how = draw.randrange(8)
        if how == 0:
            del value[index]
        elif how == 1:
            value.insert(index, value[draw.randrange(len(value))])
        elif how == 2:
            value.reverse()
        else:
            value[index] = _change(draw, value[index])
        return value
    if isinstance(value, str) and draw.random() < 0.7:
        return changed_text(draw, value, WORDS)
    if isinstance(value, int) and draw.random() < 0.5:
        return draw.choice(WHOLE)
    return odd_value(draw)


def odd_key(draw: Random) -> Any:
    """A key of a mapping that is seldom meant."""
    return draw.choice((*WORDS, 0, 1.5, None, True, ("a", 1)))


def changed_text(draw: Random, text: str, words: Sequence[str]) -> str:
    """A text with a few stretches left out, doubled, moved, or replaced by one of `words`."""
    for _ in range(draw.randrange(1, 5)):
        start = draw.randrange(len(text) + 1)
        end = min(len(text), start + draw.choice((0, 1, 1, 2, 3, 8, 30)))
        piece = text[start:end]
        middle = draw.choice(("", piece * 2, draw.choice(words), draw.choice(words) + piece))
        if draw.random() < 0.1:
            middle = piece * draw.choice((10, 300))
        text = text[:start] + middle + text[end:]
    return text


def changed_bytes(draw: Random, data: bytes) -> bytes:
    """Bytes with a few of them changed, left out or cut off."""
    found = bytearray(data)
    for _ in range(draw.randrange(1, 5)):
        if not found:
            break
        place = draw.randrange(len(found))
        if draw.random() < 0.6:  # what says where and what things are stands in front
            place = min(place, draw.randrange(256))
        how = draw.randrange(8)
        if how < 4:
            found[place] = draw.choice((0, 1, 0x20, 0x7B, 0x7D, 0x7F, 0x80, 0xFF, found[place] ^ 1))
        elif how == 4:
            del found[place : place + draw.choice((1, 2, 8, 100))]
        elif how == 5:
            found[place:place] = found[place : place + draw.choice((1, 4, 50))]
        elif how == 6:
            del found[place:]
        else:
            found[place:place] = draw.randbytes(draw.choice((1, 4, 8)))
    return bytes(found)
