"""Which instruction forms are translated, and by what.

A form is an opcode with all its modifiers, as PTX writes it. Translators register theirs as
patterns (brackets: may be left out; braces: one of)::

    @form("add[.ftz].f32", "add.{u,s}{16,32,64}")
    def add(w: Text) -> None: ...

so :data:`FORMS` is the full list, and what is not in it is an unknown instruction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .text import Text

Translator = Callable[["Text"], None]

FORMS: dict[str, Translator] = {}

_CHOICE = re.compile(r"\[([^\[\]]*)\]|\{([^{}]*)\}")


def expand(pattern: str) -> Iterator[str]:
    """All opcodes that a pattern stands for."""
    found = _CHOICE.search(pattern)
    if not found:
        yield pattern
        return
    choices = ("", found[1]) if found[1] is not None else found[2].split(",")
    for choice in choices:
        yield from expand(pattern[: found.start()] + choice + pattern[found.end() :])


def form(*patterns: str) -> Callable[[Translator], Translator]:
    """Register the translator of these forms."""

    def register(translator: Translator) -> Translator:
        for op in (op for pattern in patterns for op in expand(pattern)):
            if FORMS.get(op, translator) is not translator:
                raise ValueError(f"two translators for {op}")
            FORMS[op] = translator
        return translator

    return register
