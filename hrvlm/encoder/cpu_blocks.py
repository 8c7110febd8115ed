"""The blocks of an encoder on a CPU, without gradients, with little new memory.

A CPU pays for each page of new memory about as much as for computing what is written there. Here
attention's inputs, its result and the residual stream have one buffer each for all blocks, and what
stands between them goes through in chunks of rows: norm, product and RoPE, which leaves q, k and v
head by head; then the product behind attention, norm and MLP. Products are oneDNN's
(:mod:`hrvlm_kernels.cpu_products`), the GELU in the epilogue of its own; where bfloat16 has a
matrix unit, which wants weights packed, they are, once for all chunks of a block, from 640 rows on.

Where a module is more than plain, where somebody watches (torch.compile, traces, modes, transforms,
autocast), or another backend was asked for, blocks call their modules one by one, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from hrvlm_kernels import PackedGrids
from hrvlm_kernels.backends import choose_backend
from hrvlm_kernels.cpu_attention import attention
from hrvlm_kernels.cpu_products import CHUNK, dense, has_tiles, product, serves
from hrvlm_kernels.cpu_rope import are_plain, both_halves, cos_and_sin, rotate
from hrvlm_kernels.ops.varlen_attention import heads_by_runs

from .fused_blocks import blocks_of, is_plain_block, is_plain_product
from .kept_states import KeptStates
from .layers import GELU, EncoderAttention, EncoderLayer, EncoderMLP, is_plain_silu
from .plain_modules import is_plain

if TYPE_CHECKING:
    from .packed_encoder import PackedEncoder

MANY = 640  # rows, from which on packing a weight costs less than it saves
SAVED_CALLS = 16  # of attention in a block, from which on images are sorted
Product = Callable[[Tensor], Tensor]


def can_run(encoder: PackedEncoder, x: Tensor) -> bool:
    """Whether the blocks, if there are any, may run here, for these tokens ``[T, C]``."""
    return (
        are_plain(x)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0  # which no_grad does not end
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and len(encoder.layer) > 0
        and choose_backend("varlen_attention", encoder.backend, x) == "sdpa"
        and all(_is_plain_block(layer, x.dtype) for layer in blocks_of(encoder))
    )


def _is_plain_block(layer: EncoderLayer, dtype: torch.dtype) -> bool:
    return (
        is_plain_block(layer, dtype)
        and _is_plain_mlp(layer.mlp, dtype)
        and all(
            p is None or p.dtype == dtype for m in _others(layer) for p in m._parameters.values()
        )
    )


def _others(layer: EncoderLayer) -> tuple[nn.Module, ...]:
    """What else holds parameters: :meth:`parameters` would look for them everywhere, and long."""
    norms, scales = (layer.norm1, layer.norm2), (layer.layer_scale1, layer.layer_scale2)
    attention, mlp = layer.attention, layer.mlp
    gate = () if mlp.gate_proj is None else (mlp.gate_proj,)
    return (
        *norms, *scales, attention.qkv_bias, attention.o_proj, mlp.up_proj, mlp.down_proj, *gate
    )  # fmt: skip


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
    rope = layers[0].attention.rope(packed)  # one for all, as its table is
    angles = None if rope is None else both_halves(*cos_and_sin(*rope))
    if angles is not None and there is not None:
        angles = angles[0][there], angles[1][there]
    buffers = _Buffers.of(x, layers[0].attention, angles, lengths)
    products = _Products(len(x), serves(x))
    for i, layer in enumerate(layers, start=1):
        _write_heads(layer, products, buffers)
        for q, k, v, out in buffers.runs:
            out.copy_(attention(q, k, v, layer.attention.head_dim**-0.5))
        _add_updates(layer, products, buffers)
        if i in kept:
            kept.keep(i, x.clone() if back is None else x[back])
    x = x if back is None else x[back]
    return encoder.norm(x) if final_norm else x


class _Buffers(NamedTuple):
    """Views of the memory that all blocks write to.

    Attributes:
        qkv: For each chunk of rows: the stream, cos and sin, and where q and k go, and v,
            ``[t, 2, H, D]`` and ``[t, H, D]``.
        runs: For each run of equally long images q, k, v and the result, ``[B, H, L, D]``.
        updates: For each chunk the stream, and what attention wrote there.
    """

    qkv: list[tuple[Tensor, ...]]
    runs: list[tuple[Tensor, ...]]
    updates: list[tuple[Tensor, ...]]

    @classmethod
    def of(
        cls,
        x: Tensor,
        first: EncoderAttention,
        angles: tuple[Tensor, ...] | None,
        lengths: Sequence[int],
    ) -> _Buffers:
        """For this stream; q, k and v one after the other, since attention runs head by head."""
        heads = x.new_empty(3, first.num_heads, len(x), first.head_dim).transpose(1, 2)
        attended, rows = torch.empty_like(x), _rows_of_a_chunk(len(x))
        by_rows = x, *(angles or ()), heads[:2].transpose(0, 1), heads[2]
        return cls(
            list(zip(*(a.split(rows) for a in by_rows), strict=True)),
            heads_by_runs(lengths, *heads, attended.view(heads.shape[1:])),
            list(zip(x.split(rows), attended.split(rows), strict=True)),
        )


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


class _Products(NamedTuple):
    """The products of a forward.

    Attributes:
        total: Rows of all.
        by_onednn: Who computes them.
    """

    total: int
    by_onednn: bool

    def of(self, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Product:
        """``x @ weight.T + bias``, and its GELU."""
        if not self.by_onednn:
            linear = partial(F.linear, weight=weight, bias=bias)
            return (lambda x: F.gelu(linear(x))) if gelu else linear
        stored = dense(weight)
        if weight.dtype == torch.bfloat16 and self.total >= MANY and has_tiles():
            stored = torch.ops.mkldnn._reorder_linear_weight(stored, _rows_of_a_chunk(self.total))
        return partial(product, weight=stored, bias=bias, gelu=gelu)


def _write_heads(layer: EncoderLayer, products: _Products, buffers: _Buffers) -> None:
    module, norm = layer.attention, layer.norm1
    qkv = products.of(module.qkv.weight, module.qkv_bias.joined())
    for part, *angles, to_qk, to_v in buffers.qkv:
        qk, v = qkv(norm(part)).unflatten(1, (3, *to_v.shape[1:])).split((2, 1), 1)
        if angles:
            cos, sin = angles
            rotate(qk, cos, sin, to_qk)
        else:
            to_qk.copy_(qk)
        to_v.copy_(v[:, 0])


def _add_updates(layer: EncoderLayer, products: _Products, buffers: _Buffers) -> None:
    mlp, norm = layer.mlp, layer.norm2
    o, down = (products.of(m.weight, m.bias) for m in (layer.attention.o_proj, mlp.down_proj))
    inner = _inner(mlp, products)
    scales = layer.layer_scale1.lambda1, layer.layer_scale2.lambda1
    for part, update in buffers.updates:
        part.addcmul_(o(update), scales[0])
        part.addcmul_(down(inner(norm(part))), scales[1])


def _rows_of_a_chunk(count: int) -> int:
    """Equal chunks, but for the last one, of whole blocks of 64 rows."""
    chunks = -(-count // CHUNK)
    return -(-count // (64 * chunks)) * 64


def _inner(mlp: EncoderMLP, products: _Products) -> Product:
    up = products.of(mlp.up_proj.weight, mlp.up_proj.bias, gelu=mlp.gate_proj is None)
    if mlp.gate_proj is None:
        return up
    gate = products.of(mlp.gate_proj.weight, mlp.gate_proj.bias)
    return lambda x: F.silu(gate(x), inplace=True).mul_(up(x))
