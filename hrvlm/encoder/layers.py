"""The parts of a ViT on packed tokens ``[T, C]``: the embeddings and the block.

    x = x + lambda1 * attention(norm1(x));  x = x + lambda2 * mlp(norm2(x))

Parameters have the names of transformers' DINOv3ViTModel, except that q, k and v are one matrix.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from hrvlm_kernels import (
    PackedGrids,
    cpu_products,
    residual_layer_norm,
    rope_2d,
    swiglu,
    varlen_attention,
)
from hrvlm_kernels.backends import choose_backend
from hrvlm_kernels.ops.residual_layer_norm import MAX_WIDTH
from hrvlm_kernels.ops.varlen_attention import with_rope_table

from ..checkpoints.sizes import ViTSizes
from .plain_modules import input_dtype, is_plain, may_be_plain
from .rope import rope_frequencies

OPS = ("rope_2d", "varlen_attention", "residual_layer_norm", "swiglu")  # that a block runs
GELU = may_be_plain(type(ACT2FN["gelu"]))  # the exact one
_SILU = {  # a class of transformers and torch's
    may_be_plain(type(ACT2FN[name])) for name in ("silu", "swish")
}


class PatchEmbedding(nn.Conv2d):
    """A convolution over patches, which is one matrix product where the images are patches."""

    def forward(self, pixels: Tensor) -> Tensor:
        """``[N, 3, p, p]`` to ``[N, C, 1, 1]``; images of other sizes as any convolution."""
        if pixels.shape[1:] != self.weight.shape[1:]:
            return super().forward(pixels)
        x = nn.functional.linear(pixels.flatten(1), self.weight.flatten(1), self.bias)
        return x[:, :, None, None]


class EncoderEmbeddings(nn.Module):
    """Patch embedding and the prefix tokens."""

    def __init__(self, config: ViTSizes):
        super().__init__()
        size, p = config.hidden_size, config.patch_size
        if config.num_register_tokens < 0:
            raise ValueError(
                f"config.num_register_tokens={config.num_register_tokens}: expected 0 or more"
            )
        self.cls_token = nn.Parameter(torch.randn(1, 1, size))
        self.mask_token: nn.Parameter | None = nn.Parameter(torch.zeros(1, 1, size))
        self.register_tokens: nn.Parameter | None = nn.Parameter(
            torch.empty(1, config.num_register_tokens, size)
        )
        self.patch_shape = (config.num_channels, p, p)
        self.patch_embeddings = PatchEmbedding(config.num_channels, size, kernel_size=p, stride=p)

    def init_weights(self, std: float) -> None:
        """Random tokens, as the family's training begins."""
        init.trunc_normal_(self.cls_token, mean=0.0, std=std)
        assert self.mask_token is not None and self.register_tokens is not None
        init.zeros_(self.mask_token)
        if self.register_tokens.numel():
            init.trunc_normal_(self.register_tokens, mean=0.0, std=std)

    def forward(self, patches: Tensor, packed: PackedGrids, masked: Tensor | None) -> Tensor:
        """Patches ``[N, 3*p*p]`` and a bool mask ``[N]`` to packed tokens ``[T, C]``."""
        pixels = patches.to(input_dtype(self.patch_embeddings, patches))
        x = self.patch_embeddings(pixels.unflatten(1, self.patch_shape)).flatten(1)
        if masked is not None:
            if self.mask_token is None:
                raise ValueError("bool_masked_pos: config.use_mask_token is False")
            x = torch.where(masked[:, None], self.mask_token[0].to(x.dtype), x)
        x = self.placed(x, packed)
        prefix = self.prefix().to(x.dtype)
        starts = packed.cu_seqlens[:-1].long()
        rows = (starts[:, None] + torch.arange(prefix.shape[0], device=x.device)).flatten()
        tokens = x.new_zeros(packed.coords.shape[0], x.shape[1])
        tokens = tokens.index_copy(0, rows, prefix.repeat(starts.shape[0], 1))
        return tokens.index_copy(0, packed.patch_rows().long(), x)

    def prefix(self) -> Tensor:
        """``[P, C]``: CLS, then the registers."""
        assert self.register_tokens is not None
        return torch.cat((self.cls_token[0], self.register_tokens[0]))

    def placed(self, x: Tensor, packed: PackedGrids) -> Tensor:
        """Patches ``[N, C]`` with what tells their position, which RoPE does in the blocks."""
        return x


