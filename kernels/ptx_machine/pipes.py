"""Which unit of a multiprocessor an instruction needs, and what the tensor cores do in it.

PTX, not machine code: ptxas drops most moves, joins some instructions and splits others. So an
integer operation of 64 bits counts as two, and a division by the same register as before in a block
as the multiplication that it becomes. Addresses in loops are where it is furthest off: there
believe SASS.
"""

from __future__ import annotations

import re

from .syntax import Block, Instruction, Vec

PIPES = (
    "tensor", "fma", "alu", "mufu", "convert", "shuffle", "shared", "global", "async", "barrier",
    "control", "move",
)  # fmt: skip
_MUFU = {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"}
_BARRIER = {"bar", "barrier", "mbarrier", "fence", "membar", "griddepcontrol", "wgmma", "nanosleep"}
_CONTROL = {"bra", "brx", "ret", "exit", "trap", "setmaxnreg", "elect"}
_FLOATS = {"f16", "bf16", "f16x2", "bf16x2", "f32", "f64", "tf32"}
_WIDTHS = {"tf32": 4, "f16": 2, "bf16": 2}
_MMA = re.compile(r"m(\d+)n(\d+)k(\d+)")


def pipes_of(block: Block) -> list[tuple[str, int]]:
    """(pipe, how often it counts) of each instruction of a block."""
    found, divisors = [], set()
    for i in block.instructions:
        pipe = _pipe(i)
        if i.op.startswith("div.") and i.op.endswith(".f32"):
            if i.operands[2] in divisors:  # ptxas takes the reciprocal of a divisor once
                pipe = "fma", 1
            divisors.add(i.operands[2])
        found.append(pipe)
    return found


def _pipe(i: Instruction) -> tuple[str, int]:
    parts = i.parts
    base, kind = parts[0], parts[-1]
    if base == "mma" or i.op.startswith("wgmma.mma_async"):
        return "tensor", 1
    if base in ("ld", "st", "atom", "red", "ldmatrix", "stmatrix"):
        if base.endswith("matrix") or "shared" in parts or "shared::cta" in parts:
            return "shared", 1
        return ("move", 1) if "param" in parts else ("global", 1)
    if base in ("cp", "prefetch", "tensormap"):
        return "async", 1
    if base in _BARRIER:
        return "barrier", 1
    if base in _CONTROL:
        return "control", 1
    if base in ("shfl", "vote", "redux", "match"):
        return "shuffle", 1
    if base in _MUFU or (base == "div" and kind == "f32"):
        return "mufu", 1
    if base == "mov":
        packs = kind == "b32" and any(isinstance(o, Vec) for o in i.operands)
        return ("alu", 1) if packs else ("move", 1)
    if base == "cvta":
        return "move", 1
    if base == "cvt":
        return _conversion(parts[-2], kind)
    if kind in _FLOATS and base in ("add", "sub", "mul", "fma", "neg", "abs"):
        return "fma", 1
    return "alu", 2 if kind[1:] == "64" and "wide" not in parts else 1


def _conversion(to: str, source: str) -> tuple[str, int]:
    if (to, source) == ("f32", "bf16"):
        return "alu", 1  # a shift
    if to not in _FLOATS and source not in _FLOATS:
        return ("alu", 1) if to[0] == "s" else ("move", 1)
    return "convert", 1


def tensor_flops(i: Instruction) -> int:
    """FLOPs of one warp; a wgmma is the work of four."""
    m, n, k = _shape(i)
    return 2 * m * n * k // (4 if i.base == "wgmma" else 1)


def operand_bytes(i: Instruction) -> int:
    """Bytes of shared memory that a warp's share of a wgmma reads: B, and A unless in registers."""
    m, n, k = _shape(i)
    rows = n if isinstance(i.operands[1], Vec) else m + n
    return rows * k * _WIDTHS.get(i.parts[-1], 1) // 4


def _shape(i: Instruction) -> tuple[int, int, int]:
    found = _MMA.search(i.op)
    assert found is not None, i
    m, n, k = map(int, found.groups())
    return m, n, k
