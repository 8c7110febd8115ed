"""What an atomic does to elements of memory, global or shared: one thread after the other."""

from __future__ import annotations

import numpy as np

from .values import half_op


def in_turn(
    view: np.ndarray,
    at: np.ndarray,
    name: str,
    kind: str,
    values: np.ndarray,
    compare: np.ndarray | None,
) -> np.ndarray:
    """Threads that hit the same element take turns, the first ones first."""
    old = np.empty_like(values)
    todo = np.arange(len(at))
    while len(todo):
        _, first = np.unique(at[todo], return_index=True)
        now = todo[first]
        old[now] = view[at[now]]
        other = None if compare is None else compare[now]
        view[at[now]] = _changed(name, kind, old[now], values[now], other)
        todo = np.delete(todo, first)
    return old


def _changed(
    name: str, kind: str, old: np.ndarray, value: np.ndarray, compare: np.ndarray | None
) -> np.ndarray:
    if name == "exch":
        return value
    if compare is not None:
        return np.where(old == compare, value, old)
    if kind.startswith(("f16", "bf16")):
        return half_op(name, kind, False, old, value)
    function = {
        "add": np.add, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[name]  # fmt: skip
    return function(old, value)
