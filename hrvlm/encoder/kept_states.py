"""The hidden states that a caller asked for, caught on their way from block to block."""

from __future__ import annotations

from collections.abc import Container

from torch import Tensor


class KeptStates:
    """Hidden states by number: 0 is the embeddings, i what block i returns.

    Of a batch they are kept as ``[B, n, C]``, and the next block goes on with a view of that: so
    ``retain_grad`` and hooks at a returned state see the gradient of all that comes after it.

    Args:
        numbers: Which are kept.
        batch: (B, n) of a batch; None keeps ``[T, C]``.
    """

    def __init__(self, numbers: Container[int], batch: tuple[int, int] | None):
        self.states: dict[int, Tensor] = {}
        self._numbers, self._batch = numbers, batch

    def __contains__(self, number: int) -> bool:
        return number in self._numbers

    def keep(self, number: int, x: Tensor) -> Tensor:
        """Keep `x` ``[T, C]`` if it is one of them; returns what to go on with."""
        if number not in self._numbers:
            return x
        state = x if self._batch is None else x.unflatten(0, self._batch)
        self.states[number] = state
        return x if self._batch is None else state.flatten(0, 1)