@may_be_plain
class QKVLinear(nn.Linear):
    """q, k and v as one product.

    A class of its own for those who replace every ``nn.Linear`` by a layer with packed weights
    (bitsandbytes): saving splits the weight, and a packed one can't be split.
    """


@may_be_plain
class QKVBias(nn.Module):
    """The biases of q, k and v, each of its own or none (DINOv3's k has none).

    A stored bias of size 3C would let the part of k drift away from zero in training. They are no
    part of :class:`QKVLinear`, so that what adapts or replaces a linear layer finds all of it in
    ``weight``.
    """

    q_bias: nn.Parameter | None
    k_bias: nn.Parameter | None
    v_bias: nn.Parameter | None

    def __init__(self, config: ViTSizes):
        super().__init__()
        for name, present in (
            ("q", config.query_bias),
            ("k", config.key_bias),
            ("v", config.value_bias),
        ):
            bias = nn.Parameter(torch.zeros(config.hidden_size)) if present else None
            self.register_parameter(f"{name}_bias", bias)

    def forward(self, qkv: Tensor) -> Tensor:
        """``qkv + bias``, both ``[T, 3C]``."""
        bias = self.joined()
        return qkv if bias is None else qkv + bias.to(qkv.dtype)

    def joined(self) -> Tensor | None:
        """The bias ``[3C]`` with zeros where there is none; None without any."""
        biases = (self.q_bias, self.k_bias, self.v_bias)
        present = [b for b in biases if b is not None]
        if not present:
            return None
        zeros = torch.zeros_like(present[0])
        return torch.cat([zeros if b is None else b for b in biases])


class _Parts(nn.Module):
    """Counts how often one of its modules was put in place.

    An adapter that is merged and taken out again leaves a weight that is the same tensor, at the
    same address and, changed through ``.data``, of the same version: that its module was replaced
    is all that tells.
    """

    replaced = 0

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.__dict__["replaced"] = self.replaced + 1


