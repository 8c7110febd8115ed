"""The documented limits of a TMA descriptor (CUDA Driver API, cuTensorMapEncodeTiled)."""

from __future__ import annotations

from collections.abc import Sequence

_SWIZZLE_SPAN = {0: None, 1: 32, 2: 64, 3: 128}  # CUtensorMapSwizzle -> bytes of a row of the box


def check_tensor_map(
    address: int,
    swizzle: int,
    itemsize: int,
    box: Sequence[int],
    shape: Sequence[int],
    strides: Sequence[int],
) -> None:
    """Raise ValueError unless the driver would take the descriptor.

    Args:
        address: Of the first element.
        swizzle: 0 none, 1 32 bytes, 2 64 bytes, 3 128 bytes.
        itemsize: Bytes of an element.
        box: Block that one copy loads, outermost first, in elements.
        shape: Of the tensor, likewise.
        strides: Likewise; the last is 1.
    """
    boxes, sizes = list(box)[::-1], list(shape)[::-1]
    steps = [stride * itemsize for stride in strides[:-1]][::-1]  # bytes, inner dimensions first
    if not 1 <= len(sizes) <= 5:
        raise ValueError(f"rank {len(sizes)} is not 1 to 5")
    if address % 16:
        raise ValueError(f"address {address:#x} is not a multiple of 16")
    if strides[-1] != 1:
        raise ValueError(f"the last stride is {strides[-1]}, not 1")
    for size in sizes:
        if not 1 <= size <= 1 << 32:
            raise ValueError(f"shape {tuple(shape)}: {size} is not 1 to 2**32")
    for length in boxes:
        if not 1 <= length <= 256:
            raise ValueError(f"box {tuple(box)}: {length} is not 1 to 256")
    for i, step in enumerate(steps):
        least = sizes[i] * (steps[i - 1] if i else itemsize)
        if step % 16 or step >= 1 << 40 or step < least or (i and step % steps[i - 1]):
            raise ValueError(
                f"strides {tuple(strides)}: {step} bytes must be a multiple of 16 and of the "
                f"stride inside, below 2**40 and at least {least}"
            )
    row, span = boxes[0] * itemsize, _SWIZZLE_SPAN[swizzle]
    if row % 16 or (span is not None and row > span):
        raise ValueError(f"box {tuple(box)}: a row of {row} bytes does not fit swizzle {swizzle}")
