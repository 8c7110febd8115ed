"""Loads, stores and atomics of global memory, for the threads of a group.

Translated code calls these. `guard` says which threads take part, all if None.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .atomics import in_turn
from .values import UNSIGNED

if TYPE_CHECKING:
    from .group import Group
    from .syntax import Instruction


def load_global(
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
    if lanes is not None:
        if not len(lanes):
            return out
        address = address[lanes]
    g.count_global(instruction, address, lanes, width * items)
    memory = g.machine.memory
    for found in memory.locate(g, instruction, address, lanes, width * items):
        region, offset, pick = found
        into = pick if lanes is None else lanes[pick]
        if memory.check:
            memory.note_read(g, instruction, found, width * items, _chosen(lanes, pick))
        view, first = region.views[width], offset // width
        for k in range(items):
            if isinstance(into, slice):
                out[k] = view[first + k]
            else:
                out[k][into] = view[first + k]
    return out


def store_global(
    g: Group,
    instruction: Instruction,
    address: np.ndarray,
    width: int,
    data: list[np.ndarray],
    guard: np.ndarray | None,
) -> None:
    """Store neighbours of `width` bytes each."""
    lanes = g.active(guard)
    if lanes is not None:
        if not len(lanes):
            return
        address, data = address[lanes], [d[lanes] for d in data]
    memory = g.machine.memory
    total = width * len(data)
    g.count_global(instruction, address, lanes, total, store=True)
    for found in memory.locate(g, instruction, address, lanes, total):
        region, offset, pick = found
        view, first = region.views[width], offset // width
        if memory.check:
            same = np.ones(len(first), bool)
            for k, values in enumerate(data):
                same &= view[first + k] == values[pick]
            written = np.stack([values[pick] for values in data], axis=-1)
            memory.note_write(g, instruction, found, total, _chosen(lanes, pick), same, written)
        for k, values in enumerate(data):
            view[first + k] = values[pick]


def _chosen(lanes: np.ndarray | None, pick: np.ndarray | slice) -> np.ndarray | None:
    """Threads of a part of an access; None if `pick` says it already."""
    return None if lanes is None else lanes[pick]


def atomic(
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
    """Change each neighbour in turn, thread after thread; returns what was there before."""
    lanes = g.active(guard)
    out = [np.zeros_like(d) for d in data]
    width = data[0].itemsize
    if lanes is not None:
        if not len(lanes):
            return out
        address, data = address[lanes], [d[lanes] for d in data]
        compare = None if compare is None else compare[lanes]
    g.count_global(instruction, address, lanes, width * len(data), store=True)
    for region, offset, pick in g.machine.memory.locate(
        g, instruction, address, lanes, width * len(data)
    ):
        into = pick if lanes is None else lanes[pick]
        view = region.views[width].view(data[0].dtype)
        compared = None if compare is None else compare[pick]
        for k, values in enumerate(data):
            at = offset // width + k
            if name == "add" and not result and kind in ("f32", "f64"):
                np.add.at(view, at, values[pick])
            else:
                out[k][into] = in_turn(view, at, name, kind, values[pick], compared)
    return out
