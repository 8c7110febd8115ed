"""Arithmetic on integers and floats. PTX ISA 9.7.1 to 9.7.5."""

from __future__ import annotations

from ..syntax import Imm
from .forms import form
from .text import TYPES, Text

_HALVES = ("f16", "bf16", "f16x2", "bf16x2")


def _half(w: Text, name: str) -> None:
    """An operation on 16-bit floats or pairs of them."""
    d, *operands = w.i.operands
    bits = "b32" if w.kind.endswith("x2") else "b16"
    read = ", ".join(w.array(operand, bits) for operand in operands)
    w.set(d, f"half_op({name!r}, {w.kind!r}, {'ftz' in w.parts}, {read})", bits)


def _float(w: Text, expression: str) -> None:
    """``{0}``, ``{1}``, ... are the operands; .ftz flushes them and the result."""
    d, *operands = w.i.operands
    read = w.values(tuple(operands), w.kind)
    if "ftz" in w.parts:
        read = [f"flush({x})" for x in read]
        expression = f"flush({expression})"
    w.set(d, expression.format(*read), w.kind)


def _binary(w: Text, name: str, symbol: str) -> None:
    if w.kind in _HALVES:
        _half(w, name)
    else:
        _float(w, f"{{0}} {symbol} {{1}}")


@form("add.{u,s}{16,32,64}", "add[.rn][.ftz].{f32,f16,f16x2}", "add[.rn].{f64,bf16,bf16x2}")
def _add(w: Text) -> None:
    _binary(w, "add", "+")


@form("sub.{u,s}{16,32,64}", "sub[.rn][.ftz].{f32,f16,f16x2}", "sub[.rn].{f64,bf16,bf16x2}")
def _sub(w: Text) -> None:
    _binary(w, "sub", "-")


@form("mul.lo.{u,s}{16,32,64}", "mul[.rn][.ftz].{f32,f16,f16x2}", "mul[.rn].{f64,bf16,bf16x2}")
def _mul(w: Text) -> None:
    _binary(w, "mul", "*")


@form("mul.hi.{u,s}{16,32,64}")
def _mul_hi(w: Text) -> None:
    w.set(w.i.operands[0], f"high_product({w.arrays(w.i.operands[1:], w.kind)})", w.kind)


def _wide_product(w: Text) -> tuple[str, str]:
    """The expression and its type, twice as wide as the factors."""
    a, b = w.values(w.i.operands[1:3], w.kind)
    wide = f"{w.kind[0]}{2 * int(w.kind[1:])}"
    return f"{a}.astype({TYPES[wide]}) * {b}", wide


@form("mul.wide.{u,s}{16,32}")
def _mul_wide(w: Text) -> None:
    expression, wide = _wide_product(w)
    w.set(w.i.operands[0], expression, wide)


@form("mad.lo.{u,s}{16,32,64}")
def _mad(w: Text) -> None:
    a, b, c = w.values(w.i.operands[1:], w.kind)
    w.set(w.i.operands[0], f"{a} * {b} + {c}", w.kind)


@form("mad.wide.{u,s}{16,32}")
def _mad_wide(w: Text) -> None:
    expression, wide = _wide_product(w)
    w.set(w.i.operands[0], f"{expression} + {w.value(w.i.operands[3], wide)}", wide)


@form(
    "add.cc.{u,s}32",
    "addc[.cc].{u,s}32",
    "mad.{lo,hi}.cc.{u,s}32",
    "madc.{lo,hi}[.cc].{u,s}32",
)
def _carry(w: Text) -> None:
    """Sums of 64 bits: the upper half is the carry flag ``CC``, which lives within a block."""
    w.refuse_guard()
    d, a, b, *c = w.i.operands
    terms = [f"{w.array(a, 'u32')}.astype(u64)", f"{w.array(b, 'u32')}.astype(u64)"]
    if w.i.base.startswith("mad"):
        kind = f"{w.kind[0]}32"
        product = f"{w.array(a, kind)} * {w.array(b, kind)}"
        if "hi" in w.parts:
            product = f"high_product({w.array(a, kind)}, {w.array(b, kind)})"
        terms = [f"({product}).view(u32).astype(u64)", f"{w.array(c[0], 'u32')}.astype(u64)"]
    if w.i.base.endswith("c"):
        if not w.carry:
            raise w.unknown("the carry comes from another block")
        terms.append("CC")
    w.line(f"T = {' + '.join(terms)}")
    if "cc" in w.parts:
        w.line("CC = T >> u64(32)")
        w.carry = True
    w.set(d, "T.astype(u32)", "u32")


