"""The blocks of an encoder as one run, where the kernels can join what stands between its modules.

A block calls its modules one by one, and so it stays where one of them is more than plain, where a
graph is written down, under autocast, with checkpointing, and without the kernels. Else the blocks
run here, with fewer passes over the tokens:

Inference folds LayerScale into the weights of the two products before it, which then add to the
residual stream in place (the summand C of a matrix product). Their biases, scaled, are left out of
the stream and added by the norms that read it:

    stream += a (lambda1 W_o)^T;  shift += lambda1 b_o;  normed = norm(stream + shift)

The up-projection takes its activation along where that was measured to pay, or was asked for
(:mod:`hrvlm_kernels.ops.linear_gelu`), and the product that makes q and k their rotation, in
training too (:mod:`hrvlm_kernels.ops.linear_rope_2d`).

What is folded is made again when a weight has another version or address, when a module was
replaced, and after a step of any optimizer of torch: the average of a teacher's weights, which
follows one, is often written through ``.data``, and that counts no version.

Training joins each residual connection with the norm behind it, the second one with the next
block's first norm or the final one (:mod:`hrvlm_kernels.ops.linear_residual_layer_norm`), GELU with
the bias before it, and the gradients of q, k and v.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hrvlm_kernels import PackedGrids, varlen_attention
from hrvlm_kernels.backends import choose_backend
from hrvlm_kernels.ops.bias_gelu import bias_gelu
from hrvlm_kernels.ops.linear_gelu import linear_gelu, takes_kernel
from hrvlm_kernels.ops.linear_residual_layer_norm import (
    linear_residual_layer_norm,
    shifted_layer_norm,
)
from hrvlm_kernels.ops.linear_rope_2d import linear_rope_2d
from hrvlm_kernels.ops.linear_swiglu import linear_swiglu
from hrvlm_kernels.ops.residual_layer_norm import MAX_WIDTH
from hrvlm_kernels.ops.varlen_attention import MAX_HEAD_DIM
from hrvlm_kernels.qkv_attention import qkv_attention

from .kept_states import KeptStates
from .layers import (
    GELU,
    EncoderAttention,
    EncoderLayer,
    EncoderMLP,
    LayerScale,
    QKVBias,
    QKVLinear,
    is_plain_silu,
)
from .plain_modules import is_plain

if TYPE_CHECKING:
    from .packed_encoder import PackedEncoder


# Steps of optimizers so far; tensors, their versions and their addresses.
_Stamp = tuple[int, tuple[tuple[Tensor, int, int], ...]]
_Parts = tuple[int, int]  # how often modules of attention and MLP were replaced


class _Folded(NamedTuple):
    """The weights of a block for inference.

    Attributes:
        of: What they were made of, and how often modules around that had been replaced.
        before: What is left out of the stream before the block, float32; None for nothing.
        o_weight: ``lambda1 W_o``.
        between: `before` with ``lambda1 b_o``.
        down_weight: ``lambda2 W_down``.
        after: `between` with ``lambda2 b_down``.
    """

    of: tuple[_Stamp, _Parts]
    before: Tensor | None
    o_weight: Tensor
    between: Tensor | None
    down_weight: Tensor
    after: Tensor | None


# Not attributes of the modules, which are copied, saved and moved with all that they have.
_folded: WeakKeyDictionary[EncoderLayer, _Folded] = WeakKeyDictionary()
_joined: WeakKeyDictionary[QKVBias, tuple[_Stamp, Tensor | None]] = WeakKeyDictionary()
_steps = 0


def forget(layers: Iterable[nn.Module]) -> None:
    """Drop the folded weights of these blocks; the next inference makes them again."""
    for layer in layers:
        if isinstance(layer, EncoderLayer):
            _folded.pop(layer, None)
            _joined.pop(layer.attention.qkv_bias, None)


class Held:
    """The folded weights that a recorded graph reads, kept for as long as the graph.

    Args:
        layers: The blocks, which have just run in inference.
    """

    def __init__(self, layers: Iterable[nn.Module]):
        known = [(layer, _folded.get(layer)) for layer in layers if isinstance(layer, EncoderLayer)]
        self._blocks = [(layer, folded) for layer, folded in known if folded is not None]
        self._biases = [_joined[layer.attention.qkv_bias] for layer, _ in self._blocks]

    @torch.inference_mode(False)
    @torch.no_grad()
    def renew(self) -> None:
        """Write them again, in place, from the first weight on that has changed.

        Raises:
            RuntimeError: a weight has been moved or replaced, so that the graph reads another.
        """
        before, changed = None, False
        for i, (layer, folded) in enumerate(self._blocks):
            sources, bias = _sources(layer), layer.attention.qkv_bias
            joined_of, joined = self._biases[i]
            if not changed and _is_fresh(folded, layer):
                before = folded.after
            else:
                self._check(folded.of[0], sources)
                new, changed = _fold_now(layer, before), True
                for old, fresh in zip(folded[2:], new[2:], strict=True):
                    if old is not None and fresh is not None:
                        old.copy_(fresh)
                folded = folded._replace(of=new.of)
                self._blocks[i], before = (layer, folded), folded.after
            biases = bias.q_bias, bias.k_bias, bias.v_bias
            if joined is not None and not _is_of(joined_of, biases):
                self._check(joined_of, biases)
                joined.copy_(cast("Tensor", bias.joined()))
                self._biases[i] = _stamp(biases), joined

    @staticmethod
    def _check(stamp: _Stamp, sources: Iterable[Tensor | None]) -> None:
        present = [a for a in sources if a is not None]
        if len(present) != len(stamp[1]) or any(
            a is not b or a.data_ptr() != address
            for a, (b, _, address) in zip(present, stamp[1], strict=True)
        ):
            raise RuntimeError(
                "graphed: the encoder's weights have been moved or replaced since the graphs were "
                "captured; make a new one by encoder.graphed()"
            )


def can_run(encoder: PackedEncoder, x: Tensor) -> bool:
    """Whether the blocks may run here, for these tokens ``[T, C]``."""
    if torch.compiler.is_compiling() or x.shape[1] > MAX_WIDTH:
        return False
    if choose_backend("residual_layer_norm", encoder.backend, x) != "triton":
        return False
    if torch.is_autocast_enabled(x.device.type):  # a question that not every device knows
        return False
    if encoder.training and encoder.gradient_checkpointing:
        return False
    return all(is_plain_block(layer, x.dtype) for layer in blocks_of(encoder))


def blocks_of(encoder: PackedEncoder) -> list[EncoderLayer]:
    """Its blocks."""
    return cast("list[EncoderLayer]", list(encoder.layer))


def is_plain_block(layer: EncoderLayer, dtype: torch.dtype) -> bool:
    """Whether all of a block but what is inside its MLP may be read past its modules' calls."""
    if not is_plain(layer, EncoderLayer):
        return False
    attention, mlp = layer.attention, layer.mlp
    return (
        is_plain(attention, EncoderAttention)
        and is_plain(mlp, EncoderMLP)
        and is_plain(attention.qkv, QKVLinear)
        and attention.qkv.bias is None
        and is_plain(attention.qkv_bias, QKVBias)
        and attention.head_dim <= MAX_HEAD_DIM
        and all(is_plain(m, nn.LayerNorm) for m in (layer.norm1, layer.norm2))
        and all(is_plain(m, LayerScale) for m in (layer.layer_scale1, layer.layer_scale2))
        and attention.qkv.weight.dtype == dtype
        and all(is_plain_product(m, dtype) for m in (attention.o_proj, mlp.down_proj))
    )