@may_be_plain
class EncoderAttention(_Parts):
    """Multi-head attention of each image over itself, q and k rotated by their patch's position."""

    def __init__(self, config: ViTSizes):
        super().__init__()
        size, heads = config.hidden_size, config.num_attention_heads
        unit = 1 if config.rope_theta is None else 4  # two axes, two halves
        if heads < 1 or size % (unit * heads):
            raise ValueError(
                f"config.num_attention_heads={heads}: expected to divide config.hidden_size={size} "
                f"into multiples of {unit}"
            )
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_prefix_tokens = config.num_prefix_tokens
        self.rope_theta = config.rope_theta
        self._inv_freq = self._frequencies(torch.device("cpu"))
        self.qkv = QKVLinear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.qkv_bias = QKVBias(config)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.proj_bias)
        self.register_load_state_dict_pre_hook(_fuse_qkv)

    def forward(
        self, x: Tensor, packed: PackedGrids, backend: str, prefix_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``[T, C]`` to ``[T, C]``.

        With `prefix_attention` also the softmax weights ``[P, heads, T]`` of the prefix tokens over
        their own image's tokens.
        """
        q, k, v = self._qkv(x)
        out = varlen_attention(
            q, k, v, packed, self.head_dim**-0.5, rope=self.rope(packed), backend=backend
        )
        out = _product(self.o_proj, out.flatten(1))
        return (out, self._prefix_attention(q, k, packed, backend)) if prefix_attention else out

    def _qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        if (
            is_plain(self.qkv, QKVLinear)
            and is_plain(self.qkv_bias, QKVBias)
            and self.qkv.bias is None
        ):
            qkv = cpu_products.linear(x, self.qkv.weight, self.qkv_bias.joined())
        else:
            qkv = self.qkv_bias(self.qkv(x))
        return qkv.unflatten(1, (3, self.num_heads, self.head_dim)).unbind(1)

    def with_rope_table(self, packed: PackedGrids, x: Tensor, backend: str) -> PackedGrids:
        """`packed` with cos and sin of all tokens, for every layer, where attention reads them."""
        rope = self.rope(packed)
        return packed if rope is None else with_rope_table(packed, x, rope[1], backend)

    def rope(self, packed: PackedGrids) -> tuple[Tensor, ...] | None:
        """Positions, frequencies and, if there is one, their table: q and k are rotated by them.

        None without RoPE.
        """
        if self.rope_theta is None:
            return None
        if self._inv_freq.device != packed.device:
            self._inv_freq = self._frequencies(packed.device)
        rope = packed.coords, self._inv_freq
        return rope if packed.rope_table is None else (*rope, packed.rope_table)

    def _frequencies(self, device: torch.device) -> Tensor:
        return rope_frequencies(self.rope_theta or 1.0, self.head_dim, device)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> EncoderAttention:
        """Moved, keep the frequencies at hand: torch.compile would make them in every forward."""
        super()._apply(fn, *args, **kwargs)
        device = fn(torch.empty(0, device=self._inv_freq.device)).device
        if device.type != "meta":
            self._inv_freq = self._frequencies(device)
        return self

    def _prefix_attention(self, q: Tensor, k: Tensor, packed: PackedGrids, backend: str) -> Tensor:
        if rope := self.rope(packed):
            q, k = rope_2d(q, k, *rope[:2], backend=backend)
        maps = []
        for q_i, k_i in zip(packed.split(q), packed.split(k), strict=True):
            prefix = q_i[: self.num_prefix_tokens].float() * self.head_dim**-0.5
            maps.append(torch.einsum("phd,nhd->phn", prefix, k_i.float()).softmax(-1))
        return torch.cat(maps, dim=-1)


@may_be_plain
class EncoderMLP(_Parts):
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))`` when the config says gated."""

    def __init__(self, config: ViTSizes):
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias) if config.use_gated_mlp else None
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)
        if config.hidden_act not in ACT2FN:
            raise ValueError(
                f"config.hidden_act={config.hidden_act!r}: expected one of {', '.join(ACT2FN)}"
            )
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, backend: str = "auto") -> Tensor:
        """``[T, C]`` to ``[T, C]``."""
        up, down, act = self.up_proj, self.down_proj, self.act_fn
        plain = is_plain(self, EncoderMLP) and self.gate_proj is None and is_plain(act, GELU)
        if plain and is_plain(up, nn.Linear) and is_plain(down, nn.Linear):
            weights = up.weight, up.bias, down.weight, down.bias
            if x.dtype == torch.float32 and cpu_products.serves(x, *weights):
                return cpu_products.mlp(x, *weights)
        return _product(down, self.inner(x, backend))

    def inner(self, x: Tensor, backend: str = "auto") -> Tensor:
        """What `down_proj` takes, ``[T, F]``."""
        if self.gate_proj is None:
            return self.act_fn(_product(self.up_proj, x))
        if is_plain_silu(self.act_fn) and choose_backend("swiglu", backend, x) == "triton":
            return swiglu(self.gate_proj(x), self.up_proj(x), backend=backend)
        return self.act_fn(_product(self.gate_proj, x)) * _product(self.up_proj, x)


