"""Floats as Python integers and fractions: the numbers behind the machine's own tests.

Shares nothing with the machine: formats are taken apart by their bits, results are computed exactly
and rounded once, by IEEE 754's rules.
"""

import math
from fractions import Fraction
from functools import cache

FORMATS = {
    "f16": (5, 10), "bf16": (8, 7), "tf32": (8, 10), "f32": (8, 23), "f64": (11, 52),
    "e4m3": (4, 3), "e5m2": (5, 2),  # e4m3 has no infinities: below 256 it is as here
}  # fmt: skip


def bits_of(kind):
    """Bits of a float or integer type of PTX."""
    return 1 + sum(FORMATS[kind]) if kind in FORMATS else int(kind[1:])


def signed(value, bits):
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def wrap(value, bits):
    return value & ((1 << bits) - 1)


@cache
def number(value, kind):
    """The integer or float that these bits are; floats up to f64 are exact as Python's."""
    if kind not in FORMATS:
        return signed(value, int(kind[1:])) if kind[0] == "s" else value
    exponent_bits, mantissa_bits = FORMATS[kind]
    bias = (1 << (exponent_bits - 1)) - 1
    mantissa = value & ((1 << mantissa_bits) - 1)
    exponent = value >> mantissa_bits & ((1 << exponent_bits) - 1)
    if exponent == (1 << exponent_bits) - 1:
        size = math.nan if mantissa else math.inf
    elif exponent:
        size = math.ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits)
    else:
        size = math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return -size if value >> (exponent_bits + mantissa_bits) else size


def rounded(value, kind, mode="rn", negative_zero=False):
    """Bits of a Fraction, int or float in a format; None for NaN. Modes: rn, rna, rz."""
    exponent_bits, mantissa_bits = FORMATS[kind]
    sign_bit = 1 << (exponent_bits + mantissa_bits)
    infinity = ((1 << exponent_bits) - 1) << mantissa_bits
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if math.isinf(value):
            return infinity | (sign_bit if value < 0 else 0)
        negative_zero = math.copysign(1, value) < 0
    value = Fraction(value)
    if not value:
        return sign_bit if negative_zero else 0
    sign = sign_bit if value < 0 else 0
    value = abs(value)
    bias = (1 << (exponent_bits - 1)) - 1
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    if value < Fraction(2) ** exponent:
        exponent -= 1
    scale = max(exponent, 1 - bias) - mantissa_bits
    scaled = value / Fraction(2) ** scale
    whole = scaled.numerator // scaled.denominator
    rest = scaled - whole
    half = Fraction(1, 2)
    if mode != "rz" and (rest > half or (rest == half and (mode == "rna" or whole & 1))):
        whole += 1
    if whole >> mantissa_bits == 0:
        return sign | whole
    bits = ((scale + mantissa_bits + bias) << mantissa_bits) + whole - (1 << mantissa_bits)
    if bits >= infinity:
        bits = infinity - 1 if mode == "rz" else infinity
    return sign | bits


def is_nan(value, kind):
    return math.isnan(number(value, kind))


def flushed(value, kind):
    """Subnormal bits to zero of their sign."""
    exponent_bits, mantissa_bits = FORMATS[kind]
    if value >> mantissa_bits & ((1 << exponent_bits) - 1):
        return value
    return value >> (exponent_bits + mantissa_bits) << (exponent_bits + mantissa_bits)


def combine(name, *x):
    """add, sub, mul, fma or div of Python floats: a Fraction, or a float if no number or zero."""
    plain = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "fma": lambda a, b, c: a * b + c,
        "div": _quotient,
    }[name]
    if not all(map(math.isfinite, x)) or (name == "div" and x[1] == 0):
        return plain(*x)
    exact = plain(*map(Fraction, x))
    return exact if exact else plain(*x)  # the float has the sign of the zero


def _quotient(a, b):
    if isinstance(b, Fraction):
        return a / b
    sign = math.copysign(1, a) * math.copysign(1, b)
    if math.isnan(a) or math.isnan(b) or (a == 0 == b) or (math.isinf(a) and math.isinf(b)):
        return math.nan
    return sign * (math.inf if b == 0 or math.isinf(a) else 0.0)


def distance(a, b, kind):
    """How many steps of the format lie between two numbers' bits, NaN apart from all."""
    if is_nan(a, kind) or is_nan(b, kind):
        return 0 if is_nan(a, kind) and is_nan(b, kind) else math.inf
    bits = bits_of(kind)
    line = [x if not x >> (bits - 1) else -(x & ((1 << (bits - 1)) - 1)) for x in (a, b)]
    return abs(line[0] - line[1])