def is_plain_product(linear: nn.Linear, dtype: torch.dtype) -> bool:
    """Whether a product may be computed past its module's call, in this dtype."""
    if not is_plain(linear, nn.Linear):
        return False
    weight = linear.weight
    return weight.dtype == dtype and not weight.is_inference()  # these count no versions


def infer(
    encoder: PackedEncoder, x: Tensor, packed: PackedGrids, kept: KeptStates, final_norm: bool
) -> Tensor:
    """The blocks and the final norm without gradients; overwrites `x`.

    Args:
        encoder: Its blocks can run here.
        x: ``[T, C]``, the embeddings.
        packed: The layout.
        kept: Takes what blocks return.
        final_norm: Whether the final norm is applied.
    """
    backend = encoder.backend
    shift: Tensor | None = None
    for i, layer in enumerate(blocks_of(encoder), start=1):
        folded, attention = _fold(layer, shift), layer.attention
        normed = _norm(layer.norm1, x, folded.before)
        (q, k, v), rope = _qkv_without_gradient(attention, normed, packed, backend)
        out = varlen_attention(
            q, k, v, packed, attention.head_dim**-0.5, rope=rope, backend=backend
        )
        del normed, q, k, v  # memory peaks in the MLP
        x.addmm_(out.flatten(1), folded.o_weight.T)
        del out
        inner = _inner_without_gradient(layer.mlp, _norm(layer.norm2, x, folded.between), backend)
        x.addmm_(inner, folded.down_weight.T)
        shift = folded.after
        if i in kept:
            kept.keep(i, _whole(x, shift))
    return _norm(encoder.norm, x, shift) if final_norm else _whole(x, shift)


