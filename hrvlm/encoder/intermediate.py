"""Which blocks are asked for, and their tokens divided into patches, CLS and registers."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .output import EncoderOutput, PackedEncoderOutput

# Of a batch one tensor; of images of different shapes one for each.
ByImage: TypeAlias = Tensor | tuple[Tensor, ...]


def block_indices(n: int | Sequence[int], num_blocks: int) -> list[int]:
    """The blocks that `n` names, from 0 on in ascending order: the last n, or these.

    Raises:
        TypeError: `n` is neither.
        ValueError: there is no such block, or there are fewer than n.
    """
    if hasattr(n, "__index__") and not isinstance(n, bool) and not getattr(n, "ndim", 0):
        n = index(n)
        if not 1 <= n <= num_blocks:
            raise ValueError(f"n={n}: expected 1 to {num_blocks} blocks, or a list of blocks")
        return list(range(num_blocks - n, num_blocks))
    chosen = _ints("n", n, "an int or a list of ints")
    for i in chosen:
        if not -num_blocks <= i < num_blocks:
            raise ValueError(f"n: block {i} is outside -{num_blocks}..{num_blocks - 1}")
    return sorted({i % num_blocks for i in chosen})


def layer_indices(out_indices: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """`out_indices` of the encoder's forward counted from 0, the embeddings, in their own order.

    Raises:
        TypeError: it is no list of ints.
        ValueError: there is no such layer.
    """
    kept = []
    for i in () if out_indices is None else _ints("out_indices", out_indices, "a list of ints"):
        if not -num_layers - 1 <= i <= num_layers:
            raise ValueError(f"out_indices: {i} is outside -{num_layers + 1}..{num_layers}")
        kept.append(i if i >= 0 else num_layers + 1 + i)
    return tuple(kept)


def _ints(name: str, numbers: Any, expected: str) -> list[int]:
    try:
        return [index(number) for number in numbers]
    except TypeError:
        raise TypeError(f"{name}={numbers!r:.60}: expected {expected}") from None


def by_image(
    tokens: Tensor, output: EncoderOutput | PackedEncoderOutput, num_prefix_tokens: int
) -> tuple[ByImage, Tensor, Tensor]:
    """Patches, CLS ``[B, C]`` and registers ``[B, R, C]`` of the tokens of a layer.

    Args:
        tokens: ``[B, P + n, C]`` of a batch, or packed ``[T, C]``.
        output: The forward's that they come from.
        num_prefix_tokens: P.

    Returns:
        Patches as ``[B, n, C]``, or as a tuple of ``[n_i, C]``, and the others.
    """
    if isinstance(output, EncoderOutput):
        return tokens[:, num_prefix_tokens:], tokens[:, 0], tokens[:, 1:num_prefix_tokens]
    first = output.packed.cu_seqlens[:-1, None].long()
    prefix = tokens[first + torch.arange(num_prefix_tokens, device=first.device)]  # [B, P, C]
    patches = tuple(own[num_prefix_tokens:] for own in output.packed.split(tokens))
    return patches, prefix[:, 0], prefix[:, 1:]


def as_maps(
    patches: ByImage,
    output: EncoderOutput | PackedEncoderOutput,
    pixel_values: Tensor | Sequence[Tensor],
    patch_size: int,
) -> ByImage:
    """Patches of :func:`by_image` as maps: ``[B, C, hp, wp]``, or a tuple of ``[C, hp, wp]``."""
    if isinstance(patches, Tensor):
        assert isinstance(pixel_values, Tensor)
        grid = tuple(side // patch_size for side in pixel_values.shape[-2:])
        return patches.transpose(1, 2).unflatten(2, grid).contiguous()
    assert isinstance(output, PackedEncoderOutput)
    return tuple(
        own.T.unflatten(1, grid).contiguous()
        for own, grid in zip(patches, output.grids, strict=True)
    )
