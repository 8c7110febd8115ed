"""What differs between two sets of weights, told in few lines.

missing (12): layer.{0..11}.attention.q_proj.bias (12)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LAYER = re.compile(r"(?<![^.])(blocks|layers?|h)\.(\d+)\.")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class KeyDifferences:
    """Keys that differ between a state dict and the one expected; false when there are none.

    Attributes:
        missing: Expected, not there.
        unexpected: There, not expected.
        mismatched: Key, its shape, the shape expected.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, Shape, Shape], ...]

    def __bool__(self) -> bool:
        """Whether anything differs."""
        return bool(self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        """One line per group of keys, layers folded together."""
        parts = []
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                parts.append(f"{title} ({len(names)}): {', '.join(group_keys(names))}")
        shapes: dict[tuple[Shape, Shape], list[str]] = {}
        for key, got, expected in self.mismatched:
            shapes.setdefault((got, expected), []).append(key)
        for (got, expected), keys in shapes.items():
            title = f"shape {list(got)} instead of {list(expected)}"
            parts.append(f"{title} ({len(keys)}): {', '.join(group_keys(keys))}")
        return "\n".join(parts)


def compare(state_dict: Mapping[str, Any], expected: Mapping[str, Any]) -> KeyDifferences:
    """Compare keys and shapes with those expected; values of both are tensors or shapes."""
    mismatched = []
    for key in state_dict.keys() & expected.keys():
        got, wanted = _shape(state_dict[key]), _shape(expected[key])
        if got != wanted:
            mismatched.append((key, got, wanted))
    return KeyDifferences(
        missing=tuple(key for key in expected if key not in state_dict),
        unexpected=tuple(key for key in state_dict if key not in expected),
        mismatched=tuple(sorted(mismatched, key=lambda item: natural_order(item[0]))),
    )


def group_keys(keys: Iterable[str]) -> list[str]:
    """Keys with their layers folded, ``layer.{0..11}.norm1.weight (12)``; others as they are."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(_LAYER.sub(r"\1.*.", key, count=1), []).append(key)
    folded = []
    for pattern, members in groups.items():
        if len(members) == 1:
            folded.append(members[0])
            continue
        indices = sorted(int(match[2]) for key in members if (match := _LAYER.search(key)))
        folded.append(f"{pattern.replace('.*.', f'.{{{_ranges(indices)}}}.', 1)} ({len(members)})")
    return folded


def _ranges(indices: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


def _shape(value: Any) -> Shape:
    return tuple(getattr(value, "shape", value))


def natural_order(key: str) -> list[Any]:
    """Sorts ``layer.2`` before ``layer.10``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]
