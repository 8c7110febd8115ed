"""Loads, stores, atomics and asynchronous copies. PTX ISA 9.7.9 and 9.7.13."""

from __future__ import annotations

import numpy as np

from ..syntax import Mem, Operand, Reg, Sym, Vec
from .forms import form
from .text import TYPES, Text

_TYPE = ".{b8,b16,b32,b64,u8,u16,u32,u64,s8,s16,s32,s64,f32,f64}"
# Up to 128 bits.
_ANY = "[.{v2,v4}].{b8,b16,b32,u8,u16,u32,s8,s16,s32,f32}", "[.v2].{b64,u64,s64,f64}"
_BITS = "[.{v2,v4}].b{8,16,32}", "[.v2].b64"
_WIDE = ".v8.b32", ".v4.b64"  # 256 bits of global memory: sm_100
_L1 = ".L1::{evict_first,evict_last,no_allocate}"
_HINT = "[.L2::cache_hint]"
_ORDER = ".{cta,gpu,sys}.global.{b,u,s,f}{32,64}"


def _items(operand: Operand) -> list[Operand]:
    return list(operand.items) if isinstance(operand, Vec) else [operand]


def _vector(w: Text, operand: Operand) -> list[Operand]:
    """The registers of a load or store, as many as its vector has."""
    items = _items(operand)
    expected = next((int(p[1:]) for p in w.parts if p in ("v2", "v4", "v8")), 1)
    if len(items) != expected:
        raise w.unknown(f"{len(items)} registers")
    return items


def _space(w: Text) -> tuple[str, int]:
    """The state space, and the bits of its addresses."""
    names = {"global": 64, "shared": 32, "shared::cta": 32, "local": 32}
    space = next(p for p in w.parts if p in names)
    return space.removesuffix("::cta"), names[space]


def _check_width(w: Text, items: int) -> None:
    if items * int(w.kind[1:]) > 128 and w.kernel.chip < 100:
        raise w.unknown("256 bits before sm_100")


@form(
    *(f"ld[.volatile].{{global,shared,shared::cta}}{items}" for items in _ANY),
    *(f"ld.{{local,global.nc}}{items}" for items in _ANY),
    *(f"ld.global[.{{ca,cg}}]{_HINT}{items}" for items in (*_BITS, *_WIDE)),
    *(f"ld.global{_L1}{_HINT}{items}" for items in (*_BITS, *_WIDE)),
    f"ld.{{relaxed,acquire}}{_ORDER}",
)
def _ld(w: Text) -> None:
    targets = _vector(w, w.i.operands[0])
    _check_width(w, len(targets))
    space, bits = _space(w)
    address = w.address(w.i.operands[1], bits)
    width, numpy = int(w.kind[1:]) // 8, TYPES[w.kind]
    call = f"load_{space}(g, I[{w.i.index}], {address}, {width}, {len(targets)}, {w.guard()})"
    if numpy[0] != "u":
        call = f"[x.view({numpy}) for x in {call}]"
    w.set_many(targets, call, w.kind)


@form(f"ld.param{_TYPE}")
def _ld_param(w: Text) -> None:
    d, memory = w.i.operands
    if isinstance(memory, Mem) and isinstance(memory.base, Reg):  # one of several, chosen by selp
        call = f"g.param_at({w.address(memory, 64)}, {TYPES[w.kind]}, I[{w.i.index}], {w.guard()})"
        w.set(d, call, w.kind)
        return
    if not isinstance(memory, Mem) or not isinstance(memory.base, Sym):
        raise w.unknown()
    name = memory.base.name
    found = next((k for k, p in enumerate(w.kernel.params) if p.name == name), None)
    if found is None:
        raise w.unknown(f"no parameter {name}")
    w.varies = True
    w.set(d, f"g.param({found}, {memory.offset}, {TYPES[w.kind]})", w.kind)


@form(
    *(f"st[.volatile].{{global,shared,shared::cta}}{items}" for items in _ANY),
    *(f"st.local{items}" for items in _ANY),
    *(f"st.global[.{{wb,cg,cs,wt}}]{_HINT}{items}" for items in (*_BITS, *_WIDE)),
    *(f"st.global{_L1}{_HINT}{items}" for items in (*_BITS, *_WIDE)),
    f"st.{{relaxed,release}}{_ORDER}",
)
def _st(w: Text) -> None:
    memory, source = w.i.operands[:2]
    sources = tuple(_vector(w, source))
    _check_width(w, len(sources))
    space, bits = _space(w)
    data = w.arrays(sources, f"b{w.kind[1:]}")
    address, width = w.address(memory, bits), int(w.kind[1:]) // 8
    w.line(f"store_{space}(g, I[{w.i.index}], {address}, {width}, [{data}], {w.guard()})")


