"""The arithmetic of PTX on numpy arrays: one element per thread.

Registers hold the bits; which type they have is said by the instruction that reads them.
"""

from __future__ import annotations

import numpy as np

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64

# The type that holds the bits of a register, by its bytes.
UNSIGNED = {1: u8, 2: u16, 4: u32, 8: u64}


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 numbers to zero, keeping the sign (.ftz)."""
    small = np.abs(x) < f32(2.0**-126)
    return np.where(small & (x == x), np.copysign(f32(0), x), x) if small.any() else x


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32. The product is exact in float64; the sum is rounded there and once
    more to float32, which differs from a single rounding about once in 2**29."""
    return (a.astype(f64) * b + c).astype(f32)


# bfloat16


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(u32) << u32(16)).view(f32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even; NaN is 0x7fff as on the GPU."""
    bits = x.view(u32)
    rounded = ((bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)).astype(u16)
    nan = np.isnan(x)
    return np.where(nan, u16(0x7FFF), rounded) if nan.any() else rounded


def to_bf16_rz(x: np.ndarray) -> np.ndarray:
    cut = (x.view(u32) >> u32(16)).astype(u16)
    return np.where(np.isnan(x), u16(0x7FFF), cut)


def to_f16(x: np.ndarray) -> np.ndarray:
    return x.astype(f16).view(u16)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Round to 10 bits of mantissa, ties away from zero (cvt.rna.tf32)."""
    bits = x.view(u32)
    rounded = (bits + u32(0x1000)) & u32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, bits)


def to_tf32_rn(x: np.ndarray) -> np.ndarray:
    bits = x.view(u32)
    rounded = (bits + u32(0xFFF) + ((bits >> u32(13)) & u32(1))) & u32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, bits)


def relu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, x.dtype.type(0))


# Pairs in 32 bits


def pack(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two 16-bit halves."""
    return low.astype(u32) | (high.astype(u32) << u32(16))


def pack64(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(u64) | (high.astype(u64) << u64(32))


def lower(x: np.ndarray) -> np.ndarray:
    return x.astype(u16)


def upper(x: np.ndarray) -> np.ndarray:
    return (x >> u32(16)).astype(u16)


# Integers


def to_int(x: np.ndarray, kind: type) -> np.ndarray:
    """A float, already a whole number, to an integer: saturating, NaN is 0."""
    info = np.iinfo(kind)
    x = np.where(np.isnan(x), 0, x).astype(f64)
    result = np.clip(x, float(info.min), float(info.max))
    high = x >= float(info.max)
    out = np.where(high, 0, result).astype(kind)
    return np.where(high, kind(info.max), out)


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
    zero = b == 0
    q = divide(a, np.where(zero, b.dtype.type(1), b))
    return np.where(zero, a, a - q * b)


def extract(a: np.ndarray, position: np.ndarray, length: np.ndarray, signed: bool) -> np.ndarray:
    """bfe of 32 bits."""
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
    """bfi of 32 bits: the low `length` bits of a put into b."""
    p = np.asarray(position).astype(u64) & u64(0xFF)
    n = np.asarray(length).astype(u64) & u64(0xFF)
    mask = ((u64(1) << n) - u64(1)) << p
    return ((b.astype(u64) & ~mask) | ((a.astype(u64) << p) & mask)).astype(u32)


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    out = np.zeros(np.broadcast(a, b, c).shape, u32)
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


def funnel(low: np.ndarray, high: np.ndarray, count: np.ndarray, left: bool, wrap: bool):
    """shf of 32 bits."""
    n = np.asarray(count).astype(u64)
    n = n & u64(31) if wrap else np.minimum(n, u64(32))
    both = low.astype(u64) | (high.astype(u64) << u64(32))
    return ((both << n) >> u64(32) if left else both >> n).astype(u32)


# Fragments of the tensor cores. W warps; lane = 4 * gid + tig.

# How a tensor core rounds the sum of a block of products: its adders cut, they do not round.
TRUNCATE = True


def round_sum(exact: np.ndarray) -> np.ndarray:
    """float64 to float32 as the accumulators do."""
    near = exact.astype(f32)
    if not TRUNCATE:
        return near
    over = np.abs(near.astype(f64)) > np.abs(exact)
    return np.where(over, np.nextafter(near, f32(0)), near) if over.any() else near


def _halves(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """[W, 32, registers, 2] float32 of registers that hold pairs."""
    words = np.stack([r.view(u32) for r in registers], axis=-1)
    pairs = words.view(u16).reshape(-1, 32, len(registers), 2)
    if kind == "bf16":
        return from_bf16(pairs)
    return pairs.view(f16).astype(f32)


def _accumulators(registers: list[np.ndarray]) -> np.ndarray:
    """[W, 16, 8] from c0..c3."""
    c = np.stack([r.view(f32) for r in registers], axis=-1).reshape(-1, 8, 4, 2, 2)
    return c.transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8)


def _registers(d: np.ndarray) -> list[np.ndarray]:
    c = d.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)
    return [np.ascontiguousarray(c[:, i]) for i in range(4)]


def mma_16bit(a, b, c, kind: str, depth: int) -> list[np.ndarray]:
    """mma.m16n8k16 and m16n8k8 of f16 or bf16 into float32."""
    slices = depth // 8
    # a register r: row half r & 1, column half r >> 1
    left = _halves(a, kind).reshape(-1, 8, 4, slices, 2, 2)
    left = left.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, depth)
    right = _halves(b, kind).reshape(-1, 8, 4, slices, 2)
    right = right.transpose(0, 3, 2, 4, 1).reshape(-1, depth, 8)
    exact = left.astype(f64) @ right.astype(f64) + _accumulators(c)
    return _registers(round_sum(exact))


def mma_tf32(a, b, c, depth: int) -> list[np.ndarray]:
    """mma.m16n8k8 and m16n8k4 of tf32: the low 13 bits of the operands are ignored."""
    slices = depth // 4

    def cut(registers):
        x = np.stack([r.view(u32) for r in registers], axis=-1) & u32(0xFFFFE000)
        return x.view(f32)

    left = cut(a).reshape(-1, 8, 4, slices, 2)
    left = left.transpose(0, 4, 1, 3, 2).reshape(-1, 16, depth)
    right = cut(b).reshape(-1, 8, 4, slices).transpose(0, 3, 2, 1).reshape(-1, depth, 8)
    exact = left.astype(f64) @ right.astype(f64) + _accumulators(c)
    return _registers(round_sum(exact))


# Arithmetic in 16 bits


_HALF_OPS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a.astype(f64) * b + c,
    "max": np.fmax,
    "min": np.fmin,
    "neg": lambda a: -a,
    "abs": np.abs,
    "ex2": np.exp2,
    "tanh": np.tanh,
}


def half_op(name: str, kind: str, *operands: np.ndarray) -> np.ndarray:
    """An operation on f16, bf16 or pairs of them: computed in float32, rounded once more."""
    pairs = kind.endswith("x2")
    brain = kind.startswith("bf16")

    def widen(bits):
        halves = np.ascontiguousarray(bits).view(u16)
        return from_bf16(halves) if brain else halves.view(f16).astype(f32)

    result = _HALF_OPS[name](*map(widen, operands)).astype(f32)
    halves = to_bf16(result) if brain else to_f16(result)
    return np.ascontiguousarray(halves).view(u32) if pairs else halves
