"""The arithmetic of PTX on numpy arrays: one element per thread.

Registers hold the bits; which type they have is said by the instruction that reads them. Translated
code calls these functions by name. PTX ISA 9.7.1 to 9.7.9.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64

# The type that holds the bits of a register, by its bytes.
UNSIGNED = {1: u8, 2: u16, 4: u32, 8: u64}

number_max, number_min = np.fmax, np.fmin  # of a number and NaN, the number


def as_granules(
    values: np.ndarray | None, granule: int, shape: tuple[int, ...]
) -> np.ndarray | None:
    """The data [n, items] of a store as [n, granules]; None if it is narrower than a granule."""
    if values is None:
        return None
    data = np.ascontiguousarray(values)
    data = data.reshape(len(data), -1).view(UNSIGNED[granule])
    return data if data.shape == tuple(shape) else None


# The smallest normal number of each float.
_NORMAL = {np.dtype(f16): f16(2.0**-14), np.dtype(f32): f32(2.0**-126)}


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers to zero, keeping the sign (.ftz)."""
    small = np.abs(x) < _NORMAL[x.dtype]
    return np.where(small, np.copysign(x.dtype.type(0), x), x) if small.any() else x


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` in float32.

    The product is exact in float64; the sum is rounded there and once more to float32, which
    differs from a single rounding about once in 2**29.
    """
    return (np.asarray(a).astype(f64) * b + c).astype(f32)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` in float64, rounded once.

    Boldo and Melquiond, "Emulation of FMA and Correctly Rounded Sums": the low parts are summed to
    an odd number. Where a part is too large or too small for that, product and sum are rounded.
    """
    a, b, c = np.broadcast_arrays(a, b, c)
    product = a * b
    below = _product_error(a, b, product)
    high, low = _two_sum(c, below)
    top, rest = _two_sum(product, high)
    exact = top + _add_to_odd(rest, low)
    small = np.abs(product) < 2.0**-960
    return np.where(np.isfinite(below) & np.isfinite(top) & ~small, exact, product + c)


def _product_error(a: np.ndarray, b: np.ndarray, product: np.ndarray) -> np.ndarray:
    """``a * b - product``, exact (Dekker)."""
    (a1, a0), (b1, b0) = _split(a), _split(b)
    return ((a1 * b1 - product) + a1 * b0 + a0 * b1) + a0 * b0


def _split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    large = x * f64(2.0**27 + 1)
    high = large - (large - x)
    return high, x - high


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sum, rounded, and its error."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def relu(x: np.ndarray) -> np.ndarray:
    """Zero for what is not above it; NaN stays."""
    return np.where(x <= 0, x.dtype.type(0), x)


# Rounding to short floats


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """float32 of the upper halves of its bits."""
    return (bits.astype(u32) << u32(16)).view(f32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even; NaN is 0x7fff as on the GPU."""
    bits = x.view(u32)
    rounded = ((bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)).astype(u16)
    nan = np.isnan(x)
    return np.where(nan, u16(0x7FFF), rounded) if nan.any() else rounded


def to_bf16_rz(x: np.ndarray) -> np.ndarray:
    """Round towards zero."""
    cut = (x.view(u32) >> u32(16)).astype(u16)
    return np.where(np.isnan(x), u16(0x7FFF), cut)


def wide_to_bf16(x: np.ndarray) -> np.ndarray:
    """float64 to bfloat16, rounded once: through a float32 that is odd where it is inexact."""
    near = x.astype(f32)
    below = np.where(np.abs(near.astype(f64)) > np.abs(x), np.nextafter(near, f32(0)), near)
    odd = (below.view(u32) | (below != x).astype(u32)).view(f32)
    return to_bf16(np.where(np.isfinite(x), odd, near))


def to_f16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even."""
    return x.astype(f16).view(u16)


def to_f16_rz(x: np.ndarray) -> np.ndarray:
    """Round towards zero: too large becomes the largest number."""
    near = x.astype(f16)
    over = np.abs(near.astype(x.dtype)) > np.abs(x)
    return np.where(over, np.nextafter(near, f16(0)), near).view(u16)


def to_tf32_rna(x: np.ndarray) -> np.ndarray:
    """Round to 10 bits of mantissa, ties away from zero."""
    return _cut_tf32(x, u32(0x1000))


def to_tf32_rn(x: np.ndarray) -> np.ndarray:
    """Round to 10 bits of mantissa, ties to even."""
    return _cut_tf32(x, u32(0xFFF) + ((x.view(u32) >> u32(13)) & u32(1)))


def to_tf32_rz(x: np.ndarray) -> np.ndarray:
    """Round to 10 bits of mantissa, towards zero."""
    return _cut_tf32(x, u32(0))


def _cut_tf32(x: np.ndarray, added: np.ndarray | np.uint32) -> np.ndarray:
    bits = x.view(u32)
    return np.where(np.isfinite(x), (bits + added) & u32(0xFFFFE000), bits)


def pack(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two 16-bit halves of 32 bits."""
    return low.astype(u32) | (high.astype(u32) << u32(16))


# Arithmetic in 16 bits


