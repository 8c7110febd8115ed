"""Translates a parsed kernel into Python: one function per block, one expression per instruction.

    program = Program(parse(text))
    print(program.source)

What is not translated raises UnknownInstructionError with the instruction, before anything runs.
"""

from __future__ import annotations

from . import (  # noqa: F401  # fill FORMS
    arithmetic,
    bits,
    bulk,
    control,
    conversion,
    memory,
    warps,
    wgmma,
)
from .forms import FORMS
from .program import Program

__all__ = ["FORMS", "Program"]
