"""The elements that tensor cores and TMA know, as float64 and back.

``decode`` takes the unsigned integers that memory or registers hold, ``encode`` makes them, rounded
to nearest even. Formats: IEEE half, bfloat16, TF32 (the 19 high bits of a float32; PTX ISA,
"Alternate Floating-Point Data Formats"), e4m3 without infinities and e5m2 (OCP 8-bit floats).
"""

from __future__ import annotations

import numpy as np

from .values import from_bf16, to_bf16, to_f16

ITEMSIZE = {
    "f16": 2,
    "bf16": 2,
    "tf32": 4,
    "f32": 4,
    "f64": 8,
    "s32": 4,
    "e4m3": 1,
    "e5m2": 1,
    "s8": 1,
    "u8": 1,
}
UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def _fp8_table(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    bias = (1 << (exponent_bits - 1)) - 1
    top = (1 << exponent_bits) - 1
    table = np.empty(256)
    for byte in range(256):
        exponent = (byte & 0x7F) >> mantissa_bits
        mantissa = byte & ((1 << mantissa_bits) - 1)
        if exponent == 0:
            value = mantissa * 2.0 ** (1 - bias - mantissa_bits)
        elif exponent == top and exponent_bits == 5:
            value = np.nan if mantissa else np.inf
        elif exponent == top and mantissa == (1 << mantissa_bits) - 1:
            value = np.nan
        else:
            value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
        table[byte] = -value if byte & 0x80 else value
    return table


_FP8 = {"e4m3": _fp8_table(4, 3), "e5m2": _fp8_table(5, 2)}


def to_fp8(x: np.ndarray, kind: str) -> np.ndarray:
    """Floats to 8 bits, to nearest even; too large becomes the largest number, NaN 0x7f."""
    numbers = _FP8[kind][: 0x7F if kind == "e4m3" else 0x7C]  # of their codes, ascending
    size = np.minimum(np.abs(x.astype(np.float64)), numbers[-1])
    above = np.searchsorted(numbers, size).clip(max=len(numbers) - 1)
    below = np.maximum(above - 1, 0)
    down, up = size - numbers[below], numbers[above] - size
    code = np.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
    code = code | np.where(np.signbit(x), 0x80, 0)
    return np.where(np.isnan(x), 0x7F, code).astype(np.uint8)


def fp8_pair(low: np.ndarray, high: np.ndarray, kind: str) -> np.ndarray:
    """Two floats in 16 bits."""
    return to_fp8(low, kind).astype(np.uint16) | to_fp8(high, kind).astype(np.uint16) << 8


def halves_of_fp8(pair: np.ndarray, kind: str, relu: bool) -> np.ndarray:
    """Two floats of 8 bits as f16x2; NaN is 0x7fff."""
    numbers = decode(np.ascontiguousarray(pair).view(np.uint8), kind)
    if relu:
        numbers = np.where(numbers <= 0, 0.0, numbers)
    return np.where(np.isnan(numbers), np.uint16(0x7FFF), to_f16(numbers)).view(np.uint32)


def decode(raw: np.ndarray, kind: str) -> np.ndarray:
    """float64 of elements; tf32 drops the 13 low bits of a float32."""
    if kind == "bf16":
        with np.errstate(invalid="ignore"):  # signalling NaN
            return from_bf16(raw).astype(np.float64)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float64)
    if kind == "tf32":
        return (raw & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if kind == "f32":
        return raw.view(np.float32).astype(np.float64)
    if kind == "f64":
        return raw.view(np.float64)
    if kind == "s32":
        return raw.view(np.int32).astype(np.float64)
    if kind in _FP8:
        return _FP8[kind][raw]
    if kind == "s8":
        return raw.view(np.int8).astype(np.float64)
    if kind == "u8":
        return raw.astype(np.float64)
    raise NotImplementedError(f"element type {kind}")


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """The unsigned integers of elements; int32 wraps around."""
    if kind == "s32":
        return values.astype(np.int64).astype(np.uint32)
    if kind == "f64":
        return values.view(np.uint64)
    with np.errstate(over="ignore", invalid="ignore"):
        if kind == "f16":
            return to_f16(values)
        single = values.astype(np.float32)
    if kind == "bf16":
        return to_bf16(single)
    if kind in ("f32", "tf32"):
        return single.view(np.uint32)
    raise NotImplementedError(f"element type {kind}")


def cut(exact: np.ndarray) -> np.ndarray:
    """float64 to float32 as the accumulators of tensor cores do: their adders cut, never round."""
    bits = np.ascontiguousarray(exact).view(np.uint64) & np.uint64(0xFFFF_FFFF_E000_0000)
    kept = bits.view(np.float64).astype(np.float32)
    nan = np.isnan(exact)
    return np.where(nan, np.float32(np.nan), kept) if nan.any() else kept
