"""Memory of single threads (.local), at addresses from 0 on. Translated code calls these."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .report import MemcheckError

if TYPE_CHECKING:
    from .group import Group
    from .syntax import Instruction


def _bytes(
    g: Group, instruction: Instruction, address: np.ndarray, width: int, guard: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The threads that take part, and the bytes [n, width] of the machine's memory they touch."""
    lanes = np.arange(g.n) if guard is None else np.flatnonzero(guard)
    at = address[lanes].astype(np.int64)
    size = g.kernel.local_size
    bad = (at + width > size) | (at % width != 0)
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise MemcheckError(
            f"{g.kernel.name}: {instruction}: {width} bytes at byte {int(at[i])} of local memory "
            f"({size} bytes); {g.who(int(lanes[i]))}"
        )
    return lanes, (g.lanes[lanes] * size + at)[:, None] + np.arange(width)


def load_local(
    g: Group,
    instruction: Instruction,
    address: np.ndarray,
    width: int,
    items: int,
    guard: np.ndarray | None,
) -> list[np.ndarray]:
    """`items` neighbours of `width` bytes each; zero for threads that take no part."""
    lanes, at = _bytes(g, instruction, address, width * items, guard)
    data = np.zeros((g.n, width * items), np.uint8)
    data[lanes] = g.machine.local[at]
    return [np.ascontiguousarray(x) for x in data.view(f"u{width}").T]


def store_local(
    g: Group,
    instruction: Instruction,
    address: np.ndarray,
    width: int,
    data: list[np.ndarray],
    guard: np.ndarray | None,
) -> None:
    """Store neighbours of `width` bytes each."""
    lanes, at = _bytes(g, instruction, address, width * len(data), guard)
    raw = np.ascontiguousarray(np.stack(data, axis=-1)).view(np.uint8)
    g.machine.local[at] = raw[lanes]
