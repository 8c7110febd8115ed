"""The arguments of a Triton launch as a kernel's parameters: the bytes that the hardware would see.

Triton's launcher passes, in order: what is no constexpr, tensors as addresses, tensor descriptors
as several parameters; then the addresses of two scratch buffers. (triton/backends/nvidia/driver.py
and driver.c; private, and checked against the parameters that the PTX declares.)
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from triton.runtime.jit import TensorWrapper

from .global_memory import GlobalMemory
from .tensor_map import TensorMap

_INTS = {
    "i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q",
    "u1": "<B", "u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q",
}  # fmt: skip
# Element types of a CUtensorMap by their numbers in a map made on the device: those of cuda.h.
_DEVICE_TO_HOST_TYPE = {8: 10, 9: 8, 10: 9}
_TF32 = 11  # of float32 that TMA rounds
_NOWHERE = 16  # the address of an empty tensor: near no other, and a kernel must not read it


class Arguments:
    """Allows the tensors of a launch in `memory`, and packs parameters.

    Tensors of one storage are one region: from their first to their last element.
    """

    def __init__(self, memory: GlobalMemory) -> None:
        self.memory = memory
        self.kept: list[torch.Tensor] = []  # what no one else holds
        self._shift: dict[int, int] = {}  # storage -> device address less host address

    def allow(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        """Make these (name, tensor) part of the kernel's memory."""
        pieces = defaultdict(list)
        for name, x in tensors:
            if x.numel():
                pieces[x.untyped_storage().data_ptr()].append((name, x.data_ptr(), _span(x)))
        for storage, inside in pieces.items():
            self._shift[storage] = self.memory.add(inside)

    def address(self, x: torch.Tensor | None) -> int:
        """The device address of an allowed tensor."""
        if x is None:
            return 0
        if not x.numel():
            return _NOWHERE
        return x.data_ptr() + self._shift[x.untyped_storage().data_ptr()]

    def pack(self, name: str, kind: str, value: Any) -> bytes:
        """One parameter of Triton's type `kind`: "*fp32", "i32", ..."""
        if kind.startswith("*"):
            return struct.pack("<Q", self.address(value))
        if kind in _INTS:
            return struct.pack(_INTS[kind], value)
        if kind == "fp16":
            return struct.pack("<e", value)
        if kind == "bf16":  # cut, not rounded
            return struct.pack("<f", value)[2:]
        if kind in ("fp32", "f32"):
            return struct.pack("<f", value)
        if kind == "fp64":
            return struct.pack("<d", value)
        raise NotImplementedError(f"argument {name} of type {kind}")

    def descriptor(self, value: Any, meta: dict[str, Any] | None) -> Iterator[bytes]:
        """A tensor descriptor made by the host: a map of the hardware if `meta` says how."""
        base = self.address(value.base)
        sizes = [struct.pack("<i", n) for n in value.shape]
        steps = [struct.pack("<q", n) for n in value.strides]
        nan, rounds = value.padding == "nan", getattr(value, "round_f32_to_tf32", None)
        if meta is None:  # before sm_90: a pointer, and the shape and strides twice
            yield struct.pack("<Q", base)
            yield from (struct.pack("<q", n) for n in value.shape)
            yield from (*steps, struct.pack("<b", nan))
            if rounds is not None:  # since Triton 3.7
                yield struct.pack("<b", rounds)
        elif meta.get("fp4_padded") or meta.get("is_im2col"):
            raise NotImplementedError(f"a tensor descriptor with {meta}")
        else:
            kind = _TF32 if rounds else meta["elem_type"]
            kind = _DEVICE_TO_HOST_TYPE.get(kind, kind)
            yield TensorMap.host(
                base, meta["swizzle"], meta["elem_size"], kind, meta["block_size"],
                value.shape, value.strides, int(nan),
            ).pack().tobytes()  # fmt: skip
        yield from (*sizes, *steps)


def _span(x: torch.Tensor) -> int:
    """Bytes from the first to the last element of a tensor."""
    last = sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


def _flat(name: str, kind: Any, value: Any) -> Iterator[tuple[str, str, Any]]:
    """(name, type, value) of an argument, or of each item of a tuple."""
    if isinstance(kind, tuple):
        for k, (item, inner) in enumerate(zip(kind, value, strict=True)):
            yield from _flat(f"{name}[{k}]", item, inner)
    elif isinstance(kind, str):
        yield name, kind, value.base if isinstance(value, TensorWrapper) else value
    else:
        raise NotImplementedError(f"argument {name} of type {kind}")


def parameters(
    signature: dict[str, Any],
    args: tuple[Any, ...],
    tensordesc_meta: list[dict[str, Any]] | None,
    arguments: Arguments,
) -> list[bytes]:
    """The parameters of a launch, without the scratch buffers.

    `signature` has Triton's types; `args` are the values of all of its names, constexpr too.
    """
    both = zip(signature.items(), args, strict=True)
    flat = [part for (name, kind), value in both for part in _flat(name, kind, value)]
    arguments.allow(
        [(n, v.base) for n, kind, v in flat if kind.startswith("tensordesc")]
        + [(n, v) for n, kind, v in flat if kind.startswith("*") and v is not None]
    )
    metas = iter(tensordesc_meta or [])
    params: list[bytes] = []
    for name, kind, value in flat:
        if kind.startswith("tensordesc"):
            params += arguments.descriptor(value, next(metas, None))
        elif kind != "constexpr":
            params.append(arguments.pack(name, kind, value))
    return params
