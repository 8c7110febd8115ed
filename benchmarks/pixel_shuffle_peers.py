"""Other ways to shuffle pixels and project: a function per peer.

Each takes a layout, the factor s, and returns a function of x ``[T, C]``, weight ``[N, s*s*C]`` and
bias that computes ``[sum gh*gw, N]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hrvlm_kernels import PackedGrids

Project = Callable[[Tensor, Tensor, Tensor], Tensor]
MakeProject = Callable[[PackedGrids, int], Project]


def shuffle(x: Tensor, packed: PackedGrids, factor: int) -> Tensor:
    """View, permute and contiguous, as in nanoVLM: a batch of equal sizes, or image by image."""
    grids, prefix, s = packed.grids or (), packed.num_prefix_tokens, factor
    if len(set(grids)) == 1:
        hp, wp = grids[0]
        patches = x.unflatten(0, (len(grids), packed.max_seqlen))[:, prefix:]
        return _shuffled(patches, hp, wp, s).flatten(0, 1)
    rows = [
        _shuffled(part[None, prefix:], hp, wp, s)[0]
        for part, (hp, wp) in zip(x.split(packed.lengths), grids, strict=True)
    ]
    return torch.cat(rows)


def _shuffled(patches: Tensor, hp: int, wp: int, s: int) -> Tensor:
    """``[B, hp*wp, C]`` to ``[B, gh*gw, s*s*C]``."""
    batch, _, channels = patches.shape
    x = patches.reshape(batch, hp // s, s, wp // s, s, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, -1, s * s * channels)


def copy_and_gemm(packed: PackedGrids, factor: int) -> Project:
    """View, permute, contiguous, and the library's GEMM."""
    return lambda x, weight, bias: F.linear(shuffle(x, packed, factor), weight, bias)


def gather_and_gemm(packed: PackedGrids, factor: int) -> Project:
    """One gather by an index made beforehand, and the library's GEMM."""
    index = packed.shuffle_index(factor)
    return lambda x, weight, bias: F.linear(x[index].flatten(1), weight, bias)


# What the name calls compiled is to be compiled with all that comes before it.
PEERS: dict[str, MakeProject] = {
    "view, permute, contiguous + GEMM": copy_and_gemm,
    "the same, compiled": copy_and_gemm,
    "index + GEMM": gather_and_gemm,
}
