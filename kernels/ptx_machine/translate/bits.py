"""Logic, shifts and bit fields. PTX ISA 9.7.1 and 9.7.8."""

from __future__ import annotations

import numpy as np

from ..syntax import Imm
from .forms import form
from .text import TYPES, Text

_SYMBOLS = {"and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>"}


@form("{and,or,xor}.{pred,b16,b32,b64}")
def _logic(w: Text) -> None:
    a, b = w.values(w.i.operands[1:], w.kind)
    w.set(w.i.operands[0], f"{a} {_SYMBOLS[w.i.base]} {b}", w.kind)


@form("not.{pred,b16,b32,b64}")
def _not(w: Text) -> None:
    w.set(w.i.operands[0], f"~{w.value(w.i.operands[1], w.kind)}", w.kind)


@form("shl.b{16,32,64}", "shr.{b,u,s}{16,32,64}")
def _shift(w: Text) -> None:
    """Counts past the width shift everything out."""
    d, a, b = w.i.operands
    bits = int(w.kind[1:])
    if isinstance(b, Imm):
        amount = w.constant(w.immediate(Imm(min(b.value, bits)), w.kind))
    else:
        limit = w.constant(np.uint32(bits))
        amount = f"np.minimum({w.value(b, 'u32')}, {limit}).astype({TYPES[w.kind]})"
    w.set(d, f"{w.array(a, w.kind)} {_SYMBOLS[w.i.base]} {amount}", w.kind)


@form("bfe.{u32,s32}")
def _extract(w: Text) -> None:
    d, *operands = w.i.operands
    read = w.arrays(tuple(operands), "u32")
    w.set(d, f"extract({read}, {w.kind == 's32'})", w.kind)


@form("bfi.b32")
def _insert(w: Text) -> None:
    w.set(w.i.operands[0], f"insert({w.arrays(w.i.operands[1:], 'u32')})", "b32")


@form("lop3.b32")
def _lop3(w: Text) -> None:
    d, *operands, table = w.i.operands
    w.set(d, f"lop3({w.arrays(tuple(operands), 'u32')}, {w.number(table)})", "b32")


@form("prmt.b32")
def _permute(w: Text) -> None:
    w.set(w.i.operands[0], f"permute({w.arrays(w.i.operands[1:], 'u32')})", "b32")


@form("shf.{l,r}.{wrap,clamp}.b32")
def _funnel(w: Text) -> None:
    _, side, mode, _ = w.parts
    read = w.arrays(w.i.operands[1:], "u32")
    w.set(w.i.operands[0], f"funnel({read}, {side == 'l'}, {mode == 'wrap'})", "b32")


@form("clz.b{32,64}")
def _clz(w: Text) -> None:
    """Leading zeros: all bits below the first are filled, and counted."""
    a = w.array(w.i.operands[1], w.kind)
    w.set(w.i.operands[0], f"({w.kind[1:]} - np.bitwise_count(filled({a}))).astype(u32)", "u32")


@form("brev.b{32,64}")
def _brev(w: Text) -> None:
    w.set(w.i.operands[0], f"reversed_bits({w.array(w.i.operands[1], w.kind)})", w.kind)


@form("popc.b{32,64}")
def _popc(w: Text) -> None:
    w.set(
        w.i.operands[0], f"np.bitwise_count({w.array(w.i.operands[1], w.kind)}).astype(u32)", "u32"
    )
