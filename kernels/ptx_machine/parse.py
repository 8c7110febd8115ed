"""Parse the PTX that Triton emits: one entry function, its parameters, registers and instructions.

    kernel = parse(text)
    kernel.blocks[0].instructions[0].text

Only what Triton's NVIDIA backend and its inline assembly write is understood; what is not raises
:class:`PtxSyntaxError`. Nothing is executed here. PTX ISA, chapters 4 to 6 and 11.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from .syntax import (
    Block,
    Imm,
    Instruction,
    Kernel,
    Mem,
    Operand,
    Pair,
    Param,
    PtxSyntaxError,
    Reg,
    Special,
    Sym,
    Vec,
)

WIDTHS = {"pred": 1} | {f"{kind}{bits}": bits for kind in "bsuf" for bits in (8, 16, 32, 64, 128)}
# What ends a block besides a jump: others may run meanwhile.
_ENDS_BLOCK = ("bra", "brx", "ret", "exit", "bar", "barrier", "mbarrier", "trap")
# Line tables point at these labels, no jump does.
_DEBUG_LABELS = ("$L__tmp", "$L__func", "$L__info", "$L__debug", "$L__lineinfo")

_CALL = "a call, of a function with noinline, device_print or device_assert: not understood"

_COMMENT = re.compile(r"//(.*)$")
_LABEL = re.compile(r"([$\w]+):(?!:)")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
    r"([\w$]+)(?:\[(\d+)\])?"
)
_LOCAL = re.compile(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]")
_GLOBAL = re.compile(r"\.global\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]\s*=\s*\{([^}]*)\}")
_LINE = re.compile(r"\s*\.loc\s")
_GUARD = re.compile(r"@(!?)\s*([%\w$]+)\s+")


def parse(text: str) -> Kernel:
    """The only entry function of a PTX module."""
    lines = text.splitlines()
    target = next((ln.split()[1].rstrip(",") for ln in lines if ln.startswith(".target")), "")
    start = next((i for i, ln in enumerate(lines) if ".entry" in _COMMENT.sub("", ln)), None)
    if start is None:
        raise PtxSyntaxError("no .entry function")
    name = _ENTRY.search(lines[start])
    if not name:
        raise PtxSyntaxError(f"entry function not understood: {lines[start]}")
    open_at = next(i for i in range(start, len(lines)) if lines[i].strip() == "{")
    head = " ".join(_COMMENT.sub("", ln) for ln in lines[start:open_at])
    threads = re.search(r"\.reqntid\s+(\d+)", head) or re.search(r"\.maxntid\s+(\d+)", head)
    constants, data = _constants(" ".join(lines[:start]))
    body = _Body()
    body.read(_pieces(lines, open_at))
    return Kernel(
        name=name.group(1),
        target=target,
        params=[_param(found) for found in _PARAM.finditer(head)],
        threads=int(threads.group(1)) if threads else 0,
        blocks=body.blocks,
        shared=_shared_variables(lines[:start]),
        local=body.local,
        local_size=body.local_size,
        constants=constants,
        data=data,
        tables=body.tables,
        instructions=[i for block in body.blocks for i in block.instructions],
    )


def _param(found: re.Match[str]) -> Param:
    align, kind, name, count = found.groups()
    size = WIDTHS[kind] // 8
    natural = int(align) if align else size
    if count:
        return Param(name, size * int(count), natural, f"{kind}[{count}]")
    return Param(name, size, natural, kind)


def _shared_variables(lines: list[str]) -> dict[str, int]:
    names = {}
    for line in lines:
        found = re.match(r"\s*\.extern\s+\.shared\s+.*?([\w$]+)\[\]", line)
        if found:
            names[found.group(1)] = 0
        elif re.match(r"\s*\.shared\b", line):
            raise PtxSyntaxError(f"static shared memory: {line.strip()}")
    return names


def _constants(text: str) -> tuple[dict[str, int], bytes]:
    """Tables that library functions read: where each begins, and all bytes."""
    offsets, data = {}, b""
    for align, name, size, values in (found.groups() for found in _GLOBAL.finditer(text)):
        data += bytes(-len(data) % int(align))
        offsets[name] = len(data)
        data += bytes(map(int, values.split(","))).ljust(int(size), b"\0")
    return offsets, data


@dataclass(frozen=True, slots=True)
class _Piece:
    """A brace, a label or a statement between them."""

    kind: str  # "{", "}", "label", "statement"
    text: str
    line: int
    where: str  # the line of Triton source


def _pieces(lines: list[str], start: int) -> Iterator[_Piece]:
    """Cut the text from line `start` on; statements end at semicolons, also in the next lines."""
    pending, pending_line, where = "", 0, ""
    for number in range(start, len(lines)):
        raw = lines[number]
        comment = _COMMENT.search(raw)
        code = raw[: comment.start()] if comment else raw
        if _LINE.match(code):
            where = comment.group(1).strip() if comment else code.strip()
            continue
        code = code.strip()
        while code:
            if not pending:
                pending_line = number + 1
                label = _LABEL.match(code)
                if code[0] in "{}":
                    yield _Piece(code[0], "", pending_line, where)
                    code = code[1:].lstrip()
                    continue
                if label:
                    yield _Piece("label", label.group(1), pending_line, where)
                    code = code[label.end() :].lstrip()
                    continue
            statement, semicolon, code = code.partition(";")
            pending += statement + " "
            if semicolon:
                yield _Piece("statement", " ".join(pending.split()), pending_line, where)
                pending = ""
            code = code.lstrip()


class _Body:
    """Reads the pieces of a function: registers by scope, instructions by block."""

    def __init__(self) -> None:
        self.blocks = [Block(0)]
        self.scopes: list[dict[str, Reg]] = []  # registers declared by name
        self.prefixes: dict[str, int] = {}  # "%r" -> 32
        self.scope_count = 0
        self.tables: dict[str, list[str]] = {}
        self.local: dict[str, int] = {}
        self.local_size = 0
        self.last_label = ""
        self.count = 0

    def read(self, pieces: Iterator[_Piece]) -> None:
        for piece in pieces:
            if piece.kind == "{":
                self.scopes.append({})
                self.scope_count += 1
            elif piece.kind == "}":
                self.scopes.pop()
                if not self.scopes:
                    if not self.blocks[-1].instructions:
                        self.blocks.pop()
                    return
            elif piece.kind == "label":
                self._label(piece.text)
            elif piece.text:
                self._statement(piece)
        raise PtxSyntaxError("the function does not end")

    def _label(self, name: str) -> None:
        self.last_label = name
        if name.startswith(_DEBUG_LABELS):
            return
        if self.blocks[-1].instructions:
            self._new_block()
        self.blocks[-1].labels.append(self._scoped(name))

    def _scoped(self, label: str) -> str:
        """Labels of inline assembly are known inside its braces only."""
        return label if label.startswith("$") else f"{label}@{self.scope_count}"

    def _new_block(self) -> None:
        self.blocks.append(Block(len(self.blocks)))

    def _statement(self, piece: _Piece) -> None:
        text = piece.text
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith(".branchtargets"):
            labels = text.removeprefix(".branchtargets").split(",")
            self.tables[self.last_label] = [label.strip() for label in labels]
        elif found := _LOCAL.fullmatch(text):
            align, name, size = int(found.group(1)), found.group(2), int(found.group(3))
            self.local[name] = -(-self.local_size // align) * align
            self.local_size = self.local[name] + size
        elif text.startswith(".") and not text.startswith(".pragma"):
            why = _CALL if text.startswith(".param") else "not understood"
            raise PtxSyntaxError(f"{text}   [{piece.where}, PTX line {piece.line}]: {why}")
        elif not text.startswith("."):
            self._instruction(piece)

    def _instruction(self, piece: _Piece) -> None:
        guard, negated, rest = None, False, piece.text
        found = _GUARD.match(rest)
        if found:
            operand = self._operand(found.group(2))
            if not isinstance(operand, Reg):
                raise PtxSyntaxError(f"PTX line {piece.line}: {piece.text}")
            guard, negated, rest = operand, bool(found.group(1)), rest[found.end() :]
        op, _, args = rest.partition(" ")
        if re.match(r"mbarrier\.(try|test)_wait", op) and self.blocks[-1].instructions:
            self._new_block()  # it may have to run again, alone
        operands = tuple(self._operand(arg) for arg in _split(args))
        if op.startswith("bra") and isinstance(operands[0], Sym):
            operands = (Sym(self._scoped(operands[0].name)),)
        made = Instruction(
            op, operands, guard, negated, piece.text, piece.line, piece.where, self.count
        )
        self.count += 1
        self.blocks[-1].instructions.append(made)
        if made.base in _ENDS_BLOCK:
            self._new_block()

    def _registers(self, text: str) -> None:
        found = re.match(r"\.reg \.(\w+) (.*)", text)
        if not found or found.group(1) not in WIDTHS:
            raise PtxSyntaxError(text)
        bits = WIDTHS[found.group(1)]
        for name in map(str.strip, found.group(2).split(",")):
            counted = re.match(r"([%\w$]+)<(\d+)>", name)
            if counted:
                self.prefixes[counted.group(1)] = bits
            else:
                clean = name.lstrip("%").replace("$", "_")
                self.scopes[-1][name] = Reg(f"{clean}_scope{self.scope_count}", bits)

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return Vec(tuple(self._operand(item) for item in _split(text[1:-1])))
        if text.startswith("["):
            return self._memory(text[1:-1])
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first), self._operand(second))
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if text.startswith("%") or re.fullmatch(r"[A-Za-z_$][\w$]*", text):
            numbered = re.fullmatch(r"(%?[\w$]*[A-Za-z_$])(\d+)", text)
            if numbered and numbered.group(1) in self.prefixes:
                return Reg(text.lstrip("%") + "_", self.prefixes[numbered.group(1)])
            return Special(text) if text.startswith("%") else Sym(text)
        return _constant(text)

    def _memory(self, text: str) -> Mem:
        items = _split(text)
        base, offset = items[0].strip(), 0
        found = re.fullmatch(r"(.+?)\s*\+\s*(-?\w+)", base)
        if found:
            base, offset = found.group(1), _constant(found.group(2)).value
        operand = self._operand(base)
        if not isinstance(operand, (Reg, Sym, Imm)):
            raise PtxSyntaxError(f"address not understood: [{text}]")
        coords: tuple[Operand, ...] = ()
        if len(items) > 1:
            extra = self._operand(items[1])
            coords = extra.items if isinstance(extra, Vec) else (extra,)
        return Mem(operand, offset, coords)


def _split(text: str) -> list[str]:
    """Split at the commas that are not inside braces or brackets."""
    items, depth, item = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            items.append(item)
            item = ""
        else:
            item += char
    if item.strip():
        items.append(item)
    return items


def _constant(text: str) -> Imm:
    """A number as PTX writes it: 0f and 0d give the bits of floats."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Imm(int(text[2:], 16), 32)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Imm(int(text[2:], 16), 64)
    for number in (lambda: Imm(int(text.rstrip("Uu"), 0)), lambda: _double(float(text))):
        try:
            return number()
        except ValueError:
            continue
    raise PtxSyntaxError(f"operand not understood: {text!r}")


def _double(value: float) -> Imm:
    return Imm(int.from_bytes(struct.pack("<d", value), "little"), 64)
