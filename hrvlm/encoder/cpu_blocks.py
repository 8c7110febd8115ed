"""The blocks of an encoder on a CPU, without gradients, with little new memory.

A CPU pays for each page of new memory about as much as for computing what is written there. Here
attention's inputs, its result and the residual stream have one buffer each for all blocks, and what
stands between them goes through in chunks of rows: norm, product and RoPE, which leaves q, k and v
head by head; then the product behind attention, norm and MLP. The GELU is in its product's epilogue
(oneDNN), and in bfloat16 weights are packed once for all chunks of a block, from 640 rows on.

Where a module is more than plain, where somebody watches (torch.compile, traces, modes, transforms,
autocast), or another backend was asked for, blocks call their modules one by one, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from hrvlm_kernels import PackedGrids
from hrvlm_kernels.backends import choose_backend
from hrvlm_kernels.cpu_rope import are_plain, cos_and_sin, rotate
from hrvlm_kernels.ops.varlen_attention import sdpa_by_runs

from .fused_blocks import GELU, blocks_of, is_plain_block, is_plain_product
from .kept_states import KeptStates
from .layers import EncoderLayer, EncoderMLP, is_plain_silu
from .plain_modules import is_plain

if TYPE_CHECKING:
    from .packed_encoder import PackedEncoder

CHUNK = 1024  # rows at most
MANY = 640  # rows, from which on packing a weight costs less than it saves
SAVED_CALLS = 16  # of attention in a block, from which on images are sorted
Product = Callable[[Tensor], Tensor]


def can_run(encoder: PackedEncoder, x: Tensor) -> bool:
    """Whether the blocks may run here, for these tokens ``[T, C]``."""
    return (
        are_plain(x)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0  # which no_grad does not end
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and choose_backend("varlen_attention", encoder.backend, x) == "sdpa"
        and all(_is_plain_block(layer, x.dtype) for layer in blocks_of(encoder))
    )


def _is_plain_block(layer: EncoderLayer, dtype: torch.dtype) -> bool:
    return (
        is_plain_block(layer, dtype)
        and _is_plain_mlp(layer.mlp, dtype)
        and all(p.dtype == dtype for p in layer.parameters())
    )


def _is_plain_mlp(mlp: EncoderMLP, dtype: torch.dtype) -> bool:
    up, gate, act = mlp.up_proj, mlp.gate_proj, mlp.act_fn
    if not is_plain_product(up, dtype):
        return False
    if gate is None:
        return is_plain(act, GELU)
    return is_plain_product(gate, dtype) and is_plain_silu(act)


def infer(
    encoder: PackedEncoder, x: Tensor, packed: PackedGrids, kept: KeptStates, final_norm: bool
) -> Tensor:
    """As :func:`.fused_blocks.infer`, on a CPU; overwrites `x`, too."""
    layers = blocks_of(encoder)
    lengths: Sequence[int] = packed.lengths
    there = _rows_by_length(lengths)
    if there is not None:
        x, lengths = x[there], sorted(lengths)
    back = None if there is None else there.argsort()
    rope = layers[0].attention.rope(packed) if layers else None  # one for all, as its table is
    angles = None if rope is None else cos_and_sin(*rope)
    if angles is not None and there is not None:
        angles = tuple(a[there] for a in angles)
    attended, heads = torch.empty_like(x), None
    for i, layer in enumerate(layers, start=1):
        attention = layer.attention
        if heads is None:  # of q, k and v, one after the other: attention runs head by head
            heads = x.new_empty(3, attention.num_heads, len(x), attention.head_dim)
        _write_heads(layer, x, angles, heads.permute(2, 0, 1, 3))
        written = 0
        q, k, v = heads.transpose(1, 2)
        for out in sdpa_by_runs(q, k, v, lengths, attention.head_dim**-0.5):
            attended[written : written + len(out)] = out.flatten(1)
            written += len(out)
        _add_updates(layer, x, attended)
        if i in kept:
            kept.keep(i, x.clone() if back is None else x[back])
    x = x if back is None else x[back]
    return encoder.norm(x) if final_norm else x


def _rows_by_length(lengths: Sequence[int]) -> Tensor | None:
    """The rows of the images from short to long, where that saves attention many calls."""
    changes = sum(a != b for a, b in pairwise(lengths))
    if changes - len(set(lengths)) < SAVED_CALLS:
        return None
    count = torch.tensor(lengths)
    order = count.argsort(stable=True)
    starts, sizes = (count.cumsum(0) - count)[order], count[order]
    before = sizes.cumsum(0) - sizes
    return torch.arange(sum(lengths)) + (starts - before).repeat_interleave(sizes)


def _write_heads(
    layer: EncoderLayer, x: Tensor, angles: tuple[Tensor, ...] | None, heads: Tensor
) -> None:
    """q, k and v into `heads` ``[T, 3, H, D]``, q and k rotated."""
    attention, rows = layer.attention, _rows_of_a_chunk(len(x))
    product = _product(attention.qkv.weight, attention.qkv_bias.joined(), len(x))
    parts = None if angles is None else [a.split(rows) for a in angles]
    for i, (part, out) in enumerate(zip(x.split(rows), heads.split(rows), strict=True)):
        new = product(layer.norm1(part)).unflatten(1, out.shape[1:])
        if parts is None:
            out.copy_(new)
        else:
            rotate(new[:, :2], parts[0][i], parts[1][i], out[:, :2])
            out[:, 2] = new[:, 2]


def _add_updates(layer: EncoderLayer, x: Tensor, attended: Tensor) -> None:
    mlp, rows = layer.mlp, _rows_of_a_chunk(len(x))
    o, down = (_product(m.weight, m.bias, len(x)) for m in (layer.attention.o_proj, mlp.down_proj))
    inner = _inner(mlp, len(x))
    for part, update in zip(x.split(rows), attended.split(rows), strict=True):
        part.addcmul_(o(update), layer.layer_scale1.lambda1)
        part.addcmul_(down(inner(layer.norm2(part))), layer.layer_scale2.lambda1)


def _rows_of_a_chunk(count: int) -> int:
    """Equal chunks, but for the last one, of whole blocks of 64 rows."""
    chunks = -(-count // CHUNK)
    return -(-count // (64 * chunks)) * 64


def _inner(mlp: EncoderMLP, count: int) -> Product:
    up = _product(mlp.up_proj.weight, mlp.up_proj.bias, count, gelu=mlp.gate_proj is None)
    if mlp.gate_proj is None:
        return up
    gate = _product(mlp.gate_proj.weight, mlp.gate_proj.bias, count)
    return lambda x: F.silu(gate(x), inplace=True).mul_(up(x))


def _product(weight: Tensor, bias: Tensor | None, count: int, *, gelu: bool = False) -> Product:
    """``x @ weight.T + bias``, and its GELU, for `count` rows in all.

    In float32 without a GELU the library that F.linear calls is as fast.
    """
    onednn, is_half = torch.ops.mkldnn, weight.dtype == torch.bfloat16
    serves = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if is_half:
        serves = serves and onednn._is_mkldnn_bf16_supported()
    if not serves or count < MANY or not (gelu or is_half):
        return lambda x: F.gelu(F.linear(x, weight, bias)) if gelu else F.linear(x, weight, bias)
    stored = weight.detach()
    if is_half:
        stored = onednn._reorder_linear_weight(stored, _rows_of_a_chunk(count))
    how: tuple[str, list[None], str] = ("gelu", [], "none") if gelu else ("none", [], "")
    return lambda x: onednn._linear_pointwise(x, stored, bias, *how)
