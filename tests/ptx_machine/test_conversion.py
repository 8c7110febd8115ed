"""Every form of moves, selections, comparisons and conversions."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from ptx_machine import UnknownInstructionError
from ptx_machine.translate import FORMS
from tests.ptx_machine.exact import (
    FORMATS,
    bits_of,
    flushed,
    is_nan,
    number,
    rounded,
    signed,
    wrap,
)
from tests.ptx_machine.samples import floats, integers, pairs
from tests.ptx_machine.sheet import THREADS, Sheet


def forms(base):
    return [op for op in FORMS if op.partition(".")[0] == base]


def flags():
    return [v & 1 for v in integers(16)]


def values_of(kind):
    return floats(kind) if kind in FORMATS else integers(bits_of(kind))


# Moves


def test_mov():
    sheet, cases = Sheet(), []
    for op in forms("mov"):
        kind = op.partition(".")[2]
        bits = 1 if kind == "pred" else int(kind[1:])
        values = flags() if bits == 1 else integers(bits)
        sheet.add(op, [(f"b{bits}", values)], [f"b{bits}"])
        cases.append((op, values))
    for (op, values), (results,) in zip(cases, sheet.run(forms("mov")), strict=True):
        assert results == values, op


@pytest.mark.parametrize("whole, parts", [(32, 2), (64, 2), (64, 4)])
def test_mov_takes_apart_and_puts_together(whole, parts):
    """The first item of a vector is the lowest."""
    bits, values = whole // parts, integers(whole)
    sheet = Sheet()
    a = sheet.load(whole, values)
    pieces = [sheet.register(bits) for _ in range(parts)]
    sheet.line(f"mov.b{whole} {{{', '.join(pieces)}}}, {a};")
    sheet.keep(*((p, bits) for p in pieces))
    back = sheet.register(whole)
    sheet.line(f"mov.b{whole} {back}, {{{', '.join(pieces)}}};")
    sheet.keep((back, whole))
    taken, (together,) = sheet.run()
    assert together == values
    for k, piece in enumerate(taken):
        assert piece == [v >> k * bits & ((1 << bits) - 1) for v in values]


def test_mov_of_special_registers():
    sheet = Sheet()
    names = ["%tid.x", "%tid.y", "%ntid.x", "%laneid", "%warpid", "%ctaid.x", "%nctaid.z"]
    for name in names:
        sheet.add("mov.u32", [name], ["b32"])
    sheet.add("mov.b32", ["0f40490FDB"], ["b32"])
    sheet.add("mov.u64", ["-2"], ["b64"])
    *special, (pi,), (negative,) = sheet.run()
    threads = range(THREADS)
    want = [threads, [0] * THREADS, [THREADS] * THREADS, [t % 32 for t in threads],
            [t // 32 for t in threads], [0] * THREADS, [1] * THREADS]  # fmt: skip
    assert [got for (got,) in special] == [list(w) for w in want]
    assert set(pi) == {0x40490FDB} and set(negative) == {2**64 - 2}


def test_cvta():
    """Generic addresses are the same numbers: they can be used in their own space."""
    sheet = Sheet()
    for op in forms("cvta"):
        values = integers(64)
        sheet.add(op, [("b64", values)], ["b64"])
        (results,) = sheet.run([op])[-1]
        assert results == values


def test_selp():
    sheet, cases = Sheet(), []
    for op in forms("selp"):
        bits = int(op.partition(".")[2][1:])
        a, b, p = integers(bits), integers(bits), flags()
        sheet.add(op, [(f"b{bits}", a), (f"b{bits}", b), ("b1", p)], [f"b{bits}"])
        cases.append((op, a, b, p))
    for (op, a, b, p), (results,) in zip(cases, sheet.run(forms("selp")), strict=True):
        assert results == [x if c else y for x, y, c in zip(a, b, p, strict=True)], op


# Comparisons


def compared(name, kind, x, y, ftz):
    """The ISA: with NaN, comparisons are false; with a u at the end, true."""
    if ftz:
        x, y = flushed(x, kind), flushed(y, kind)
    x, y = number(x, kind), number(y, kind)
    unordered = kind in FORMATS and (math.isnan(x) or math.isnan(y))
    if name in ("num", "nan"):
        return unordered == (name == "nan")
    if unordered:
        return name.endswith("u")
    name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)[:2]
    return {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}[name]


@pytest.mark.parametrize("pair", [False, True], ids=["one result", "both"])
def test_setp(pair):
    sheet, cases = Sheet(), []
    for op in forms("setp"):
        if not pair and op.count(".") > 2:
            continue  # the form with both results runs them all
        kind = op.rpartition(".")[2]
        if kind.endswith("x2"):
            continue
        bits = bits_of(kind)
        a, b, c = values_of(kind), values_of(kind), flags()
        b[::4] = a[::4]
        joined = next((j for j in ("and", "or", "xor") if f".{j}." in op), None)
        inputs = [(f"b{bits}", a), (f"b{bits}", b)] + ([("b1", c)] if joined else [])
        read = ", ".join(sheet.load(int(k[1:]), v) for k, v in inputs)
        p, q = sheet.register(1), sheet.register(1)
        both = pair and kind not in ("f16", "bf16")  # of these there is one result
        sheet.line(f"{op} {p}|{q}, {read};" if both else f"{op} {p}, {read};")
        sheet.keep((p, 1), *([(q, 1)] if both else []))
        cases.append((op, kind, a, b, c, joined))
    found = sheet.run([op for op in forms("setp") if not op.endswith("x2")] if pair else ())
    for (op, kind, a, b, c, joined), results in zip(cases, found, strict=True):
        name, ftz = op.split(".")[1], ".ftz" in op
        for k, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
            result = compared(name, kind, x, y, ftz)
            for got, want in zip(results, (result, not result), strict=False):
                if joined:
                    want = {"and": want and z, "or": want or z, "xor": want != z}[joined]
                assert got[k] == want, (op, x, y, z)


def test_setp_of_pairs():
    """The first result is that of the lower halves, the second that of the upper ones."""
    sheet, cases = Sheet(), []
    ops = [op for op in forms("setp") if op.endswith("x2")]
    for op in ops:
        a, b, c = pairs(kind := op.rpartition(".")[2][:-2]), pairs(kind), flags()
        b[::4] = a[::4]
        joined = next((j for j in ("and", "or", "xor") if f".{j}." in op), None)
        inputs = [("b32", a), ("b32", b)] + ([("b1", c)] if joined else [])
        read = ", ".join(sheet.load(int(k[1:]), v) for k, v in inputs)
        p, q = sheet.register(1), sheet.register(1)
        sheet.line(f"{op} {p}|{q}, {read};")
        sheet.keep((p, 1), (q, 1))
        cases.append((op, kind, a, b, c, joined))
    for (op, kind, a, b, c, joined), results in zip(cases, sheet.run(ops), strict=True):
        name, ftz = op.split(".")[1], ".ftz" in op
        for k, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
            for shift, got in zip((0, 16), results, strict=True):
                want = compared(name, kind, x >> shift & 0xFFFF, y >> shift & 0xFFFF, ftz)
                if joined:
                    want = {"and": want and z, "or": want or z, "xor": want != z}[joined]
                assert got[k] == want, (op, x, y, z)
    single = Sheet()
    single.line("setp.eq.f16x2 %p1, %r1, %r1;")
    with pytest.raises(UnknownInstructionError, match="one result: setp"):
        single.run()


# Conversions

INTEGERS = [f"{sign}{bits}" for sign in "us" for bits in (8, 16, 32, 64)]
EIGHT = {"e4m3x2": torch.float8_e4m3fn, "e5m2x2": torch.float8_e5m2}
WHOLE = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def register_bits(kind):
    return max(16, bits_of(kind))


def cvt_results(ops):
    """(form, modifiers, target, source, value, result) of all threads."""
    sheet, cases = Sheet(), []
    for op in ops:
        *mods, to, source = op.split(".")[1:]
        values = values_of(source)
        if source in FORMATS and to in INTEGERS:
            values[::2] = scaled_to(source, bits_of(to))[::2]
        size, out = (32 if k == "tf32" else register_bits(k) for k in (source, to))
        sheet.add(op, [(f"b{size}", values)], [f"b{out}"])
        cases.append((op, mods, to, source, values))
    for (op, mods, to, source, values), (results,) in zip(cases, sheet.run(ops), strict=True):
        for value, got in zip(values, results, strict=True):
            yield op, mods, to, source, value, got


def scaled_to(kind, bits):
    """Floats about as large as integers of so many bits, halves among them."""
    mantissa = FORMATS[kind][1]
    values = [v for v in integers(min(bits + 1, mantissa + 1))]
    made = [rounded(Fraction(v * (-1) ** k, 2), kind) for k, v in enumerate(values)]
    limits = [(1 << n) + d for n in (bits - 1, bits) for d in (-1, 0, 1)]
    made[: 2 * len(limits)] = [rounded(Fraction(s * x), kind) for x in limits for s in (1, -1)]
    return made


def is_integer(kind):
    return kind in INTEGERS


def ops_between(to, source):
    chosen = []
    for op in forms("cvt"):
        *_, t, s = op.split(".")
        if (
            not t.endswith("x2")
            and not s.endswith("x2")
            and (is_integer(t), is_integer(s)) == (to, source)
        ):
            chosen.append(op)
    return chosen


FP8 = [op for op in forms("cvt") if "e4m3x2" in op or "e5m2x2" in op]
PAIRS = [op for op in forms("cvt") if op.split(".")[-2].endswith("x2") and op not in FP8]
TESTED = [op for base in ("mov", "cvta", "selp", "setp") for op in forms(base)] + PAIRS + FP8
for ways in itertools.product((True, False), repeat=2):
    TESTED += ops_between(*ways)


def test_comparisons_of_halves_have_one_result():
    sheet = Sheet()
    sheet.line("setp.eq.f16 %p1|%p2, %h1, %h1;")
    with pytest.raises(UnknownInstructionError, match="two results: setp"):
        sheet.run()


def test_cvt_between_integers():
    ops = ops_between(True, True)
    assert len(ops) == len(list(itertools.product(INTEGERS, INTEGERS)))
    for op, _, to, source, value, got in cvt_results(ops):
        held = number(wrap(value, bits_of(source)), source)
        want = number(wrap(held, bits_of(to)), to)
        assert got == wrap(want, register_bits(to)), (op, value)


def test_cvt_from_integers():
    for op, _, to, source, value, got in cvt_results(ops_between(False, True)):
        held = number(wrap(value, bits_of(source)), source)
        assert got == rounded(Fraction(held), to), (op, value)


def test_cvt_to_integers():
    """Saturating; NaN becomes 0."""
    for op, mods, to, source, value, got in cvt_results(ops_between(True, False)):
        x = number(flushed(value, source) if "ftz" in mods else value, source)
        bits = bits_of(to)
        low, high = (
            (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
        )
        if math.isnan(x):
            want = 0
        elif math.isinf(x):
            want = high if x > 0 else low
        else:
            want = min(max(WHOLE[mods[0]](Fraction(x)), low), high)
        assert signed(got, register_bits(to)) == want or got == want, (op, value, x, got)


def test_cvt_between_floats():
    for op, mods, to, source, value, got in cvt_results(ops_between(False, False)):
        x = number(flushed(value, source) if "ftz" in mods and source == "f32" else value, source)
        if mods and mods[0] in WHOLE and math.isfinite(x):
            whole = WHOLE[mods[0]](Fraction(x))
            want = rounded(Fraction(whole), to, negative_zero=math.copysign(1, x) < 0)
        else:
            mode = next((m for m in mods if m in ("rz", "rna")), "rn")
            if "relu" in mods and x <= 0:
                x = 0.0
            want = rounded(
                x if not math.isfinite(x) else Fraction(x),
                to,
                mode,
                x == 0 and math.copysign(1, x) < 0,
            )
        if "ftz" in mods and to == "f32" and want is not None:
            want = flushed(want, to)
        check_float(op, to, want, value, got)


def check_float(op, to, want, value, got):
    if to == "tf32":  # the upper 19 bits of 32
        assert want is None or not got & 0x1FFF
        got >>= 13
    if want is None:
        assert is_nan(got, to), (op, value, got)
    else:
        assert got == want, (op, hex(value), hex(got), hex(want))


def test_cvt_to_pairs():
    """The first source is the upper half."""
    sheet, cases = Sheet(), []
    for op in PAIRS:
        a, b = floats("f32"), floats("f32")
        sheet.add(op, [("b32", a), ("b32", b)], ["b32"])
        cases.append((op, a, b))
    assert len(cases) == 8
    for (op, a, b), (results,) in zip(cases, sheet.run(PAIRS), strict=True):
        *mods, pair, _ = op.split(".")[1:]
        to = pair.removesuffix("x2")
        for *halves, got in zip(a, b, results, strict=True):
            for value, half in zip(halves, (got >> 16, got & 0xFFFF), strict=True):
                x = number(value, "f32")
                if "relu" in mods and x <= 0:
                    x = 0.0
                check_float(op, to, rounded(x, to, mods[0]), value, half)


def test_cvt_of_8_bits():
    """Against torch, which does not saturate; NaN has the bits that the ISA gives it."""
    sheet, cases = Sheet(), []
    for op in FP8:
        source = op.rpartition(".")[2]
        if source == "f32":
            given = [floats("f32"), floats("f32", near=16)]
        elif source == "f16x2":
            given = [pairs("f16")]
        else:
            given = [integers(16)]
        bits = 16 if source.startswith("e") else 32
        sheet.add(op, [(f"b{bits}", v) for v in given], [f"b{48 - bits}"])
        cases.append((op, given))
    for (op, given), (results,) in zip(cases, sheet.run(FP8), strict=True):
        *mods, to, source = op.split(".")[1:]
        if source == "f32":
            numbers = torch.tensor(list(zip(*given[::-1], strict=True))).to(torch.uint32)
            numbers = numbers.view(torch.float32)
        else:
            width = torch.uint32 if source == "f16x2" else torch.uint16
            numbers = torch.tensor(given).to(width).view(EIGHT.get(source, torch.float16))
        numbers = numbers.double().reshape(THREADS, 2)
        if "relu" in mods:
            numbers = torch.where(numbers <= 0, 0.0, numbers)
        kind = EIGHT.get(to, torch.float16)
        if to in EIGHT:
            limit = torch.finfo(kind).max
            numbers = numbers.clamp(-limit, limit)
        want = numbers.float().to(kind).view(torch.uint8 if to in EIGHT else torch.uint16).long()
        want[numbers.isnan()] = 0x7F if to in EIGHT else 0x7FFF
        step = 8 if to in EIGHT else 16
        assert results == [low | high << step for low, high in want.tolist()], op
