"""How often each part was begun. A process that dies can't say so, and Ray Data tries for ever."""

from __future__ import annotations

from collections import Counter

TRIES = 3


class Tries:
    """An actor's class: counts what the tasks of a run begin."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, step: str) -> int:
        """How many times it was begun by now."""
        self._begun[step] += 1
        return self._begun[step]