# A form of red or atom begins in the ISA's order, or as Triton writes it.
_PLACES = {
    base: (f"{base}[.{{{orders}}}][.{{cta,gpu,sys}}].global",
           f"{base}.global[.{{cta,gpu,sys}}][.{{{orders}}}]")
    for base, orders in (("red", "relaxed,release"), ("atom", "relaxed,acquire,release,acq_rel"))
}  # fmt: skip
_TRITON_CAS = "atom.global.{relaxed,acquire,release,acq_rel}.{cta,gpu,sys}"
_SHARED = "{base}[.relaxed.{{cta,gpu,sys}}].shared[::cta]"
_ATOMICS = (
    ".add.{u32,s32,u64,f32,f64}",
    ".add.{v2,v4}.f32",
    ".add.noftz.{f16,bf16,f16x2,bf16x2}",
    ".add.noftz.{v2,v4}.{f16x2,bf16x2}",
    ".{min,max}.{u,s}{32,64}",
    ".{and,or,xor}.b{32,64}",
)


_SHARED_ATOMICS = (
    ".add.{u32,s32,u64,f32,f64}",
    ".{min,max}.{u,s}{32,64}",
    ".{and,or,xor}.b{32,64}",
)


def _atomic_call(w: Text, name: str, memory: Operand, data: str, compare: str, result: bool) -> str:
    shared = "shared" in w.i.op
    address = w.address(memory, 32 if shared else 64)
    return (
        f"{'atomic_shared' if shared else 'atomic'}(g, I[{w.i.index}], {name!r}, {address}, "
        f"{w.kind!r}, [{data}], {compare}, {w.guard()}, {result})"
    )


@form(
    *(f"{place}{what}" for base in _PLACES for place in _PLACES[base] for what in _ATOMICS),
    *(f"{place}.exch.b{{32,64}}" for place in _PLACES["atom"]),
    *(_SHARED.format(base=base) + what for base in _PLACES for what in _SHARED_ATOMICS),
    _SHARED.format(base="atom") + ".exch.b{32,64}",
)
def _atomic(w: Text) -> None:
    operands = list(w.i.operands)
    targets = _vector(w, operands.pop(0)) if w.i.base == "atom" else []
    memory, source = operands[:2]
    if targets and all(not isinstance(t, Reg) for t in targets):
        targets = []  # thrown away
    kind = w.kind
    bits = {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}.get(kind, kind)
    data = w.arrays(tuple(_vector(w, source)), bits)
    name = next(p for p in w.parts if p in ("add", "min", "max", "and", "or", "xor", "exch"))
    _keep(w, targets, _atomic_call(w, name, memory, data, "None", bool(targets)), bits)


@form(
    *(f"{place}.cas.b{{16,32,64}}" for place in (*_PLACES["atom"], _TRITON_CAS)),
    _SHARED.format(base="atom") + ".cas.b{32,64}",
)
def _cas(w: Text) -> None:
    d, memory, compare, new = w.i.operands[:4]
    data, old = w.array(new, w.kind), w.array(compare, w.kind)
    _keep(w, [d], _atomic_call(w, "cas", memory, data, old, True), w.kind)


def _keep(w: Text, targets: list[Operand], call: str, kind: str) -> None:
    if targets:
        w.set_many(targets, call, kind)
    else:
        w.line(call)


@form("createpolicy.fractional.L2::{evict_first,evict_last,evict_normal,evict_unchanged}.b64")
def _createpolicy(w: Text) -> None:
    """A hint to the L2: any number will do."""
    w.set(w.i.operands[0], w.constant(np.uint64(0)), "u64")


@form("cp.async.{ca,cg}.shared[::cta].global[.L2::cache_hint][.L2::{64B,128B,256B}]")
def _copy(w: Text) -> None:
    """``[to], [from], size{, bytes to read: the rest is zero}{, cache policy}``."""
    target, source, size, *rest = w.i.operands
    if w.number(size) not in ((16,) if "cg" in w.parts else (4, 8, 16)):
        raise w.unknown("a size that there is not")
    if rest and "L2::cache_hint" in w.parts:
        rest.pop()
    read = w.array(rest[0], "u32") if rest else "None"
    to, start = w.address(target, 32), w.address(source, 64)
    w.line(f"copy_async(g, I[{w.i.index}], {to}, {start}, {w.number(size)}, {read}, {w.guard()})")


@form("cp.async.commit_group")
def _commit(w: Text) -> None:
    w.refuse_guard()
    w.line("async_commit(g)")


@form("cp.async.wait_group")
def _wait(w: Text) -> None:
    w.refuse_guard()
    w.line(f"async_wait(g, {w.number(w.i.operands[0])})")


@form("cp.async.wait_all")
def _wait_all(w: Text) -> None:
    w.refuse_guard()
    w.line("async_wait_all(g)")
