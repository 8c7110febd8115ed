"""What a PTX program is made of: operands, instructions, blocks, and the kernel that holds them.

PTX ISA, chapter 4 (syntax) and 6 (operands). :func:`ptx_machine.parse.parse` makes these.
"""

from __future__ import annotations

from dataclasses import dataclass, field


class PtxSyntaxError(ValueError):
    """The text is not PTX as this parser knows it."""


class UnknownInstructionError(NotImplementedError):
    """An instruction, or a form of one, that is not translated."""


@dataclass(frozen=True, slots=True)
class Reg:
    """A register; `name` is a Python identifier, `bits` is 1 for predicates."""

    name: str
    bits: int


@dataclass(frozen=True, slots=True)
class Imm:
    """A constant: an int, or a float given by its bits (`float_bits` 32 or 64)."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True, slots=True)
class Special:
    """A special register such as ``%tid.x``."""

    name: str


@dataclass(frozen=True, slots=True)
class Sym:
    """A label or the name of a variable."""

    name: str


@dataclass(frozen=True, slots=True)
class Mem:
    """``[base + offset]``; `coords` are those of a TMA operand ``[base, {c0, c1}]``."""

    base: Reg | Sym | Imm
    offset: int = 0
    coords: tuple[Operand, ...] = ()


@dataclass(frozen=True, slots=True)
class Vec:
    """``{a, b, ...}``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """``a|b``: the two results of setp and shfl."""

    first: Operand
    second: Operand


Operand = Reg | Imm | Special | Sym | Mem | Vec | Pair


@dataclass(slots=True)
class Instruction:
    """One instruction; `where` is the line of Triton source that it came from."""

    op: str  # with modifiers: "ld.global.v4.b32"
    operands: tuple[Operand, ...]
    guard: Reg | None
    negated: bool  # guard is @!p
    text: str
    line: int  # in the PTX
    where: str
    index: int  # among all instructions of the kernel

    @property
    def parts(self) -> list[str]:
        """The opcode and its modifiers."""
        return self.op.split(".")

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.op.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.text}   [{self.where or 'no source line'}, PTX line {self.line}]"


@dataclass(slots=True)
class Block:
    """Instructions that run one after the other: only the last can jump, wait or end."""

    index: int
    labels: list[str] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of the kernel."""

    name: str
    size: int  # bytes
    align: int
    kind: str  # "u64", "b8[128]", ...


@dataclass(slots=True)
class Kernel:
    """An entry function."""

    name: str
    target: str
    params: list[Param]
    threads: int  # of .reqntid or .maxntid, 0 if absent
    blocks: list[Block]
    shared: dict[str, int]  # variable -> offset; the dynamic array lies at 0
    local: dict[str, int]  # variable of .local -> offset
    local_size: int  # bytes of .local memory of each thread
    constants: dict[str, int]  # variable of .global with initial bytes -> offset in `data`
    data: bytes
    tables: dict[str, list[str]]  # of brx.idx: name -> labels
    instructions: list[Instruction]

    @property
    def chip(self) -> int:
        """The number of the chip it is compiled for: 90 of ``sm_90a``."""
        return int("".join(filter(str.isdigit, self.target)))

    def label_block(self, label: str) -> int:
        """The index of the block that `label` stands before."""
        for block in self.blocks:
            if label in block.labels:
                return block.index
        raise PtxSyntaxError(f"{self.name}: no label {label}")