def _add_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sum in float64, odd where it is inexact: a shorter float then is rounded once."""
    total, error = _two_sum(a, b)
    even = (total.view(u64) & u64(1)) == 0
    nudged = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where(np.isfinite(error) & (error != 0) & even, nudged, total)


_HALF_OPS: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: _add_to_odd(a * b, c),
    "max": np.fmax,
    "min": np.fmin,
    "max.NaN": np.maximum,
    "min.NaN": np.minimum,
    "neg": np.negative,
    "abs": np.abs,
    "ex2": np.exp2,
    "tanh": np.tanh,
}


def half_op(name: str, kind: str, ftz: bool, *operands: np.ndarray) -> np.ndarray:
    """An operation on f16, bf16 or pairs of them: computed in float64, rounded once."""
    brain = kind.startswith("bf16")

    def widen(bits: np.ndarray) -> np.ndarray:
        halves = np.ascontiguousarray(bits).view(u16)
        numbers = from_bf16(halves) if brain else halves.view(f16)
        return (flush(numbers) if ftz else numbers).astype(f64)

    result = _HALF_OPS[name](*map(widen, operands))
    halves = np.ascontiguousarray(wide_to_bf16(result) if brain else to_f16(result))
    if ftz:
        exponent = u16(0x7F80 if brain else 0x7C00)
        halves = np.where(halves & exponent, halves, halves & u16(0x8000))
    return halves.view(u32) if kind.endswith("x2") else halves


# Integers


def to_int(x: np.ndarray, kind: type) -> np.ndarray:
    """A float, already a whole number, to an integer: saturating, NaN is 0."""
    info = np.iinfo(kind)
    x = np.where(np.isnan(x), 0, x).astype(f64)
    result = np.clip(x, float(info.min), float(info.max))
    high = x >= float(info.max)
    whole: np.ndarray = np.where(high, 0, result).astype(kind)
    return np.where(high, kind(info.max), whole)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integer division towards zero; by zero it gives all ones."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    q = a // safe
    if np.issubdtype(a.dtype, np.signedinteger):
        q = q + ((q * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(zero, ~a.dtype.type(0), q)


def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product of two integers (mul.hi)."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}").type
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    x, y, low, half = a.view(u64), b.view(u64), u64(0xFFFFFFFF), u64(32)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    other = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, u64(0)) - np.where(b < 0, x, u64(0))
    return high.view(a.dtype)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The rest of :func:`divide`, with the sign of a; by zero it gives a."""
    zero = b == 0
    q = divide(a, np.where(zero, b.dtype.type(1), b))
    return np.where(zero, a, a - q * b)


def extract(a: np.ndarray, position: np.ndarray, length: np.ndarray, signed: bool) -> np.ndarray:
    """Extract (bfe): `length` bits from `position` on; past the end, the sign."""
    p = np.broadcast_to(position, a.shape).astype(i64) & 0xFF
    n = np.broadcast_to(length, a.shape).astype(i64) & 0xFF
    wide = a.view(i32).astype(i64) if signed else a.view(u32).astype(i64)
    p, n = np.minimum(p, 63), np.minimum(n, 32)
    field = (wide >> p) & ((i64(1) << n) - 1)
    if signed:
        top = np.minimum(p + n - 1, 31)
        sign = (wide >> top) & 1
        field = np.where((n > 0) & (sign != 0), field | ~((i64(1) << n) - 1), field)
    return field.astype(i32 if signed else u32)


def insert(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Insert (bfi): the low `length` bits of a put into b."""
    p = np.asarray(position).astype(u64) & u64(0xFF)
    n = np.asarray(length).astype(u64) & u64(0xFF)
    mask = ((u64(1) << n) - u64(1)) << p
    return ((b.astype(u64) & ~mask) | ((a.astype(u64) << p) & mask)).astype(u32)


def filled(x: np.ndarray) -> np.ndarray:
    """The bits from the highest one that is set on, down to the lowest, all set."""
    for step in (1, 2, 4, 8, 16, 32)[: 4 + x.itemsize // 4]:
        x = x | x >> x.dtype.type(step)
    return x


def reversed_bits(x: np.ndarray) -> np.ndarray:
    """The lowest bit first."""
    bits = np.unpackbits(np.ascontiguousarray(x)[:, None].view(u8), axis=1, bitorder="little")
    return np.packbits(bits, axis=1).view(x.dtype.newbyteorder(">")).ravel().astype(x.dtype)


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Any function of three bits: bit ``4 a + 2 b + c`` of the table."""
    out: np.ndarray = np.zeros(np.broadcast(a, b, c).shape, u32)
    for bit in range(8):
        if table >> bit & 1:
            x = a if bit & 4 else ~a
            y = b if bit & 2 else ~b
            z = c if bit & 1 else ~c
            out |= x & y & z
    return out


def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt.b32, the default mode."""
    both = a.astype(u64) | (b.astype(u64) << u64(32))
    selector = np.asarray(selector).astype(u64)
    out = np.zeros(np.broadcast(both, selector).shape, u64)
    for i in range(4):
        nibble = (selector >> u64(4 * i)) & u64(0xF)
        byte = (both >> ((nibble & u64(7)) * u64(8))) & u64(0xFF)
        sign = np.where(byte & u64(0x80), u64(0xFF), u64(0))
        byte = np.where(nibble & u64(8), sign, byte)
        out |= byte << u64(8 * i)
    return out.astype(u32)


def funnel(
    low: np.ndarray, high: np.ndarray, count: np.ndarray, left: bool, wrap: bool
) -> np.ndarray:
    """Shift 64 bits (shf): to the left the upper half of the result, to the right the lower."""
    n = np.asarray(count).astype(u64)
    n = n & u64(31) if wrap else np.minimum(n, u64(32))
    both = low.astype(u64) | (high.astype(u64) << u64(32))
    return ((both << n) >> u64(32) if left else both >> n).astype(u32)
