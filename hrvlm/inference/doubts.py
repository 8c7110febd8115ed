"""Signs in an answer itself that it is made up: it repeats itself, or the model doubts it.

A model says something about every picture, also about one that it can't read. Two things tell:

    repeats       a block of tokens follows itself, at least `LEAST_TIMES` in a row and at least
                  `LEAST_TOKENS` long in all: decoding went round in a circle
    improbable    the mean of log p(token | what is before it) is below a bound

The rule for repetition and the bound of the shipped reader were chosen from what the reader says to
pictures with and without text: `recipes/reader/doubts.py`, figures in the reader's card. What
a mean of other models is worth nobody has measured; `UNKNOWN_BOUND` asks for a tenth by token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

LEAST_TIMES, LEAST_TOKENS, LONGEST_BLOCK = 3, 20, 64
UNKNOWN_BOUND = math.log(0.1)


class Repetition(NamedTuple):
    """The longest run of a block of tokens that follows itself.

    Attributes:
        block: Tokens of the block.
        tokens: Tokens of the run, the last block perhaps begun only.
    """

    block: int
    tokens: int

    @property
    def times(self) -> int:
        """How many times the whole block stands there."""
        return self.tokens // self.block


def repetition(tokens: Sequence[int]) -> Repetition | None:
    """The longest run in `tokens` that is a repetition by the rule at the top of this file."""
    best = None
    for block in range(1, min(LONGEST_BLOCK, len(tokens) // LEAST_TIMES) + 1):
        longest = run = 0
        for before, token in zip(tokens, tokens[block:], strict=False):
            run = run + 1 if before == token else 0
            longest = max(longest, run)
        found = Repetition(block, longest + block)
        enough = found.times >= LEAST_TIMES and found.tokens >= LEAST_TOKENS
        if enough and (best is None or found.tokens > best.tokens):
            best = found
    return best


def doubts(tokens: Sequence[int], mean_log_probability: float, bound: float) -> dict[str, str]:
    """Why not to believe an answer, in a sentence by "repeats" and "improbable"; empty if nothing.

    Args:
        tokens: The answer's.
        mean_log_probability: Of its tokens under the model.
        bound: What that should be at least.
    """
    found = {}
    if repeated := repetition(tokens):
        found["repeats"] = (
            f"the answer repeats itself: {repeated.block} tokens, {repeated.times} times in a row"
        )
    if not mean_log_probability >= bound:
        found["improbable"] = (
            "the model itself found the answer improbable: a mean log-probability of "
            f"{mean_log_probability:.2f} by token, below {bound:.2f}"
        )
    return found


class TokenProbabilities(LogitsProcessor):
    """Keeps, for ``generate`` without beams, the log-probability of each new token of one answer.

    It stands before temperature and the like: what it keeps is what the model said.
    """

    def __init__(self) -> None:
        self._next: Tensor | None = None
        self._kept: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Look up the token that was chosen from the last scores; change nothing."""
        if self._next is not None:
            self._kept.append(self._next[input_ids[0, -1]])
        self._next = scores[0].float().log_softmax(-1)
        return scores

    def mean(self, answer: Tensor) -> float:
        """The mean over the tokens of `answer` ``[n]``, n >= 1."""
        assert self._next is not None
        return torch.stack([*self._kept, self._next[answer[-1]]]).mean().item()
