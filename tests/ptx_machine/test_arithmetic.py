"""Every form of integer and float arithmetic against Python's integers and fractions."""

import math

import pytest

from ptx_machine import UnknownInstructionError
from ptx_machine.translate import FORMS
from tests.ptx_machine.exact import (
    bits_of,
    combine,
    distance,
    flushed,
    is_nan,
    number,
    rounded,
    wrap,
)
from tests.ptx_machine.samples import floats, integers, pairs
from tests.ptx_machine.sheet import Sheet

BASES = (
    "addc", "madc", "add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "neg", "abs",
    "ex2", "lg2", "sin", "cos", "tanh", "sqrt", "rsqrt", "rcp", "copysign",
)  # fmt: skip
OPERANDS = {
    "fma": 3,
    "mad": 3,
    "add": 2,
    "sub": 2,
    "mul": 2,
    "div": 2,
    "rem": 2,
    "min": 2,
    "max": 2,
    "copysign": 2,
}
FUNCTIONS = {
    "ex2": lambda x: 2.0**x,
    "lg2": lambda x: math.log2(x) if x > 0 else (-math.inf if x == 0 else math.nan),
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
    "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan,
    "rsqrt": lambda x: combine("div", 1.0, FUNCTIONS["sqrt"](x)),
    "rcp": lambda x: combine("div", 1.0, x),
}


def integer_result(op, *x):
    """The result of an integer instruction as an integer of any size."""
    base, mode, bits = op.split(".")[0], op.split(".")[1], int(op.rpartition(".")[2][1:])
    if base in ("mul", "mad"):
        product = x[0] * x[1]
        if mode == "hi":
            return product >> bits
        return product + (x[2] if base == "mad" else 0)
    if base in ("div", "rem"):
        if x[1] == 0:
            return -1 if base == "div" else x[0]
        quotient = abs(x[0]) // abs(x[1]) * (1 if (x[0] < 0) == (x[1] < 0) else -1)
        return quotient if base == "div" else x[0] - quotient * x[1]
    return {
        "add": lambda: x[0] + x[1],
        "sub": lambda: x[0] - x[1],
        "min": lambda: min(x),
        "max": lambda: max(x),
        "neg": lambda: -x[0],
        "abs": lambda: abs(x[0]),
    }[base]()


def float_result(op, *bits):
    """Bits of the result of a float instruction, None for NaN."""
    parts = op.split(".")
    base, kind, flush = parts[0], parts[-1], "ftz" in parts
    if flush:
        bits = [flushed(b, kind) for b in bits]
    x = [number(b, kind) for b in bits]
    if base in ("min", "max"):
        result = smallest(base, "NaN" in parts, x)
    elif base == "copysign":
        result = math.copysign(x[1], x[0])
    elif base in ("neg", "abs"):
        result = -x[0] if base == "neg" else abs(x[0])
    elif base in FUNCTIONS:
        result = function(base, x[0])
    else:
        result = combine(base, *x)
    made = rounded(result, kind)
    return made if made is None or not flush else flushed(made, kind)


def smallest(base, strict, x):
    numbers = [v for v in x if not math.isnan(v)]
    if not numbers or (strict and len(numbers) < len(x)):
        return math.nan
    return min(numbers) if base == "min" else max(numbers)


def function(base, x):
    if math.isnan(x) or (math.isinf(x) and base in ("sin", "cos")):
        return math.nan
    if math.isinf(x):
        return {
            "ex2": 0.0 if x < 0 else x, "tanh": math.copysign(1, x), "rcp": math.copysign(0, x),
        }.get(base, x if x > 0 and base != "rsqrt" else 0.0 if x > 0 else math.nan)  # fmt: skip
    try:
        return FUNCTIONS[base](x)
    except OverflowError:
        return math.inf


def halves_result(op, *words):
    """Both halves of the result of an instruction on pairs."""
    one = op.removesuffix("x2")
    return [float_result(one, *(w >> shift & 0xFFFF for w in words)) for shift in (0, 16)]


def assert_close(op, got, want, kind):
    """Equal; functions that the hardware approximates may be a step off."""
    base = op.partition(".")[0]
    if want is None:
        assert is_nan(got, kind), f"{op}: {got:#x} is no NaN"
        return
    if base in ("min", "max") and number(want, kind) == 0:
        assert number(got, kind) == 0, op
        return
    allowed = 1 if base in FUNCTIONS and base != "rcp" else 0
    assert distance(got, want, kind) <= allowed, f"{op}: {got:#x}, expected {want:#x}"


def forms(*bases):
    return [op for op in FORMS if op.partition(".")[0] in bases]


def check_integers(op, inputs, results, kind):
    out = bits_of(kind) * (2 if "wide" in op else 1)
    for *x, got in zip(*inputs, results, strict=True):
        values = [number(v, kind) for v in x[:2]]
        values += [number(v, f"{kind[0]}{out}") for v in x[2:]]
        assert got == wrap(integer_result(op, *values), out), (op, x, got)


def check_floats(op, inputs, results, kind):
    for *x, got in zip(*inputs, results, strict=True):
        if kind.endswith("x2"):
            for half, want in enumerate(halves_result(op, *x)):
                assert_close(op, got >> 16 * half & 0xFFFF, want, kind.removesuffix("x2"))
        else:
            assert_close(op, got, float_result(op, *x), kind)


def inputs_of(op, kind):
    """Values of each operand."""
    count = OPERANDS.get(op.partition(".")[0], 1)
    if kind.endswith("x2"):
        return 32, [pairs(kind.removesuffix("x2")) for _ in range(count)]
    if kind[0] in "us":
        return bits_of(kind), [integers(bits_of(kind)) for _ in range(count)]
    near = 2 if count == 1 else 6
    return bits_of(kind), [floats(kind, near=near) for _ in range(count)]


