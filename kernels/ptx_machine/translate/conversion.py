"""Moves, comparisons and conversions. PTX ISA 9.7.6, 9.7.7 and 9.7.9."""

from __future__ import annotations

import numpy as np

from ..syntax import Imm, Operand, Pair, Special, Sym, Vec
from .forms import form
from .text import TYPES, Text

# Integer rounding of floats.
_WHOLE = {"rmi": "np.floor", "rpi": "np.ceil", "rzi": "np.trunc", "rni": "np.rint"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_COMPARE |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_JOIN = {"and": "&", "or": "|", "xor": "^"}


@form("mov.{b,u,s}{16,32,64}", "mov.f{32,64}", "mov.pred")
def _mov(w: Text) -> None:
    d, a = w.i.operands
    if isinstance(d, Vec):
        _split(w, d.items, a)
    elif isinstance(a, Vec):
        _pack(w, d, a.items)
    elif isinstance(a, Sym):
        address = w.constant(w.immediate(Imm(w.variable(a.name)), w.kind))
        w.set(d, address, w.kind)
    elif isinstance(a, Special) and a.name.startswith("%clock"):
        raise w.unknown("a clock")
    else:
        w.set(d, w.value(a, w.kind), w.kind)


def _pieces(w: Text, count: int) -> str:
    """The type of each of `count` equal pieces of the moved value."""
    bits = int(w.kind[1:]) // count
    if bits < 16 or w.kind[0] != "b":
        raise w.unknown()
    return f"b{bits}"


def _split(w: Text, targets: tuple[Operand, ...], source: Operand) -> None:
    half = _pieces(w, len(targets))
    w.line(f"T = {w.array(source, w.kind)}")
    for k, target in enumerate(targets):
        shift = w.constant(w.immediate(Imm(k * int(half[1:])), w.kind))
        w.set(target, f"(T >> {shift}).astype({TYPES[half]})", half)


def _pack(w: Text, target: Operand, sources: tuple[Operand, ...]) -> None:
    half = _pieces(w, len(sources))
    parts = []
    for k, source in enumerate(sources):
        shift = w.constant(w.immediate(Imm(k * int(half[1:])), w.kind))
        parts.append(f"({w.array(source, half)}.astype({TYPES[w.kind]}) << {shift})")
    w.set(target, " | ".join(parts), w.kind)


@form("cvta[.to].{global,local}.u64", "cvta.param.u64")
def _cvta(w: Text) -> None:
    """Addresses of the spaces do not overlap here, so generic ones are the same numbers."""
    d, a = w.i.operands
    if isinstance(a, Sym):
        w.set(d, w.constant(w.immediate(Imm(w.variable(a.name)), "u64")), "u64")
    else:
        w.set(d, w.value(a, "u64"), "u64")


@form("selp.{b,u,s}{16,32,64}", "selp.f{32,64}")
def _selp(w: Text) -> None:
    d, a, b, p = w.i.operands
    x, y = w.values((a, b), w.kind)
    w.set(d, f"np.where({w.value(p, 'pred')}, {x}, {y})", w.kind)


@form(
    "setp.{eq,ne}[.{and,or,xor}].b{16,32,64}",
    "setp.{eq,ne,lt,le,gt,ge}[.{and,or,xor}].s{16,32,64}",
    "setp.{eq,ne,lt,le,gt,ge,lo,ls,hi,hs}[.{and,or,xor}].u{16,32,64}",
    "setp.{eq,ne,lt,le,gt,ge,equ,neu,ltu,leu,gtu,geu,num,nan}[.{and,or,xor}][.ftz].{f16,f32}",
    "setp.{eq,ne,lt,le,gt,ge,equ,neu,ltu,leu,gtu,geu,num,nan}[.{and,or,xor}].{bf16,f64}",
    "setp.{eq,ne,lt,le,gt,ge,equ,neu,ltu,leu,gtu,geu,num,nan}[.{and,or,xor}][.ftz].f16x2",
    "setp.{eq,ne,lt,le,gt,ge,equ,neu,ltu,leu,gtu,geu,num,nan}[.{and,or,xor}].bf16x2",
)
def _setp(w: Text) -> None:
    """``p|q`` is the comparison and its opposite, each joined with the third operand.

    Of pairs of halves p is the comparison of the lower ones, q of the upper ones.
    """
    d, a, b, *rest = w.i.operands
    if isinstance(d, Pair) and w.kind in ("f16", "bf16"):
        raise w.unknown("two results")
    results = [_comparison(w.parts[1], x, y, "f" in w.kind) for x, y in _compared(w, a, b)]
    targets = [(d, results[0])]
    if isinstance(d, Pair):
        targets = [(d.first, results[0]), (d.second, (results * 2)[1])]
        if len(results) == 1:
            targets[1] = d.second, f"~{results[0]}"
    elif len(results) == 2:
        raise w.unknown("one result")
    join = next((_JOIN[m] for m in w.parts[2:-1] if m in _JOIN), None)
    if (join is None) == bool(rest):
        raise w.unknown()
    for k, (_, expression) in enumerate(targets):
        joined = f"({expression} {join} {w.value(rest[0], 'pred')})" if join else expression
        w.line(f"T{k} = {joined}")
    for k, (target, _) in enumerate(targets):
        w.set(target, f"T{k}", "pred")


def _compared(w: Text, a: Operand, b: Operand) -> list[tuple[str, str]]:
    """What is compared: of pairs the lower halves, then the upper ones."""
    if w.kind.startswith("bf16"):
        reads = [f"from_bf16({h})" for o in (a, b) for h in _halves(w, o)]
    elif w.kind == "f16x2":
        reads = [f"{h}.view(f16)" for o in (a, b) for h in _halves(w, o)]
    else:
        reads = [w.array(a, w.kind), w.value(b, w.kind)]
    if "ftz" in w.parts:
        reads = [f"flush({read})" for read in reads]
    half = len(reads) // 2
    return list(zip(reads[:half], reads[half:], strict=True))


def _halves(w: Text, operand: Operand) -> list[str]:
    """The bits of a half, or of both of a pair."""
    if not w.kind.endswith("x2"):
        return [w.array(operand, "b16")]
    both = w.array(operand, "b32")
    return [f"{both}.astype(u16)", f"({both} >> {w.constant(np.uint32(16))}).astype(u16)"]


def _comparison(name: str, x: str, y: str, is_float: bool) -> str:
    """NaN: comparisons are false, those that end in u are true."""
    ordered = f"(({x} == {x}) & ({y} == {y}))"
    if name == "num":
        return ordered
    if name == "nan":
        return f"(~{ordered})"
    if is_float and name.endswith("u"):
        return f"(({x} {_COMPARE[name[:2]]} {y}) | ~{ordered})"
    if is_float and name == "ne":
        return f"(({x} != {y}) & {ordered})"
    return f"({x} {_COMPARE[name]} {y})"


@form("cvt.{u,s}{8,16,32,64}.{u,s}{8,16,32,64}")
def _cvt_integer(w: Text) -> None:
    to, source = w.parts[1:]
    w.set(w.i.operands[0], f"{w.value(w.i.operands[1], source)}.astype({TYPES[to]})", to)


@form("cvt.rn.{f16,f32,f64}.{u,s}{8,16,32,64}", "cvt.rn.bf16.{u,s}{16,32}")
def _cvt_from_integer(w: Text) -> None:
    to, source = w.parts[2:]
    x = w.array(w.i.operands[1], source)
    if to == "bf16":
        w.set(w.i.operands[0], f"wide_to_bf16({x}.astype(f64))", "b16")
    else:
        w.set(w.i.operands[0], f"{x}.astype({TYPES[to]})", to)


@form(
    "cvt.{rni,rzi,rmi,rpi}[.ftz].{u,s}{8,16,32,64}.f32",
    "cvt.{rni,rzi,rmi,rpi}.{u,s}{8,16,32,64}.{f16,f64}",
    "cvt.{rni,rzi,rmi,rpi}.{u,s}{16,32,64}.bf16",
)
def _cvt_to_integer(w: Text) -> None:
    to, source = w.parts[-2:]
    x = _float(w, source)
    w.set(w.i.operands[0], f"to_int({_WHOLE[w.parts[1]]}({x}), {TYPES[to]})", to)


def _float(w: Text, source: str) -> str:
    """The operand as an array of numpy floats."""
    a = w.i.operands[1]
    x = f"from_bf16({w.array(a, 'b16')})" if source == "bf16" else w.array(a, source)
    return f"flush({x})" if "ftz" in w.parts and source == "f32" else x


@form(
    "cvt[.ftz].f32.{f16,bf16}",
    "cvt[.ftz].f64.f32",
    "cvt.f64.{f16,bf16}",
    "cvt.rn[.ftz].f32.f64",
    "cvt.rn.{f16,bf16}.f64",
    "cvt.{rni,rzi,rmi,rpi}[.ftz].f32.f32",
    "cvt.{rni,rzi,rmi,rpi}.{f16.f16,f64.f64}",
)
def _cvt_float(w: Text) -> None:
    to, source = w.parts[-2:]
    x = _float(w, source)
    if to == "bf16":
        w.set(w.i.operands[0], f"wide_to_bf16({x})", "b16")
        return
    if to == source:
        x = f"{_WHOLE[w.parts[1]]}({x})"
    elif "ftz" in w.parts and to == "f32":
        x = f"flush({x}.astype(f32))"
    w.set(w.i.operands[0], f"{x}.astype({TYPES[to]})", to)


@form("cvt.{rn,rz}[.relu].{bf16,f16}.f32", "cvt.rn.ftz.f16.f32")
def _cvt_half(w: Text) -> None:
    w.set(w.i.operands[0], _rounded(w, w.parts[-2], w.i.operands[1]), "b16")


@form("cvt.{rn,rz}[.relu].{bf16x2,f16x2}.f32")
def _cvt_halves(w: Text) -> None:
    """The first source becomes the upper half."""
    d, high, low = w.i.operands
    to = w.parts[-2].removesuffix("x2")
    w.set(d, f"pack({_rounded(w, to, low)}, {_rounded(w, to, high)})", "b32")


def _rounded(w: Text, to: str, source: Operand) -> str:
    x = w.array(source, "f32")
    if "ftz" in w.parts:
        x = f"flush({x})"
    if "relu" in w.parts:
        x = f"relu({x})"
    return f"to_{to}{'_rz' if 'rz' in w.parts else ''}({x})"


@form("cvt.rn.satfinite[.relu].{e4m3x2,e5m2x2}.{f32,f16x2}")
def _cvt_fp8(w: Text) -> None:
    """Two floats, of which the first is the upper one, or a pair."""
    d, *sources = w.i.operands
    if w.kind == "f32":
        high, low = (w.array(source, "f32") for source in sources)
    else:
        (source,) = sources
        both = w.array(source, "b32")
        low = f"{both}.astype(u16).view(f16)"
        high = f"({both} >> {w.constant(np.uint32(16))}).astype(u16).view(f16)"
    if "relu" in w.parts:
        low, high = f"relu({low})", f"relu({high})"
    kind = w.parts[-2].removesuffix("x2")
    w.set(d, f"fp8_pair({low}, {high}, {kind!r})", "b16")


@form("cvt.rn[.relu].f16x2.{e4m3x2,e5m2x2}")
def _cvt_from_fp8(w: Text) -> None:
    kind = w.kind.removesuffix("x2")
    expression = f"halves_of_fp8({w.array(w.i.operands[1], 'b16')}, {kind!r}, {'relu' in w.parts})"
    w.set(w.i.operands[0], expression, "b32")


@form("cvt.{rn,rna,rz}.tf32.f32")
def _cvt_tf32(w: Text) -> None:
    w.set(w.i.operands[0], f"to_tf32_{w.parts[1]}({w.array(w.i.operands[1], 'f32')})", "b32")