@form("fma.rn[.ftz].{f32,f16,f16x2}", "fma.rn.{f64,bf16,bf16x2}")
def _fma(w: Text) -> None:
    if w.kind in _HALVES:
        _half(w, "fma")
    else:
        _float(w, f"fma{64 if w.kind == 'f64' else ''}({{0}}, {{1}}, {{2}})")


@form("div.{full,approx,rn}[.ftz].f32", "div.rn.f64")
def _div_float(w: Text) -> None:
    _float(w, "{0} / {1}")


@form("div.{u,s}{16,32,64}")
def _div(w: Text) -> None:
    w.set(w.i.operands[0], f"divide({w.arrays(w.i.operands[1:], w.kind)})", w.kind)


@form("rem.{u,s}{16,32,64}")
def _rem(w: Text) -> None:
    w.set(w.i.operands[0], f"remainder({w.arrays(w.i.operands[1:], w.kind)})", w.kind)


@form(
    "{min,max}.{u,s}{16,32,64}",
    "{min,max}[.ftz][.NaN].{f32,f16,f16x2}",
    "{min,max}[.NaN].{bf16,bf16x2}",
    "{min,max}.f64",
)
def _minmax(w: Text) -> None:
    strict = w.kind[0] in "us" or "NaN" in w.parts
    name = w.i.base if not strict or w.kind not in _HALVES else f"{w.i.base}.NaN"
    if w.kind in _HALVES:
        _half(w, name)
    elif strict:
        _float(w, f"np.{w.i.base}imum({{0}}, {{1}})")
    else:
        _float(w, f"number_{w.i.base}({{0}}, {{1}})")


@form("neg.s{16,32,64}", "neg[.ftz].{f32,f16,f16x2}", "neg.{f64,bf16,bf16x2}")
def _neg(w: Text) -> None:
    if w.kind in _HALVES:
        _half(w, "neg")
    else:
        _float(w, "-{0}")


@form("abs.s{16,32,64}", "abs[.ftz].{f32,f16,f16x2}", "abs.{f64,bf16,bf16x2}")
def _abs(w: Text) -> None:
    if w.kind in _HALVES:
        _half(w, "abs")
    else:
        _float(w, "np.abs({0})")


@form("copysign.f{32,64}")
def _copysign(w: Text) -> None:
    """The sign of the first, the size of the second."""
    sign, size = w.i.operands[1:]
    w.set(w.i.operands[0], f"np.copysign({w.arrays((size, sign), w.kind)})", w.kind)


# Functions that the hardware approximates are exact to their type here.
_FUNCTIONS = {
    "ex2": "np.exp2({0})",
    "tanh": "np.tanh({0})",
    "lg2": "np.log2({0})",
    "sin": "np.sin({0})",
    "cos": "np.cos({0})",
    "sqrt": "np.sqrt({0})",
    "rsqrt": "1 / np.sqrt({0})",
    "rcp": "1 / {0}",
}


@form(
    "{ex2,lg2,sin,cos,rsqrt}.approx[.ftz].f32",
    "{sqrt,rcp}.{approx,rn}[.ftz].f32",
    "{sqrt,rcp}.rn.f64",
    "tanh.approx.{f32,f16,f16x2,bf16,bf16x2}",
    "ex2.approx.{f16,f16x2}",
    "ex2.approx.ftz.{bf16,bf16x2}",
)
def _function(w: Text) -> None:
    if w.kind in _HALVES:
        _half(w, w.i.base)
    elif isinstance(w.i.operands[1], Imm):
        raise w.unknown("of a constant")
    else:
        _float(w, _FUNCTIONS[w.i.base])
