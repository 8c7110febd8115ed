"""Writes the Python of a kernel: one function per block, one numpy expression per instruction."""

from __future__ import annotations

from ..syntax import Instruction
from ..translate_sm90 import Sm90
from .forms import FORMS


class Writer(Sm90):
    """The text of a kernel's functions."""

    def source(self) -> str:
        """The text of all functions."""
        for block in self.kernel.blocks:
            self.types = {}
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
        self.touch()
        self.varies = False
        if translator is not None:
            translator(self)
        elif not self.sm90():
            raise self.unknown()

    def _result(self, last: Instruction) -> None:
        """What a block returns: which threads jump or leave, or the index of a brx."""
        if last.base in ("bra", "ret", "exit") and last.guard is not None:
            self.line(f"return {self.guard()}")
        elif last.base == "brx":
            self.line(f"return {self.value(last.operands[0], 'u32')}")