FIRST = ("add.cc", "mad.lo.cc", "mad.hi.cc")
SECOND = [op for op in FORMS if op.startswith(("addc", "madc"))]
PLAIN = [op for op in forms(*BASES) if op not in SECOND and ".cc." not in op]
TESTED = [*(f"{op}.{kind}" for op in FIRST for kind in ("u32", "s32")), *SECOND, *PLAIN]


@pytest.mark.parametrize("first", FIRST)
def test_carries(first):
    """Two words and a third: sums of more than 32 bits; products of signed words are signed."""
    for kind in ("u32", "s32"):
        sheet, cases = Sheet(), []
        second = [op for op in SECOND if op.endswith(kind)]
        for op in second:
            x = [integers(32) for _ in range(6)]
            names = [sheet.load(32, v) for v in x]
            low, high, top = (sheet.register(32) for _ in range(3))
            count = 2 if first == "add.cc" else 3
            sheet.line(f"{first}.{kind} {low}, {', '.join(names[:count])};")
            count = 2 if op.startswith("addc") else 3
            sheet.line(f"{op} {high}, {', '.join(names[3 : 3 + count])};")
            if ".cc" in op:
                sheet.line(f"addc.{kind} {top}, 0, 0;")
            sheet.keep((low, 32), (high, 32), *([(top, 32)] if ".cc" in op else []))
            cases.append((op, x))
        assert len(cases) == 6
        found = sheet.run([f"{first}.{kind}", *second])
        for (op, x), results in zip(cases, found, strict=True):
            for k in range(len(x[0])):
                low = carried(first, kind, *(v[k] for v in x[:3]), 0)
                high = carried(op, kind, *(v[k] for v in x[3:]), low >> 32)
                want = [low, high, high >> 32]
                assert [r[k] for r in results] == [wrap(v, 32) for v in want[: len(results)]], op


def carried(op, kind, a, b, c, carry):
    if not op.startswith("mad"):
        return a + b + carry
    product = number(a, kind) * number(b, kind) >> (32 if ".hi" in op else 0)
    return wrap(product, 32) + c + carry


def test_the_carry_must_be_set_before():
    sheet = Sheet()
    sheet.line("addc.u32 %r1, %r0, %r0;")
    with pytest.raises(UnknownInstructionError, match="carry comes from another block: addc"):
        sheet.run()


@pytest.mark.parametrize("base", [base for base in BASES if not base.endswith("c")])
def test_arithmetic(base):
    sheet, cases = Sheet(), []
    ops = [op for op in PLAIN if op.partition(".")[0] == base]
    for op in ops:
        kind = op.rpartition(".")[2]
        bits, inputs = inputs_of(op, kind)
        wide = 2 if "wide" in op else 1
        if wide == 2 and base == "mad":
            inputs[2] = integers(2 * bits)
        sizes = [bits, bits, bits * wide][: len(inputs)]
        sheet.add(
            op, [(f"b{b}", v) for b, v in zip(sizes, inputs, strict=True)], [f"b{bits * wide}"]
        )
        cases.append((op, inputs, kind))
    for (op, inputs, kind), (results,) in zip(cases, sheet.run(ops), strict=True):
        check = check_integers if kind[0] in "us" else check_floats
        check(op, inputs, results, kind)


def test_constants_as_operands():
    """An immediate operand is read as the type of the instruction."""
    sheet, values = Sheet(), integers(32)
    sheet.add("add.s32", [("b32", values), "-7"], ["b32"])
    sheet.add("sub.s32", ["5", ("b32", values)], ["b32"])
    sheet.add("mul.wide.u32", [("b32", values), "4294967295"], ["b64"])
    sheet.add("div.s32", [("b32", values), "-3"], ["b32"])
    single, double = floats("f32"), floats("f64")
    sheet.add("add.f32", [("b32", single), "0f3FC00000"], ["b32"])
    sheet.add("mul.f64", [("b64", double), "0dBFE0000000000000"], ["b64"])
    sheet.add("fma.rn.f32", [("b32", single), "0f40000000", "0fBF800000"], ["b32"])
    results = [got for (got,) in sheet.run()]
    for k, v in enumerate(values):
        x = number(v, "s32")
        assert results[0][k] == wrap(x - 7, 32)
        assert results[1][k] == wrap(5 - x, 32)
        assert results[2][k] == v * 0xFFFFFFFF
        assert results[3][k] == wrap(integer_result("div.s32", x, -3), 32)
    for k, v in enumerate(single):
        assert_close("add", results[4][k], float_result("add.f32", v, 0x3FC00000), "f32")
        want = float_result("fma.rn.f32", v, 0x40000000, 0xBF800000)
        assert_close("fma", results[6][k], want, "f32")
    for k, v in enumerate(double):
        assert_close("mul", results[5][k], float_result("mul.f64", v, 0xBFE << 52), "f64")


def test_guards_keep_what_was_there():
    sheet, a, b, p = Sheet(), integers(32), integers(32), integers(16)
    for guard in ("", "!"):
        old, flag = sheet.load(32, b), sheet.load(1, [v & 1 for v in p])
        sheet.line(f"@{guard}{flag} add.u32 {old}, {sheet.load(32, a)}, 1;")
        sheet.keep((old, 32))
    with_guard, without = (got for (got,) in sheet.run())
    for k in range(len(a)):
        changed = wrap(a[k] + 1, 32)
        assert with_guard[k] == (changed if p[k] & 1 else b[k])
        assert without[k] == (b[k] if p[k] & 1 else changed)