def _whole(x: Tensor, shift: Tensor | None) -> Tensor:
    return x.clone() if shift is None else (x + shift).to(x.dtype)


def train(
    encoder: PackedEncoder, x: Tensor, packed: PackedGrids, kept: KeptStates, final_norm: bool
) -> Tensor:
    """As :func:`infer`, with gradients; leaves `x` as it is.

    A state that is kept is not joined with the norm behind it, so that all that comes after it is
    made of it, as its gradient tells.
    """
    layers = blocks_of(encoder)
    norms: list[Any] = [layer.norm1 for layer in layers[1:]]
    norms += [encoder.norm if final_norm else None]
    normed = layers[0].norm1(x) if layers else encoder.norm(x) if final_norm else x
    for i, (layer, norm) in enumerate(zip(layers, norms, strict=True), start=1):
        attention, bias = layer.attention, layer.attention.qkv_bias
        out = qkv_attention(
            normed, attention.qkv.weight, (bias.q_bias, bias.k_bias, bias.v_bias),
            bias.joined(), packed, attention.rope(packed), attention.num_heads,
            encoder.backend,
        )  # fmt: skip
        x, normed = _connect(x, out, attention.o_proj, layer.layer_scale1, layer.norm2)
        inner = _inner(layer.mlp, normed, encoder.backend)
        if norm is not None and i not in kept:
            x, normed = _connect(x, inner, layer.mlp.down_proj, layer.layer_scale2, norm)
        else:
            x = kept.keep(i, layer.layer_scale2(x, layer.mlp.down_proj(inner)))
            normed = x if norm is None else norm(x)
    return normed


def _connect(
    x: Tensor, a: Tensor, linear: nn.Linear, scale: LayerScale, norm: nn.LayerNorm
) -> tuple[Tensor, Tensor]:
    return linear_residual_layer_norm(
        x, a, linear.weight, linear.bias, scale.lambda1, norm.weight, norm.bias, norm.eps
    )


