"""Where wgmma finds its operands: descriptors of shared memory, and fragments in registers.

Sources, in the PTX ISA's section "Asynchronous Warpgroup Level Matrix Instructions": "Register
Fragments" (figures of D and A), "Shared Memory Matrix Layout" with its canonical layouts, strides
and swizzles, and "Matrix Descriptor Format".

A *unit* is what runs one product here: a warpgroup with 64 rows of D, or a warp with its 16 where
the warps of a warpgroup are at different places.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .formats import ITEMSIZE, UINT

K_BYTES = 32  # of a row of A or B in one instruction
_SWIZZLE_BYTES = (0, 128, 64, 32)  # by bits 62-63 of a descriptor


def swizzle(address: np.ndarray, width: int) -> np.ndarray:
    """Where the byte at linear `address` lies under a swizzle of `width` bytes (0: none).

    Bits 4.. of the address are XORed with bits 7..: three of them for 128 bytes, two for 64, one
    for 32. So chunks of 16 bytes change places within `width` bytes, by the row of 128 bytes that
    they are in, and the pattern repeats every 8 * `width` bytes. It hangs on absolute addresses.
    """
    if not width:
        return address
    return address ^ ((address >> 7 & (width // 16 - 1)) << 4)


@dataclass(frozen=True)
class MatrixDescriptor:
    """The 64-bit descriptor of an operand in shared memory; offsets in bytes."""

    start: int  # bits 13-0, in 16 bytes, as the next two
    leading: int  # bits 29-16
    stride: int  # bits 45-32
    swizzle: int = 0  # bytes: 0, 32, 64, 128; bits 63-62
    base_offset: int = 0  # bits 51-49: for patterns that start elsewhere

    @staticmethod
    def decode(bits: int) -> MatrixDescriptor:
        """The fields of a descriptor; ValueError where reserved bits are set."""
        bits = int(bits)
        reserved = bits & (3 << 14 | 3 << 30 | 7 << 46 | 0x3FF << 52)
        if reserved:
            raise ValueError(f"wgmma descriptor {bits:#018x}: reserved bits {reserved:#x} are set")
        return MatrixDescriptor(
            start=(bits & 0x3FFF) << 4,
            leading=(bits >> 16 & 0x3FFF) << 4,
            stride=(bits >> 32 & 0x3FFF) << 4,
            swizzle=_SWIZZLE_BYTES[bits >> 62],
            base_offset=bits >> 49 & 7,
        )

    def encode(self) -> int:
        """The opposite of :meth:`decode`."""
        fields = (self.start, self.leading, self.stride)
        if any(n % 16 or not 0 <= n < 1 << 18 for n in fields):
            raise ValueError(f"{self}: offsets are multiples of 16 below 2**18")
        start, leading, stride = (n >> 4 for n in fields)
        mode = _SWIZZLE_BYTES.index(self.swizzle)
        return start | leading << 16 | stride << 32 | self.base_offset << 49 | mode << 62


@lru_cache(maxsize=1024)
def _chunk_offsets(leading: int, stride: int, width: int, rows: int, mn_major: bool) -> np.ndarray:
    if not mn_major:
        row, chunk = np.arange(rows)[:, None], np.arange(K_BYTES // 16)[None, :]
        if width:
            return (row % 8) * width + (row // 8) * stride + chunk * 16
        return (row % 8) * 16 + (row // 8) * stride + chunk * leading
    k, chunk = np.arange(16)[:, None], np.arange(rows // 8)[None, :]
    if width:
        along = width // 16
        near, far = chunk % along * 16, chunk // along * leading
        return near + far + (k % 8) * width + (k // 8) * stride
    return chunk * stride + (k % 8) * 16 + (k // 8) * leading


def operand_chunks(
    descriptor: MatrixDescriptor, rows: int, itemsize: int, mn_major: bool, *,
    start: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Shared addresses of the 16-byte chunks of an operand with `rows` of M or N, 32 bytes of K.

    With `start`, of several operands that begin there and are otherwise alike, as the first axis.

    [rows, 2] if K-major (no transpose). Core matrices are 8 rows of 16 bytes:
      - no swizzle: the rows of a core matrix are 16 bytes apart; `leading` to the next 16 bytes of
        the rows, `stride` to the next 8 rows.
      - swizzle W: rows are W bytes apart, their bytes lie side by side (`leading` unused).

    [16, rows / 8] if MN-major (transposed; 16-bit elements only), columns of K before rows:
      - no swizzle: 16 bytes of 8 columns make a core matrix; `stride` to the next 16 bytes along
        MN, `leading` to the next 8 columns.
      - swizzle W: columns are W bytes apart; `leading` to the next W bytes along MN, `stride` to
        the next 8 columns.
    """
    if mn_major and itemsize != 2:
        raise ValueError("wgmma: only operands of 16 bits can be transposed")
    if descriptor.base_offset:
        raise NotImplementedError("wgmma: descriptors with a base offset")
    offsets = _chunk_offsets(
        descriptor.leading, descriptor.stride, descriptor.swizzle, rows, mn_major
    )
    first = descriptor.start if start is None else start[:, None, None]
    return swizzle(first + offsets, descriptor.swizzle)


def operand_matrix(chunks: np.ndarray, itemsize: int, mn_major: bool) -> np.ndarray:
    """[units, rows, K] unsigned integers from the bytes [units, (as operand_chunks), 16]."""
    units, first = chunks.shape[:2]
    elements = chunks.reshape(units, first, -1).view(UINT[itemsize])
    return elements.swapaxes(1, 2) if mn_major else elements


# Fragments: `registers` are uint32 [threads, registers], threads in order.


def accumulator(registers: np.ndarray, rows: int, itemsize: int = 4) -> np.ndarray:
    """D [units, rows, n] as unsigned integers, of 4 bytes or of 2 (two in a register).

    Element i of lane l in warp w is in row 16 w + l / 4 + 8 (i / 2 % 2) and in column
    8 (i / 4) + 2 (l % 4) + i % 2.
    """
    elements = np.ascontiguousarray(registers).view(UINT[itemsize])
    tiles = elements.shape[1] // 4
    shaped = elements.reshape(-1, rows // 16, 8, 4, tiles, 2, 2)
    return shaped.transpose(0, 1, 5, 2, 4, 3, 6).reshape(-1, rows, 8 * tiles)


def accumulator_registers(d: np.ndarray) -> np.ndarray:
    """The opposite of :func:`accumulator`, but [registers, threads]: rows that lie together."""
    units, rows, n = d.shape
    shaped = d.reshape(units, rows // 16, 2, 8, n // 8, 4, 2)
    if d.itemsize == 4:
        return shaped.transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, -1)
    packed = np.ascontiguousarray(shaped.transpose(4, 2, 0, 1, 3, 5, 6))
    return packed.reshape(n // 4, -1).view(np.uint32)


def a_fragment(registers: np.ndarray, rows: int, kind: str) -> np.ndarray:
    """A [units, rows, K] as unsigned integers, from four registers.

    The first two hold the left half of the columns, the second and the fourth are 8 rows further
    down; a lane has 4 bytes of its row in each.
    """
    per = 4 // ITEMSIZE[kind]
    elements = np.ascontiguousarray(registers).view(UINT[ITEMSIZE[kind]])
    shaped = elements.reshape(-1, rows // 16, 8, 4, 2, 2, per)  # lane / 4, lane % 4, right, down
    return shaped.transpose(0, 1, 5, 2, 4, 3, 6).reshape(-1, rows, 8 * per)
