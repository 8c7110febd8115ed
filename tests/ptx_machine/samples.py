"""Values to try instructions on: what is special about a type, and random ones."""

import random

from tests.ptx_machine.exact import FORMATS, bits_of
from tests.ptx_machine.sheet import THREADS

RNG = random.Random(20)


def integers(bits, count=THREADS):
    """Bits of integers."""
    top = 1 << (bits - 1)
    special = [0, 1, 2, 3, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2, 10, 0xA5 % (2 * top)]
    values = special + [RNG.getrandbits(bits) for _ in range(count)]
    values += [RNG.getrandbits(RNG.randint(1, bits)) for _ in range(count)]
    RNG.shuffle(values)
    return values[:count]


def floats(kind, count=THREADS, near=6):
    """Bits of floats: special ones, any bits, and numbers within 2**near of 1."""
    exponent_bits, mantissa_bits = FORMATS[kind]
    bits, bias = bits_of(kind), (1 << (exponent_bits - 1)) - 1
    infinity = ((1 << exponent_bits) - 1) << mantissa_bits
    one = bias << mantissa_bits
    special = [0, 1, 2, (1 << mantissa_bits) - 1, 1 << mantissa_bits, infinity - 1, infinity]
    special += [infinity | 1 << (mantissa_bits - 1), one, one + 1, one - 1]
    values = special + [x | 1 << (bits - 1) for x in special]
    values += [RNG.getrandbits(bits) for _ in range(count // 4)]
    while len(values) < 2 * count:
        exponent = bias + RNG.randint(-near, near)
        sign = RNG.getrandbits(1) << (bits - 1)
        values.append(sign | exponent << mantissa_bits | RNG.getrandbits(mantissa_bits))
    RNG.shuffle(values)
    return values[:count]


def pairs(kind, count=THREADS):
    """Two halves in 32 bits."""
    return [a | b << 16 for a, b in zip(floats(kind, count), floats(kind, count), strict=True)]
