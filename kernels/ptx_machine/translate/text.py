"""What translators write with: operands as expressions, results as assignments.

A register is a local variable: an array with an element for each thread of the group `g` that runs
the block, the bits of the register in some numpy type of its size. Which type it has at a place is
known when the text is written, so a view is taken only where an instruction reads another one.
"""

from __future__ import annotations

import numpy as np

from ..global_memory import CONSTANTS, PARAM_BASE, PARAM_STEP
from ..group import SPECIAL
from ..liveness import Liveness
from ..syntax import (
    Imm,
    Instruction,
    Kernel,
    Mem,
    Operand,
    Reg,
    Special,
    Sym,
    UnknownInstructionError,
)
from ..wgmma_registers import Uses

# PTX types as numpy names them.
TYPES = {
    f"{ptx}{bits}": f"{numpy}{bits}"
    for ptx, numpy in (("u", "u"), ("b", "u"), ("s", "i"), ("f", "f"))
    for bits in (8, 16, 32, 64)
    if (ptx, bits) != ("f", 8)
}


class Text:
    """The text of a kernel's functions; translators add to it for the instruction `i`."""

    def __init__(self, kernel: Kernel, live: Liveness, uses: Uses) -> None:
        self.kernel, self.live, self.uses = kernel, live, uses
        self.constants: dict[str, object] = {}  # names that the text uses
        self.lines: list[str] = []
        self.types: dict[str, str] = {}  # register -> numpy type that it has now
        self.i: Instruction
        self.carry = False  # the block has set the carry flag
        self.varies = False  # the expression is an array, not one number for all threads

    @property
    def parts(self) -> list[str]:
        """Opcode and modifiers of the instruction."""
        return self.i.parts

    @property
    def kind(self) -> str:
        """The last modifier: the PTX type of most instructions."""
        return self.i.op.rpartition(".")[2]

    def line(self, text: str) -> None:
        """Write one statement."""
        self.lines.append("    " + text)

    def call(self, name: str, *arguments: str, result: str = "") -> None:
        """Call a function that takes the group and the instruction first."""
        inside = ", ".join(("g", f"I[{self.i.index}]", *arguments))
        self.line(f"{result} = {name}({inside})" if result else f"{name}({inside})")

    def unknown(self, why: str = "") -> UnknownInstructionError:
        """The error for an instruction that is not translated."""
        return UnknownInstructionError(f"{self.kernel.name}: {why or 'unknown'}: {self.i}")

    def refuse_guard(self) -> None:
        """For instructions that a whole warp runs, or none."""
        if self.i.guard is not None:
            raise self.unknown("with a guard")

    def guard(self) -> str:
        """The threads that take part, as an expression; ``None`` for all."""
        if self.i.guard is None:
            return "None"
        return f"~{self.i.guard.name}" if self.i.negated else self.i.guard.name

    def constant(self, value: object) -> str:
        """A name for a numpy number."""
        key = f"K_{type(value).__name__}_{np.asarray(value).tobytes().hex()}"
        self.constants[key] = value
        return key

    def number(self, operand: Operand) -> int:
        """An operand that has to be an integer known now."""
        if not isinstance(operand, Imm) or operand.float_bits:
            raise self.unknown("not a constant")
        return operand.value

    def value(self, operand: Operand, kind: str) -> str:
        """An expression for an operand, read as PTX type `kind` ("s32")."""
        if isinstance(operand, Imm):
            return self.constant(self.immediate(operand, kind))
        self.varies = True
        if isinstance(operand, Special):
            if operand.name not in SPECIAL:
                raise self.unknown()
            return f"g.special({operand.name!r})"
        if not isinstance(operand, Reg):
            raise self.unknown()
        if kind == "pred":
            return operand.name
        numpy = TYPES[kind]
        bits = int(numpy[1:])
        if operand.bits == bits:
            known = self.types.get(operand.name)
            return operand.name if known == numpy else f"{operand.name}.view({numpy})"
        if operand.bits > bits:
            return f"{operand.name}.view(u{operand.bits}).astype(u{bits}).view({numpy})"
        raise self.unknown()

    def values(self, operands: tuple[Operand, ...], kind: str) -> list[str]:
        """Expressions for operands of one type."""
        return [self.value(operand, kind) for operand in operands]

    def array(self, operand: Operand, kind: str) -> str:
        """As :meth:`value`, but an array even if the operand is a constant."""
        value = self.value(operand, kind)
        return f"g.full({value})" if isinstance(operand, Imm) else value

    def arrays(self, operands: tuple[Operand, ...], kind: str) -> str:
        """Arrays of one type, as arguments of a call."""
        return ", ".join(self.array(operand, kind) for operand in operands)

    def immediate(self, operand: Imm, kind: str) -> object:
        """A constant as a numpy number of PTX type `kind`."""
        if kind == "pred":
            return np.bool_(operand.value != 0)
        bits = int(kind[1:])
        name = {"u": "uint", "i": "int", "f": "float"}[TYPES[kind][0]] + str(bits)
        if operand.float_bits:
            raw = np.array([operand.value], f"u{operand.float_bits // 8}")
            if kind[0] == "f":
                return np.dtype(name).type(raw.view(f"f{operand.float_bits // 8}")[0])
            if bits == operand.float_bits:
                return raw.view(name)[0]
            raise self.unknown()
        if kind[0] == "f":
            raise self.unknown()
        return np.array([operand.value & ((1 << bits) - 1)], f"u{bits // 8}").view(name)[0]

    def address(self, operand: Operand, bits: int) -> str:
        """The bytes that ``[base + offset]`` names: an array of uint64 (global) or uint32."""
        if not isinstance(operand, Mem) or operand.coords:
            raise self.unknown()
        base, offset = operand.base, operand.offset
        if isinstance(base, (Sym, Imm)):
            start = base.value if isinstance(base, Imm) else self.variable(base.name)
            return f"g.full({self.constant(np.dtype(f'u{bits // 8}').type(start + offset))})"
        expression = self.value(base, f"u{base.bits}")
        if base.bits == 64 and bits == 32:
            expression = f"{expression}.astype(u32)"
        if not offset:
            return expression
        wrapped = np.dtype(f"u{bits // 8}").type(offset & ((1 << bits) - 1))
        return f"({expression} + {self.constant(wrapped)})"

    def variable(self, name: str) -> int:
        """The address of a variable or parameter of the kernel."""
        for variables in (self.kernel.shared, self.kernel.local):
            if name in variables:
                return variables[name]
        if name in self.kernel.constants:
            return CONSTANTS + self.kernel.constants[name]
        names = [p.name for p in self.kernel.params]
        if name not in names:
            raise self.unknown(f"no variable {name}")
        return PARAM_BASE + PARAM_STEP * names.index(name)

    # Results

    def set(self, target: Operand, expression: str, kind: str) -> None:
        """Assign a value of PTX type `kind` to a register, widened as the type says."""
        if isinstance(target, Special) and target.name == "%_":
            return
        if isinstance(target, Sym) and target.name == "_":
            self.line(expression)
            return
        if not isinstance(target, Reg):
            raise self.unknown()
        numpy = "bool" if kind == "pred" else TYPES[kind]
        if kind != "pred" and target.bits > int(numpy[1:]):
            wide = ("i" if numpy[0] == "i" else "u") + str(target.bits)
            if numpy[0] == "f":
                expression = f"({expression}).view(u{numpy[1:]})"
            expression, numpy = f"({expression}).astype({wide})", wide
        elif kind != "pred" and target.bits < int(numpy[1:]):
            raise self.unknown()
        if not self.varies:
            expression = f"g.full({expression})"
        if self.i.guard is not None:
            old = target.name
            if numpy != "bool" and self.types.get(old) != numpy:
                old = f"{old}.view({numpy})"
            expression = f"np.where({self.guard()}, {expression}, {old})"
        self.line(f"{target.name} = {expression}")
        self.types[target.name] = numpy

    def set_many(self, targets: list[Operand], expression: str, kind: str) -> None:
        """Assign a list of arrays."""
        names = [f"T{n}" for n in range(len(targets))]
        self.line(f"{', '.join(names)}, = {expression}")
        self.varies = True
        for target, name in zip(targets, names, strict=True):
            self.set(target, name, kind)
