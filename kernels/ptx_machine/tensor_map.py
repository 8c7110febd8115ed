"""Tensor maps: what ``cuTensorMapEncodeTiled`` and ``tensormap.replace`` make, and TMA reads.

Sources: CUDA driver API, "Tensor Map Object Management" (limits of cuTensorMapEncodeTiled, element
types); PTX ISA, "tensormap.replace" (fields, element types of the device) and "Tensors" (boxes,
out-of-bound accesses). The 128 bytes of a real map are not documented: the format here is our own.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAP_BYTES = 128
_MAGIC = 0x48525654454E4D50  # says that 128 bytes hold a map of ours
_LAYOUT = struct.Struct("<Q5I4x4Q5I5IBBBBB3x")  # 112 bytes; the magic behind

# CUtensorMapDataType of cuda.h, what the host passes: (name, bytes).
HOST_ELEMENT = {
    0: ("u8", 1), 1: ("u16", 2), 2: ("u32", 4), 3: ("s32", 4), 4: ("u64", 8), 5: ("s64", 8),
    6: ("f16", 2), 7: ("f32", 4), 8: ("f64", 8), 9: ("bf16", 2), 10: ("f32", 4), 11: ("tf32", 4),
    12: ("tf32", 4),
}  # fmt: skip
# .elemtype of tensormap.replace, what the device writes: other numbers from 8 on.
DEVICE_ELEMENT = {
    0: ("u8", 1), 1: ("u16", 2), 2: ("u32", 4), 3: ("s32", 4), 4: ("u64", 8), 5: ("s64", 8),
    6: ("f16", 2), 7: ("f32", 4), 8: ("f32", 4), 9: ("f64", 8), 10: ("bf16", 2), 11: ("tf32", 4),
    12: ("tf32", 4),
}  # fmt: skip
_BYTES = dict(DEVICE_ELEMENT.values())
SWIZZLE_OF_MODE = {0: 0, 1: 32, 2: 64, 3: 128}  # not the numbers of wgmma


@dataclass(frozen=True)
class TensorMap:
    """A tiled tensor map; dimensions innermost first, as the instructions count them."""

    base: int
    shape: tuple[int, ...]  # elements
    strides: tuple[int, ...]  # bytes, of all dimensions but the innermost
    box: tuple[int, ...]  # elements
    element: str
    swizzle: int = 0  # bytes
    nan_fill: bool = False  # out of bounds, floating-point elements become NaN instead of zero
    element_strides: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """Dimensions of the box."""
        return len(self.box)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return _BYTES[self.element]

    @property
    def box_bytes(self) -> int:
        """What a load reports to its mbarrier, wherever the box lies."""
        return int(np.prod(self.box)) * self.itemsize

    @staticmethod
    def host(
        base: int,
        swizzle_mode: int,
        elem_size: int,
        elem_type: int,
        block_size: Sequence[int],
        shape: Sequence[int],
        strides: Sequence[int],
        padding: int = 0,
    ) -> TensorMap:
        """From the arguments of Triton's ``fill_tma_descriptor``.

        Dimensions outermost first, strides in elements, `elem_type` as the host's enum. Raises
        ValueError where the driver would refuse the map.
        """
        name, size = HOST_ELEMENT[elem_type]
        if size != elem_size:
            raise ValueError(f"element type {elem_type} ({name}) has not {elem_size} bytes")
        made = TensorMap(
            base=int(base),
            shape=tuple(int(n) for n in reversed(shape)),
            strides=tuple(int(n) * elem_size for n in list(reversed(strides))[1:]),
            box=tuple(int(n) for n in reversed(block_size)),
            element=name,
            swizzle=SWIZZLE_OF_MODE[swizzle_mode],
            nan_fill=padding == 1,
        )
        made.check()
        return made

    def check(self) -> None:
        """Raise ValueError where cuTensorMapEncodeTiled would fail, or TMA would fault."""
        problems = [*self._problems_of_tensor(), *self._problems_of_box()]
        if problems:
            raise ValueError(f"tensor map: {'; '.join(problems)}")

    def _problems_of_tensor(self) -> list[str]:
        problems = []
        if not 1 <= self.rank <= 5 or len(self.shape) != self.rank:
            problems.append(f"rank {self.rank}")
        if len(self.strides) != self.rank - 1:
            problems.append("as many strides as dimensions but one")
        if self.base % 16:
            problems.append(f"base {self.base:#x} is not aligned to 16 bytes")
        if any(n < 1 or n > 1 << 32 for n in self.shape):
            problems.append(f"shape {self.shape}")
        if any(n % 16 or n >= 1 << 40 for n in self.strides):
            problems.append(f"strides {self.strides} are no multiples of 16 bytes")
        return problems

    def _problems_of_box(self) -> list[str]:
        problems = []
        if any(not 1 <= n <= 256 for n in self.box):
            problems.append(f"box {self.box}: sides are 1 to 256")
        inner = self.box[0] * self.itemsize
        if inner % 16:
            problems.append(f"rows of the box have {inner} bytes, no multiple of 16")
        if self.swizzle and inner > self.swizzle:
            problems.append(f"rows of the box ({inner} bytes) exceed the swizzle ({self.swizzle})")
        if any(n != 1 for n in self.element_strides):
            problems.append(f"element strides {self.element_strides} are not implemented")
        return problems

    def pack(self) -> np.ndarray:
        """128 bytes that hold the map."""

        def five(values: Sequence[int], default: int) -> tuple[int, ...]:
            return (*values, *[default] * (5 - len(values)))

        names = [name for name, _ in DEVICE_ELEMENT.values()]
        modes = {width: mode for mode, width in SWIZZLE_OF_MODE.items()}
        body = _LAYOUT.pack(
            self.base,
            *five([n & 0xFFFFFFFF for n in self.shape], 0),
            *five(self.strides, 0)[:4],
            *five(self.box, 0),
            *five(self.element_strides or (1,) * self.rank, 1),
            self.rank - 1,
            names.index(self.element),
            0,
            modes[self.swizzle],
            int(self.nan_fill),
        )
        return np.frombuffer(body + struct.pack("<2Q", _MAGIC, 0), np.uint8).copy()

    @staticmethod
    def unpack(data: np.ndarray) -> TensorMap:
        """The map in 128 bytes; ValueError if there is none or it is no good."""
        raw = np.ascontiguousarray(data, np.uint8).tobytes()
        if len(raw) != MAP_BYTES or struct.unpack_from("<Q", raw, _LAYOUT.size)[0] != _MAGIC:
            raise ValueError("no tensor map is there")
        values = _LAYOUT.unpack_from(raw)
        rank = values[20] + 1
        element, interleave, mode, fill = values[21:25]
        if interleave or element not in DEVICE_ELEMENT or mode not in SWIZZLE_OF_MODE or rank > 5:
            raise ValueError(
                f"tensor map: rank {rank}, element type {element}, interleave {interleave}, "
                f"swizzle {mode} are not all implemented"
            )
        made = TensorMap(
            base=values[0],
            shape=values[1 : 1 + rank],
            strides=values[6 : 6 + rank - 1],
            box=values[10 : 10 + rank],
            element=DEVICE_ELEMENT[element][0],
            swizzle=SWIZZLE_OF_MODE[mode],
            nan_fill=bool(fill),
            element_strides=values[15 : 15 + rank],
        )
        made.check()
        return made


FIELDS = {  # of tensormap.replace -> (format, offset, step per ordinal)
    "global_address": ("<Q", 0, 0),
    "global_dim": ("<I", 8, 4),
    "global_stride": ("<Q", 32, 8),
    "box_dim": ("<I", 64, 4),
    "element_stride": ("<I", 84, 4),
    "rank": ("<B", 104, 0),
    "elemtype": ("<B", 105, 0),
    "interleave_layout": ("<B", 106, 0),
    "swizzle_mode": ("<B", 107, 0),
    "fill_mode": ("<B", 108, 0),
}


def replace_field(data: np.ndarray, name: str, value: int, ordinal: int = 0) -> None:
    """tensormap.replace.tile.<name> on 128 bytes, in place.

    PTX takes rank - 1 for the rank; strides are in bytes. A map that has been zeroed, as Triton
    does first, becomes one with the first call.
    """
    form, offset, step = FIELDS[name]
    if (ordinal and not step) or not 0 <= ordinal < 5:
        raise ValueError(f"tensormap.replace: {name} has no ordinal {ordinal}")
    mask = (1 << 8 * struct.calcsize(form)) - 1
    packed = struct.pack(form, int(value) & mask)
    where = offset + step * ordinal
    data[where : where + len(packed)] = np.frombuffer(packed, np.uint8)
    data[_LAYOUT.size : _LAYOUT.size + 8] = np.frombuffer(struct.pack("<Q", _MAGIC), np.uint8)
