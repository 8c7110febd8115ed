"""Products of the tensor cores: mma.sync of one warp. PTX ISA 9.7.14.5, "Matrix Fragments".

Products and sum of one instruction are exact here, then cut to float32: the adders of the hardware
cut, they do not round. The hardware cuts after fewer products (8 of 16 bits on sm_80), so its last
bits differ. Sums of float16 are rounded, those of float64 in every step, in an order of numpy's.
"""

from __future__ import annotations

import numpy as np

from .formats import ITEMSIZE, UINT, cut, decode, encode


def mma(
    a: list[np.ndarray],
    b: list[np.ndarray],
    c: list[np.ndarray],
    kinds: tuple[str, str, str],
    depth: int,
    saturates: bool,
) -> list[np.ndarray]:
    """``D = A B + C`` for each warp: A is 16 x depth (8 x depth for half as many registers of C).

    B is depth x 8; `kinds` are the elements of A, B, and of C and D. The arguments are the
    registers that hold the fragments. In a warp, lane = 4 * gid + tig: register r of A has row
    gid + 8 (r % 2), and its columns are the r // 2-th of the slices that a register of four lanes
    spans, at tig; likewise B with rows for columns and gid for the column.
    """
    left, right = _elements(a, kinds[0]), _elements(b, kinds[1])
    width = left.shape[-1]  # elements in a register
    slices = depth // (4 * width)
    halves = len(a) // slices  # of 8 rows
    left = left.reshape(-1, 8, 4, slices, halves, width)
    left = left.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 8 * halves, depth)
    right = right.reshape(-1, 8, 4, slices, width)
    right = right.transpose(0, 3, 2, 4, 1).reshape(-1, depth, 8)
    total = _product(left, right) + _accumulators(c, kinds[2], halves)
    if saturates:
        total = total.clip(-(2.0**31), 2.0**31 - 1)
    return _registers(cut(total).astype(np.float64) if kinds[2] == "f32" else total, kinds[2])


def _elements(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """[warps, 32, registers, elements in a register] in float64."""
    words = np.stack(registers, axis=-1).reshape(-1, 32, len(registers), 1)
    return decode(words.view(UINT[ITEMSIZE[kind]]), kind)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    exact = left @ right
    if np.isfinite(exact).all():
        return exact
    return (left[..., None] * right[:, None]).sum(2)  # a BLAS may leave out Inf * 0


def _accumulators(registers: list[np.ndarray], kind: str, halves: int) -> np.ndarray:
    """[warps, 8 halves, 8]: c0 c1 are neighbours in row gid, c2 c3 in row gid + 8."""
    c = _elements(registers, kind).reshape(-1, 8, 4, halves, 2)
    return c.transpose(0, 3, 1, 2, 4).reshape(-1, 8 * halves, 8)


def _registers(d: np.ndarray, kind: str) -> list[np.ndarray]:
    halves = d.shape[1] // 8
    bits = encode(d.reshape(-1, halves, 8, 4, 2).transpose(0, 2, 3, 1, 4), kind)
    words = np.ascontiguousarray(bits).reshape(len(d) * 32, -1)
    words = words.view(np.uint64 if kind == "f64" else np.uint32)
    return [np.ascontiguousarray(column) for column in words.T]
