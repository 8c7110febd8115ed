"""Features that have the same bits whatever an image is packed with: ``batch_invariant=True``.

The kernels of this project give an image the same bits alone and packed; the libraries that compute
the products (cuBLAS, MKL, oneDNN) and torch's attention do not: by the number of rows they choose
tiles, split sums and divide work among threads, and by the address of an image's first row how they
load it. Here every image goes through the model in tensors of its own, whose shapes and alignment
depend on the image alone, so that there is nothing left that could differ.

Products in blocks of a fixed number of rows, over the images of a pack, would start fewer kernels.
But then a row's place in its block depends on the pack, and that a library gives a row the same
bits at every place is not promised by any of them (where it cuts sums by tile, it can't), nor would
it hold of what a module computes over all rows it gets, as dynamic quantisation does.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hrvlm_kernels import PackedGrids
from hrvlm_kernels.traced_grids import TracedGrids


def encode_by_image(
    encode: Callable[[Tensor, PackedGrids, Tensor | None], dict[str, Any]],
    patches: Tensor,
    packed: PackedGrids,
    masked: Tensor | None,
) -> dict[str, Any]:
    """What `encode` gives for each image by itself, one after the other.

    Args:
        encode: Patches, their layout and a mask to packed fields ``[T, C]``; one that ends in
            ``attentions`` has the tokens last.
        patches: ``[N, 3*p*p]``.
        packed: Their layout.
        masked: ``[N]`` or None.

    Raises:
        ValueError: a graph for any number of images is being written.
    """
    if isinstance(packed, TracedGrids):
        raise ValueError(
            "batch_invariant=True: a graph for any number of images runs them together; "
            "set encoder.batch_invariant = False to export"
        )
    if not len(packed):
        return encode(patches, packed, masked)
    prefix, alone = packed.num_prefix_tokens, []
    counts = [length - prefix for length in packed.lengths]
    masks = [None] * len(packed) if masked is None else masked.split(counts)
    starts = accumulate(packed.lengths, initial=0)
    for grid, length, start, rows, mask in zip(
        packed.grids or (), packed.lengths, starts, patches.split(counts), masks, strict=False
    ):
        one = PackedGrids.from_grids([grid], num_prefix_tokens=prefix, device=packed.device)
        one = one.with_coords(packed.coords[start : start + length].clone())
        alone.append(encode(rows.clone(), one, mask))
    return {name: _joined([fields[name] for fields in alone], name) for name in alone[0]}


def _joined(values: list[Any], name: str) -> Any:
    if values[0] is None:
        return None
    if isinstance(values[0], tuple):
        return tuple(_joined(list(layer), name) for layer in zip(*values, strict=True))
    return torch.cat(values, dim=-1 if name.endswith("attentions") else 0)
