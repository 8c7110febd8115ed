"""What passes between the threads of whole warps: arrays of 32 elements per warp.

PTX ISA 9.7.9.6 (shfl.sync), 9.7.13 (vote.sync, redux.sync).
"""

from __future__ import annotations

import numpy as np

from .clocks import WARP
from .values import i64, u32


def shuffle(
    mode: str, a: np.ndarray, b: np.ndarray, c: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What each thread gets of `a`, and whether it came from another in its segment.

    `b` is the lane or the distance; `c` holds the clamp in bits 0-4, the segment's mask in 8-12.
    """
    lane = np.arange(WARP)
    b = (b & u32(31)).astype(i64).reshape(-1, WARP)
    c = c.astype(i64).reshape(-1, WARP)
    clamp, segment = c & 31, (c >> 8) & 31
    limit = (lane & segment) | (clamp & ~segment)
    source = {
        "bfly": lambda: lane ^ b,
        "idx": lambda: (lane & segment) | (b & ~segment & 31),
        "down": lambda: lane + b,
        "up": lambda: lane - b,
    }[mode]()
    valid = source >= limit if mode == "up" else source <= limit
    moved = np.take_along_axis(a.reshape(-1, WARP), np.where(valid, source, lane), axis=1)
    return moved.ravel(), valid.ravel()


def vote(mode: str, a: np.ndarray) -> np.ndarray:
    """all, any and uni give a predicate, ballot a bit for each thread."""
    votes = a.reshape(-1, WARP)
    if mode == "ballot":
        each = (votes.astype(u32) << np.arange(WARP, dtype=u32)).sum(axis=1, dtype=u32)
    elif mode == "uni":
        each = votes.all(axis=1) | ~votes.any(axis=1)
    else:
        each = votes.all(axis=1) if mode == "all" else votes.any(axis=1)
    return np.repeat(each, WARP)


_REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def reduce_warp(name: str, a: np.ndarray) -> np.ndarray:
    """The sum, minimum, ... of a warp, for each of its threads."""
    return np.repeat(_REDUCTIONS[name].reduce(a.reshape(-1, WARP), axis=1, dtype=a.dtype), WARP)
