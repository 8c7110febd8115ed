"""Products of the tensor cores: mma.sync of one warp. PTX ISA 9.7.14.5, "Matrix Fragments".

Products and sum of one instruction are exact here, then cut to float32: the adders of the hardware
cut, they do not round. The hardware cuts after fewer products (8 of 16 bits on sm_80), so its last
bits differ.
"""

from __future__ import annotations

import numpy as np

from .formats import cut, decode
from .values import f32, u16, u32


def mma(
    a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray], kind: str, depth: int
) -> list[np.ndarray]:
    """``D = A B + C`` of 16 x 8 for each warp: A is 16 x depth, B depth x 8, C and D float32.

    The arguments are the registers that hold the fragments. In a warp, lane = 4 * gid + tig:
    register r of A has row gid + 8 (r % 2), and its columns are the r // 2-th of the slices that a
    register of four lanes spans, at tig; likewise B with rows for columns and gid for the column.
    """
    left, right = _elements(a, kind), _elements(b, kind)
    width = left.shape[-1]  # elements in a register
    slices = depth // (4 * width)
    left = left.reshape(-1, 8, 4, slices, 2, width)
    left = left.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, depth)
    right = right.reshape(-1, 8, 4, slices, width)
    right = right.transpose(0, 3, 2, 4, 1).reshape(-1, depth, 8)
    return _registers(cut(_product(left, right) + _accumulators(c)))


def _elements(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """[warps, 32, registers, elements in a register] in float64."""
    words = np.stack([r.view(u32) for r in registers], axis=-1).reshape(-1, 32, len(registers), 1)
    return decode(words if kind == "tf32" else words.view(u16), kind)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    exact = left @ right
    if np.isfinite(exact).all():
        return exact
    return (left[..., None] * right[:, None]).sum(2)  # a BLAS may leave out Inf * 0


def _accumulators(registers: list[np.ndarray]) -> np.ndarray:
    """[warps, 16, 8]: c0 c1 are neighbours in row gid, c2 c3 in row gid + 8."""
    c = np.stack([r.view(f32) for r in registers], axis=-1).reshape(-1, 8, 4, 2, 2)
    return c.transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8)


def _registers(d: np.ndarray) -> list[np.ndarray]:
    c = d.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)
    return [np.ascontiguousarray(c[:, i]) for i in range(4)]