def _product(linear: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer's call; on a CPU by the faster library, where it is no more than a product."""
    if is_plain(linear, nn.Linear) and cpu_products.helps(x, linear.weight, linear.bias):
        return cpu_products.linear(x, linear.weight, linear.bias)
    return linear(x)


def is_plain_silu(act: nn.Module) -> bool:
    """Whether an activation is SiLU and nothing more."""
    return type(act) in _SILU and is_plain(act, type(act))


@may_be_plain
class LayerScale(nn.Module):
    """The residual connection with a learned factor per channel."""

    def __init__(self, config: ViTSizes):
        super().__init__()
        self.lambda1 = nn.Parameter(
            torch.full((config.hidden_size,), float(config.layerscale_value))
        )

    def forward(self, residual: Tensor, update: Tensor) -> Tensor:
        """``residual + lambda1 * update`` in one pass."""
        return torch.addcmul(residual, update, self.lambda1)


@may_be_plain
class EncoderLayer(GradientCheckpointingLayer):
    """One pre-norm block with LayerScale and, in training, stochastic depth per image."""

    def __init__(self, config: ViTSizes):
        super().__init__()
        self.drop_path_rate = config.drop_path_rate
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = EncoderAttention(config)
        self.layer_scale1 = LayerScale(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EncoderMLP(config)
        self.layer_scale2 = LayerScale(config)

    def forward(
        self,
        x: Tensor,
        packed: PackedGrids,
        backend: str = "auto",
        drop_path: bool = False,
        prefix_attention: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Packed tokens ``[T, C]`` to ``[T, C]``.

        With `prefix_attention` also the weights ``[P, heads, T]`` of :class:`EncoderAttention`.
        """
        drop = self._drop_path if drop_path else _keep
        update = self.attention(self.norm1(x), packed, backend, prefix_attention)
        if prefix_attention:
            update, weights = update
        x, normed = self._scale_and_norm(x, drop(update, packed), backend)
        del update  # a [T, C] that the MLP, where memory peaks, would carry along
        x = self.layer_scale2(x, drop(self.mlp(normed, backend), packed))
        return (x, weights) if prefix_attention else x

    def _scale_and_norm(self, x: Tensor, update: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        """The first residual connection and the second norm of it: in Triton, one pass for both."""
        scale, norm = self.layer_scale1, self.norm2
        plain = is_plain(scale, LayerScale) and is_plain(norm, nn.LayerNorm)
        if plain and x.shape[1] <= MAX_WIDTH:
            # Under autocast the parameters are wider than the activations, and addcmul promotes.
            wide = x.to(torch.promote_types(x.dtype, scale.lambda1.dtype))
            if choose_backend("residual_layer_norm", backend, wide) == "triton":
                return residual_layer_norm(
                    wide, update, scale.lambda1, norm.weight, norm.bias, norm.eps, backend=backend
                )
        x = scale(x, update)
        return x, norm(x)

    def _drop_path(self, update: Tensor, packed: PackedGrids) -> Tensor:
        """Drop the update of whole images at random (Huang et al. 2016, arXiv 1603.09382)."""
        keep = 1 - self.drop_path_rate
        kept = (
            torch.empty(len(packed), 1, dtype=update.dtype, device=update.device).bernoulli_(keep)
            / keep
        )
        lengths = packed.cu_seqlens.diff()
        return update * kept.repeat_interleave(lengths, dim=0, output_size=packed.total_tokens)


def _keep(update: Tensor, packed: PackedGrids) -> Tensor:
    return update


def _fuse_qkv(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    _metadata: object,
    _strict: bool,
    missing_keys: list[str],
    _unexpected_keys: object,
    error_messages: list[str],
) -> None:
    """Accept transformers' separate q_proj, k_proj and v_proj beside the fused matrix.

    Trainer resumes by ``load_state_dict(strict=False)`` on keys as saved, which would otherwise
    skip them in silence, and does so shard by shard: those that are not in this one stay.
    """
    qkv = cast("EncoderAttention", module).qkv
    weights = [f"{prefix}{name}_proj.weight" for name in "qkv"]
    absent = [key for key in weights if key not in state_dict]
    if len(absent) < len(weights):
        kept = dict(zip(weights, qkv.weight.detach().chunk(3), strict=True)) if absent else {}
        given = {key: state_dict.pop(key) for key in weights if key in state_dict}
        device = next(iter(given.values())).device
        parts = [given[key] if key in given else kept[key].to(device) for key in weights]
        shapes = [tuple(part.shape) for part in parts]
        if len(set(shapes)) > 1:
            error_messages.append(f"{', '.join(weights)}: different shapes {shapes}")
            return
        state_dict[f"{prefix}qkv.weight"] = torch.cat(parts)
        missing_keys += absent
    for name in "qkv":
        for key in (f"{prefix}{name}_proj.bias", f"{prefix}qkv.{name}_bias"):
            if key in state_dict:
                state_dict[f"{prefix}qkv_bias.{name}_bias"] = state_dict.pop(key)
