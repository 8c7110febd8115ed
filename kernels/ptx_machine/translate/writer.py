"""Writes the Python of a kernel: one function per block, one numpy expression per instruction."""

from __future__ import annotations

from ..syntax import Instruction
from .forms import FORMS
from .text import Text


class Writer(Text):
    """The text of a kernel's functions."""

    def source(self) -> str:
        """The text of all functions."""
        for block in self.kernel.blocks:
            self.types, self.carry = {}, False
            self.lines.append(f"def block_{block.index}(g):")
            self.line("R = g.regs")
            for name in self.live.into[block.index]:
                self.line(f"{name} = R[{name!r}]")
            for instruction in block.instructions:
                self._instruction(instruction)
            kept = ", ".join(f"{n!r}: {n}" for n in self.live.out[block.index])
            self.line(f"g.regs = {{{kept}}}")
            if block.instructions:
                self._result(block.instructions[-1])
            self.lines.append("")
        return "\n".join(self.lines)

    def _instruction(self, instruction: Instruction) -> None:
        self.i = instruction
        translator = FORMS.get(instruction.op)
        self.line(f"# {instruction.text}")
        if instruction.index in self.uses.touched:  # registers that a product may have
            self.call("touch", *map(repr, self.uses.touched[instruction.index]))
        self.varies = False
        if translator is None:
            raise self.unknown()
        translator(self)

    def _result(self, last: Instruction) -> None:
        """What a block returns: which threads jump or leave, or the index of a brx."""
        if last.base in ("bra", "ret", "exit") and last.guard is not None:
            self.line(f"return {self.guard()}")
        elif last.base == "brx":
            self.line(f"return {self.value(last.operands[0], 'u32')}")
