"""Every form of logic, shifts and bit fields, by the pseudo-code of the PTX ISA on single bits."""

import pytest

from ptx_machine.translate import FORMS
from tests.ptx_machine.exact import signed, wrap
from tests.ptx_machine.samples import RNG, integers
from tests.ptx_machine.sheet import THREADS, Sheet

BASES = ("and", "or", "xor", "not", "shl", "shr", "bfe", "bfi", "lop3", "prmt", "shf", "popc",
         "clz", "brev")  # fmt: skip


def forms(base):
    return [op for op in FORMS if op.partition(".")[0] == base]


TESTED = [op for base in BASES for op in forms(base)]


def bit(value, k):
    return value >> k & 1


def run_each(base, sources):
    """(form, operands, result) of every thread; `sources` gives the operands of a form."""
    sheet, cases = Sheet(), []
    for op in forms(base):
        inputs, out = sources(op)
        sheet.add(op, inputs, [out])
        cases.append((op, inputs))
    for (op, inputs), (results,) in zip(cases, sheet.run(forms(base)), strict=True):
        columns = [x[1] if not isinstance(x, str) else [int(x)] * THREADS for x in inputs]
        for *x, got in zip(*columns, results, strict=True):
            yield op, x, got


def width(op):
    kind = op.rpartition(".")[2]
    return 1 if kind == "pred" else int(kind[1:])


@pytest.mark.parametrize("base", ["and", "or", "xor", "not"])
def test_logic(base):
    def sources(op):
        bits = width(op)
        values = [(f"b{bits}", integers(bits)) for _ in range(1 if base == "not" else 2)]
        if bits == 1:
            values = [("b1", [v & 1 for v in integers(8)]) for _ in values]
        return values, f"b{bits}"

    for op, x, got in run_each(base, sources):
        for k in range(width(op)):
            a, *rest = (bit(v, k) for v in x)
            want = {
                "and": lambda a, b: a * b, "or": max, "xor": lambda a, b: (a + b) % 2,
                "not": lambda a: 1 - a,
            }[base](a, *rest)  # fmt: skip
            assert bit(got, k) == want, (op, x, got)


@pytest.mark.parametrize("counts", ["register", "constant"])
@pytest.mark.parametrize("base", ["shl", "shr"])
def test_shifts(base, counts):
    """Counts past the width shift everything out; signed values fill with the sign."""

    def sources(op):
        bits = width(op)
        shifts = [RNG.choice([0, 1, bits - 1, bits, bits + 1, 200, 2**31]) for _ in range(THREADS)]
        shifts[::2] = [RNG.randrange(bits) for _ in shifts[::2]]
        second = ("b32", shifts) if counts == "register" else str(RNG.choice([3, bits - 1, bits]))
        return [(f"b{bits}", integers(bits)), second], f"b{bits}"

    for op, (a, n), got in run_each(base, sources):
        bits = width(op)
        value = signed(a, bits) if ".s" in op else a
        want = value << n if base == "shl" and n < 70 else 0 if base == "shl" else value >> n
        assert got == wrap(want, bits), (op, a, n, got)


@pytest.mark.parametrize("base", ["bfe", "bfi"])
def test_bit_fields(base):
    """Positions and lengths go up to 255 and may reach past the end."""

    def sources(op):
        places = [
            RNG.choice([0, 5, 17, 31, 32, 40, 255, 256, RNG.randrange(32)]) for _ in range(THREADS)
        ]
        lengths = [
            RNG.choice([0, 1, 8, 31, 32, 33, 255, RNG.randrange(32)]) for _ in range(THREADS)
        ]
        values = [("b32", integers(32)) for _ in range(1 if base == "bfe" else 2)]
        return [*values, ("b32", places), ("b32", lengths)], "b32"

    for op, x, got in run_each(base, sources):
        position, length = x[-2] & 255, x[-1] & 255
        want = 0
        for k in range(32):
            if base == "bfe":
                sign = bit(x[0], min(position + length - 1, 31)) if ".s" in op and length else 0
                inside = k < length and position + k <= 31
                want |= (bit(x[0], position + k) if inside else sign) << k
            else:
                inside = position <= k < position + length
                want |= (bit(x[0], k - position) if inside else bit(x[1], k)) << k
        assert got == want, (op, x, got)


def test_lop3():
    """Any of the 256 functions of three bits."""
    sheet, tables = Sheet(), [0x00, 0xFF, 0x80, 0x96, 0xE8, 0xCA, *RNG.sample(range(256), 20)]
    inputs = [integers(32) for _ in range(3)]
    for table in tables:
        sheet.add("lop3.b32", [*(("b32", v) for v in inputs), str(table)], ["b32"])
    for table, (results,) in zip(tables, sheet.run(forms("lop3")), strict=True):
        for a, b, c, got in zip(*inputs, results, strict=True):
            for k in range(32):
                want = bit(table, 4 * bit(a, k) + 2 * bit(b, k) + bit(c, k))
                assert bit(got, k) == want, (table, a, b, c)


def test_prmt():
    def sources(op):
        return [("b32", integers(32)), ("b32", integers(32)), ("b32", integers(16))], "b32"

    for _, (a, b, selector), got in run_each("prmt", sources):
        memory = [(a | b << 32) >> 8 * k & 0xFF for k in range(8)]
        for k in range(4):
            choice = selector >> 4 * k & 0xF
            byte = memory[choice & 7]
            if choice & 8:
                byte = 0xFF if byte & 0x80 else 0
            assert got >> 8 * k & 0xFF == byte


def test_funnel_shifts():
    def sources(op):
        counts = [
            RNG.choice([0, 1, 31, 32, 33, 63, 64, RNG.getrandbits(32)]) for _ in range(THREADS)
        ]
        return [("b32", integers(32)), ("b32", integers(32)), ("b32", counts)], "b32"

    for op, (a, b, c), got in run_each("shf", sources):
        n = c & 31 if "wrap" in op else min(c, 32)
        want = b << n | a >> (32 - n) if ".l." in op else b << (32 - n) | a >> n
        assert got == wrap(want, 32), (op, a, b, c)


@pytest.mark.parametrize("base", ["popc", "clz", "brev"])
def test_bits_of_one_number(base):
    def sources(op):
        bits = width(op)
        return [(f"b{bits}", integers(bits))], f"b{bits if base == 'brev' else 32}"

    for op, (a,), got in run_each(base, sources):
        text = f"{a:0{width(op)}b}"
        zeros = len(text) - len(text.lstrip("0"))
        assert got == {"popc": text.count("1"), "clz": zeros, "brev": int(text[::-1], 2)}[base]