def _qkv_without_gradient(
    attention: EncoderAttention, normed: Tensor, packed: PackedGrids, backend: str
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """q, k and v, and what attention has yet to rotate by."""
    weight, bias, rope = attention.qkv.weight, _join(attention.qkv_bias), attention.rope(packed)
    if rope is not None and takes_kernel("linear_rope_2d", backend, normed):
        return linear_rope_2d(normed, weight, bias, rope, backend=backend).unbind(1), None
    qkv = F.linear(normed, weight, bias)
    return qkv.unflatten(1, (3, attention.num_heads, attention.head_dim)).unbind(1), rope


def _inner(mlp: EncoderMLP, normed: Tensor, backend: str) -> Tensor:
    up, act = mlp.up_proj, mlp.act_fn
    plain = mlp.gate_proj is None and is_plain(up, nn.Linear) and is_plain(act, GELU)
    if plain and up.bias is not None and up.weight.dtype == normed.dtype:
        return bias_gelu(F.linear(normed, up.weight), up.bias)
    return mlp.inner(normed, backend)


def _inner_without_gradient(mlp: EncoderMLP, normed: Tensor, backend: str) -> Tensor:
    up, gate, act, dtype = mlp.up_proj, mlp.gate_proj, mlp.act_fn, normed.dtype
    if gate is None and is_plain(act, GELU) and is_plain_product(up, dtype):
        return linear_gelu(normed, up.weight, up.bias, backend=backend)
    if gate is not None and is_plain_silu(act) and _are_a_pair(gate, up, dtype):
        return linear_swiglu(normed, gate.weight, up.weight, gate.bias, up.bias, backend=backend)
    return mlp.inner(normed, backend)


def _are_a_pair(gate: nn.Linear, up: nn.Linear, dtype: torch.dtype) -> bool:
    plain = is_plain_product(gate, dtype) and is_plain_product(up, dtype)
    return plain and gate.weight.stride() == up.weight.stride()


def _norm(norm: nn.LayerNorm, x: Tensor, shift: Tensor | None) -> Tensor:
    return shifted_layer_norm(x, shift, norm.weight, norm.bias, norm.eps)


@torch.inference_mode(False)
@torch.no_grad()
def _fold(layer: EncoderLayer, before: Tensor | None) -> _Folded:
    known = _folded.get(layer)
    if known is None or known.before is not before or not _is_fresh(known, layer):
        known = _folded[layer] = _fold_now(layer, before)
    return known


def _is_fresh(folded: _Folded, layer: EncoderLayer) -> bool:
    stamp, parts = folded.of
    return parts == _parts(layer) and _is_of(stamp, _sources(layer))


def _parts(layer: EncoderLayer) -> _Parts:
    return layer.attention.replaced, layer.mlp.replaced


def _sources(layer: EncoderLayer) -> tuple[Tensor | None, ...]:
    o, down = layer.attention.o_proj, layer.mlp.down_proj
    scales = layer.layer_scale1.lambda1, layer.layer_scale2.lambda1
    return o.weight, o.bias, down.weight, down.bias, *scales


def _fold_now(layer: EncoderLayer, before: Tensor | None) -> _Folded:
    o, down = layer.attention.o_proj, layer.mlp.down_proj
    scales = layer.layer_scale1.lambda1, layer.layer_scale2.lambda1
    between = _with_bias(before, o.bias, scales[0])
    return _Folded(
        of=(_stamp(_sources(layer)), _parts(layer)),
        before=before,
        o_weight=_scaled(o.weight, scales[0]),
        between=between,
        down_weight=_scaled(down.weight, scales[1]),
        after=_with_bias(between, down.bias, scales[1]),
    )


@torch.inference_mode(False)
@torch.no_grad()
def _join(bias: QKVBias) -> Tensor | None:
    """The biases of q, k and v as one, made again when one of them has changed."""
    sources = bias.q_bias, bias.k_bias, bias.v_bias
    known = _joined.get(bias)
    if known is None or not _is_of(known[0], sources):
        known = _joined[bias] = _stamp(sources), bias.joined()
    return known[1]


def _stamp(sources: Iterable[Tensor | None]) -> _Stamp:
    _count_steps()
    return _steps, tuple((a, a._version, a.data_ptr()) for a in sources if a is not None)


def _is_of(stamp: _Stamp, sources: Iterable[Tensor | None]) -> bool:
    present, (steps, tensors) = [a for a in sources if a is not None], stamp
    return (
        steps == _steps
        and len(present) == len(tensors)
        and all(
            a is b and a._version == version and a.data_ptr() == address
            for a, (b, version, address) in zip(present, tensors, strict=True)
        )
    )


@cache
def _count_steps() -> None:
    """From now on, which is the first fold, count the steps of all optimizers."""
    register_optimizer_step_post_hook(_after_step)


def _after_step(*_: object) -> None:
    global _steps
    _steps += 1


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.float() * scale.float()[:, None]).to(weight.dtype)


def _with_bias(shift: Tensor | None, bias: Tensor | None, scale: Tensor) -> Tensor | None:
    if bias is None:
        return shift
    more = bias.float() * scale.float()
    return more if shift is None else shift + more
