"""Parse the PTX that Triton emits: one entry function, its parameters, registers and instructions.

    kernel = parse(text)
    kernel.blocks[0].instructions[0].text

Only what Triton's NVIDIA backend and its inline assembly write is understood; what is not raises
:class:`PtxSyntaxError`. Nothing is executed here.
"""

from __future__ import annotations

import re
import struct

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

_DEBUG_LABELS = ("$L__tmp", "$L__func", "$L__info", "$L__debug", "$L__lineinfo")

_STRING_COMMENT = re.compile(r"//(.*)$")
_LABEL = re.compile(r"([$\w]+):")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
    r"([\w$]+)(?:\[(\d+)\])?"
)
_GUARD = re.compile(r"@(!?)\s*([%\w$]+)\s+")


def parse(text: str) -> Kernel:
    """The only entry function of a PTX module."""
    lines = text.splitlines()
    target = next((ln.split()[1].rstrip(",") for ln in lines if ln.startswith(".target")), "")
    start = next((i for i, ln in enumerate(lines) if ".entry" in ln and "//" not in ln), None)
    if start is None:
        raise PtxSyntaxError("no .entry function")
    name = _ENTRY.search(lines[start])
    if not name:
        raise PtxSyntaxError(f"entry function not understood: {lines[start]}")
    open_at = next(i for i in range(start, len(lines)) if lines[i].strip() == "{")
    head = " ".join(_STRING_COMMENT.sub("", ln) for ln in lines[start:open_at])
    threads = re.search(r"\.reqntid\s+(\d+)", head) or re.search(r"\.maxntid\s+(\d+)", head)
    body = _Body(lines, open_at, _shared_variables(lines[:start]))
    body.read()
    return Kernel(
        name=name.group(1),
        target=target,
        params=[_param(found) for found in _PARAM.finditer(head)],
        threads=int(threads.group(1)) if threads else 0,
        blocks=body.blocks,
        shared=body.shared,
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


class _Body:
    """Reads the statements between the braces of a function."""

    def __init__(self, lines: list[str], start: int, shared: dict[str, int]) -> None:
        self.lines = lines
        self.start = start
        self.shared = shared
        self.blocks = [Block(0, [])]
        self.scopes: list[dict[str, Reg]] = []  # registers declared by name
        self.prefixes: dict[str, int] = {}  # "%r" -> 32
        self.scope_count = 0
        self.tables: dict[str, list[str]] = {}
        self.last_label = ""
        self.where = ""
        self.count = 0

    def read(self) -> None:
        pending, pending_line = "", 0
        for number in range(self.start, len(self.lines)):
            raw = self.lines[number]
            comment = _STRING_COMMENT.search(raw)
            code = raw[: comment.start()] if comment else raw
            if code.strip().startswith(".loc"):
                self.where = comment.group(1).strip() if comment else code.strip()
                continue
            at = 0
            while at < len(code):
                if not pending:
                    while at < len(code) and code[at].isspace():
                        at += 1
                    if at == len(code):
                        break
                    if code[at] == "{":
                        self._open()
                        at += 1
                        continue
                    if code[at] == "}":
                        self.scopes.pop()
                        if not self.scopes:
                            self._drop_empty_blocks()
                            return
                        at += 1
                        continue
                    label = _LABEL.match(code, at)
                    if label:
                        self._label(label.group(1))
                        at = label.end()
                        continue
                    pending_line = number + 1
                end = code.find(";", at)
                if end < 0:
                    pending += code[at:] + " "
                    break
                self._statement((pending + code[at:end]).strip(), pending_line)
                pending, at = "", end + 1
        raise PtxSyntaxError("the function does not end")

    def _open(self) -> None:
        self.scopes.append({})
        self.scope_count += 1

    def _label(self, name: str) -> None:
        self.last_label = name
        if name.startswith(_DEBUG_LABELS):
            return  # line tables point at them, no jump does
        if not name.startswith("$"):
            name = f"{name}@{self.scope_count}"  # inline assembly: known inside its braces only
        if self.blocks[-1].instructions:
            self.blocks.append(Block(len(self.blocks), []))
        self.blocks[-1].labels.append(name)

    def _drop_empty_blocks(self) -> None:
        if self.blocks and not self.blocks[-1].instructions:
            self.blocks.pop()

    def _statement(self, text: str, line: int) -> None:
        text = re.sub(r"\s+", " ", text)
        if not text:
            return
        if text.startswith(".reg"):
            self._registers(text)
            return
        if text.startswith(".pragma"):
            return
        if text.startswith(".branchtargets"):
            labels = text.removeprefix(".branchtargets").split(",")
            self.tables[self.last_label] = [label.strip() for label in labels]
            return
        if text.startswith("."):
            raise PtxSyntaxError(f"PTX line {line}: {text}")
        guard, negated, rest = None, False, text
        found = _GUARD.match(text)
        if found:
            operand = self._operand(found.group(2))
            assert isinstance(operand, Reg), text
            guard, negated, rest = operand, bool(found.group(1)), text[found.end() :]
        op, _, args = rest.partition(" ")
        if "try_wait" in op and self.blocks[-1].instructions:
            self.blocks.append(Block(len(self.blocks), []))  # it may have to run again, alone
        operands = tuple(self._operand(arg) for arg in _split(args))
        if op.startswith("bra") and isinstance(operands[0], Sym):
            name = operands[0].name
            if not name.startswith("$"):
                operands = (Sym(f"{name}@{self.scope_count}"),)
        instruction = Instruction(op, operands, guard, negated, text, line, self.where, self.count)
        self.count += 1
        self.blocks[-1].instructions.append(instruction)
        if op.split(".")[0] in _ENDS_BLOCK:
            self.blocks.append(Block(len(self.blocks), []))

    def _registers(self, text: str) -> None:
        found = re.match(r"\.reg \.(\w+) (.*)", text)
        if not found:
            raise PtxSyntaxError(text)
        bits = WIDTHS[found.group(1)]
        for name in found.group(2).split(","):
            name = name.strip()
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
            numbered = re.fullmatch(r"(%?[A-Za-z_]+)(\d+)", text)
            if numbered and numbered.group(1) in self.prefixes:
                return Reg(text.lstrip("%"), self.prefixes[numbered.group(1)])
            return Special(text) if text.startswith("%") else Sym(text)
        return _constant(text)

    def _memory(self, text: str) -> Mem:
        items = _split(text)
        base, offset = items[0].strip(), 0
        found = re.fullmatch(r"(.+?)\s*\+\s*(-?\w+)", base)
        if found:
            base, offset = found.group(1), _constant(found.group(2)).value
        operand = self._operand(base)
        assert isinstance(operand, (Reg, Sym, Imm)), text
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
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Imm(int(text[2:], 16), 32)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Imm(int(text[2:], 16), 64)
    try:
        return Imm(int(text.rstrip("Uu"), 0))
    except ValueError:
        pass
    try:
        return Imm(int.from_bytes(struct.pack("<d", float(text)), "little"), 64)
    except ValueError:
        raise PtxSyntaxError(f"operand not understood: {text!r}") from None
