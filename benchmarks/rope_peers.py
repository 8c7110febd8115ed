"""Other implementations of DINOv3's rotary embedding: a function per peer.

Each takes a layout and the frequencies and returns a function of q and k ``[T, H, D]``. Their
tables of cos and sin are made outside it, since the layers of a model share them; ours makes the
angles in the kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

from benchmarks.attention_peers import installed
from benchmarks.case import Unavailable
from hrvlm_kernels import PackedGrids
from hrvlm_kernels.reference import rope_angles

Rotate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
MakeRotate = Callable[[PackedGrids, Tensor, torch.dtype], Rotate]


def transformers_rope(packed: PackedGrids, inv_freq: Tensor, dtype: torch.dtype) -> Rotate:
    """The function of transformers, with cos and sin in the dtype of the pixels as there.

    On images of one size as it runs there: ``[B, H, n, D]``, prefix tokens split off and joined
    again. Mixed sizes have no such form: the pack is one sequence, whose prefix rows have angle 0.
    """
    angles = rope_angles(packed.coords, inv_freq).tile(2)  # [T, D]
    uniform = packed.grids is not None and len(set(packed.grids)) == 1
    if uniform:
        angles = angles[packed.num_prefix_tokens : packed.lengths[0]]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    shape = (len(packed), packed.max_seqlen) if uniform else (1, packed.total_tokens)

    def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (a.unflatten(0, shape).transpose(1, 2) for a in (q, k))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q.transpose(1, 2).flatten(0, 1), k.transpose(1, 2).flatten(0, 1)

    return rotate


def transformers_rope_compiled(packed: PackedGrids, inv_freq: Tensor, dtype: torch.dtype) -> Rotate:
    """The same under torch.compile."""
    return torch.compile(transformers_rope(packed, inv_freq, dtype), dynamic=False)


def half_tables(packed: PackedGrids, inv_freq: Tensor, dtype: torch.dtype) -> Rotate:
    """flash-attn's formula, in torch: tables of ``D / 2`` and both halves written once; compiled.

    ``layers/rotary.py`` there, ``interleaved=False``.
    """
    angles = rope_angles(packed.coords, inv_freq)[:, None]  # [T, 1, D / 2]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def turn(a: Tensor) -> Tensor:
        first, second = a.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return torch.compile(lambda q, k: (turn(q), turn(k)), dynamic=False)


def flash_attn_rotary(packed: PackedGrids, inv_freq: Tensor, dtype: torch.dtype) -> Rotate:
    """flash-attn's rotary kernel, the pack as one sequence; q and k in a launch each."""
    if not installed("flash_attn.layers.rotary"):
        raise Unavailable("flash-attn is not installed")
    from flash_attn.layers.rotary import apply_rotary_emb

    angles = rope_angles(packed.coords, inv_freq)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return lambda q, k: (
        apply_rotary_emb(q[None], cos, sin)[0],
        apply_rotary_emb(k[None], cos, sin)[0],
    )


PEERS: dict[str, MakeRotate] = {
    "transformers, eager": transformers_rope,
    "transformers, compiled": transformers_rope_compiled,
    "flash-attn's formula, compiled": half_tables,
    "flash-attn's rotary kernel": flash_attn_rotary,
}
