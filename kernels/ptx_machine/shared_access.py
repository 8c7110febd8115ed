"""Loads and stores of shared memory, for the threads of a group. Translated code calls these."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .atomics import in_turn
from .clocks import WARP
from .values import UNSIGNED, u32

if TYPE_CHECKING:
    from .group import Group
    from .syntax import Instruction


def load_shared(
    g: Group,
    instruction: Instruction,
    address: np.ndarray,
    width: int,
    items: int,
    guard: np.ndarray | None,
) -> list[np.ndarray]:
    """`items` neighbours of `width` bytes each; zero for threads that take no part."""
    lanes = g.active(guard)
    out = [np.zeros(g.n, UNSIGNED[width]) for _ in range(items)]
    base, warp = g.base, g.warp
    if lanes is not None:
        if not len(lanes):
            return out
        address, base, warp = address[lanes], base[lanes], warp[lanes]
    shared, total = g.machine.shared, width * items
    where = shared.locate(g, instruction, address, base, total, total, lanes)
    shared.note_read(g, instruction, where, warp, total)
    g.count_shared(instruction, where, lanes, total)
    view, first = shared.views[width], where // width
    for k in range(items):
        if lanes is None:
            out[k] = view[first + k]
        else:
            out[k][lanes] = view[first + k]
    return out


def store_shared(
    g: Group,
    instruction: Instruction,
    address: np.ndarray,
    width: int,
    data: list[np.ndarray],
    guard: np.ndarray | None,
) -> None:
    """Store neighbours of `width` bytes each."""
    lanes = g.active(guard)
    base, warp = g.base, g.warp
    if lanes is not None:
        if not len(lanes):
            return
        address, base, warp = address[lanes], base[lanes], warp[lanes]
        data = [d[lanes] for d in data]
    shared, total = g.machine.shared, width * len(data)
    where = shared.locate(g, instruction, address, base, total, total, lanes)
    shared.note_write(g, instruction, where, warp, total, np.stack(data, axis=-1))
    g.count_shared(instruction, where, lanes, total)
    view, first = shared.views[width], where // width
    for k, values in enumerate(data):
        view[first + k] = values


def atomic_shared(
    g: Group,
    instruction: Instruction,
    name: str,
    address: np.ndarray,
    kind: str,
    data: list[np.ndarray],
    compare: np.ndarray | None,
    guard: np.ndarray | None,
    result: bool,
) -> list[np.ndarray]:
    """Change one element for each thread, thread after thread; returns what was there before."""
    out = [np.zeros_like(d) for d in data]
    lanes = np.arange(g.n) if guard is None else np.flatnonzero(guard)
    if not len(lanes):
        return out
    shared, width = g.machine.shared, data[0].itemsize
    where = shared.locate(g, instruction, address[lanes], g.base[lanes], width, width, lanes)
    shared.note_atomic(g, instruction, where, g.warp[lanes], width)
    g.count_shared(instruction, where, lanes, width)
    view = shared.bytes.view(data[0].dtype)
    compared = None if compare is None else compare[lanes]
    out[0][lanes] = in_turn(view, where // width, name, kind, data[0][lanes], compared)
    return out


def load_matrix(
    g: Group, instruction: Instruction, address: np.ndarray, count: int, transposed: bool
) -> list[np.ndarray]:
    """ldmatrix: threads 8 j to 8 j + 7 of a warp give the rows of matrix j, 16 bytes each."""
    shared = g.machine.shared
    given = np.arange(g.n).reshape(-1, WARP)[:, : 8 * count].ravel()
    where = shared.locate(g, instruction, address[given], g.base[given], 16, 16, given)
    shared.note_read(g, instruction, where, g.warp[given], 16)
    if g.machine.counts is not None:
        g.machine.counts.matrix_access(instruction, g.warp[given], where)
    rows = shared.views[2][where[:, None] // 2 + np.arange(8)].reshape(-1, count, 8, 8)
    if transposed:
        rows = np.ascontiguousarray(rows.swapaxes(2, 3))
    words = rows.view(u32).reshape(-1, count, WARP)
    return [np.ascontiguousarray(words[:, j]).ravel() for j in range(count)]
