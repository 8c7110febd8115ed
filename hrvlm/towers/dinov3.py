"""DINOv3 of transformers, whose layers are given dense batches and tables of cos and sin.

Two kinds of modules change, one by one and in place: the attention of each layer, and the module
that makes the RoPE tables. They stay the same objects with the same parameters, submodules and
hooks, and take another class, which holds no tensors of its own; so ``state_dict``,
``save_pretrained``, optimizers, adapters on q_proj and FSDP notice nothing. Instead of cos and sin,
the model's layers are handed :class:`RotaryPositions`.

    patches -> embeddings [B, n, C] -> layers -> norm        as before: transformers' own code
                                         |
                    attention: [B, n, C] -> [B*n, H, D] -> varlen_attention (with RoPE) -> o_proj

Unlike the stock model, an accelerated one raises where an image's sides are not multiples of the
patch size (instead of cropping), rotates q and k in float32 whatever the dtype, and takes a batch
of no images. In training mode it draws the shift, jitter and scale of RoPE coordinates that its
config names as the stock model does, and the same ones; :class:`~hrvlm.DINOv3Encoder` draws them
only when asked to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DINOv3ViTBackbone, DINOv3ViTModel
from transformers.models.dinov3_vit.modeling_dinov3_vit import (
    DINOv3ViTAttention,
    DINOv3ViTRopePositionEmbedding,
    augment_patches_center_coordinates,
)

from hrvlm_kernels import PackedGrids, varlen_attention
from hrvlm_kernels.ops.rope_2d import rope_table
from hrvlm_kernels.ops.varlen_attention import reads_rope_table

from ..checkpoints.sizes import patch_size_of
from ..encoder.inputs import batch_layout
from ..encoder.rope import rope_frequencies
from .swapping import refuse_own_forward, set_class, stock_class, stock_init


class RotaryPositions:
    """What the layers of an accelerated model are handed as ``position_embeddings``.

    Opaque on purpose, neither a tuple nor a dataclass: mixed precision of FSDP casts every float
    tensor that it finds in the inputs of a layer, and the coordinates have to stay float32.

    Attributes:
        packed: Layout of the batch: B times the same patch grid.
        coords: ``[B*n, 2]`` float32 (y, x), those of `packed` unless augmented.
        inv_freq: ``[D / 4]`` float32.
    """

    def __init__(self, packed: PackedGrids, coords: Tensor, inv_freq: Tensor):
        self.packed = packed
        self.coords = coords
        self.inv_freq = inv_freq
        self._table: Tensor | None = None

    def rope(self, q: Tensor, backend: str) -> tuple[Tensor, ...]:
        """What ``varlen_attention`` of `q` takes; its first layer writes the table for all."""
        # A traced layer that is recomputed may not change what others see.
        is_read = not torch.compiler.is_compiling() and reads_rope_table(q, q.shape[-1], backend)
        if is_read and self._table is None:
            self._table = rope_table(self.coords, self.inv_freq)
        rope = self.coords, self.inv_freq
        return rope if self._table is None else (*rope, self._table)

    def to(
        self, device: torch.device | str | int | None, non_blocking: bool = False
    ) -> RotaryPositions:
        """The same positions on `device`, for layers on several; None leaves them."""
        if device is None or self.packed.device == torch.device(device):
            return self
        return RotaryPositions(
            self.packed.to(device),
            self.coords.to(device, non_blocking=non_blocking),
            self.inv_freq.to(device, non_blocking=non_blocking),
        )


class AcceleratedRope(DINOv3ViTRopePositionEmbedding):
    """Yields :class:`RotaryPositions` instead of cos and sin."""

    __init__ = stock_init(DINOv3ViTRopePositionEmbedding)
    hrvlm_stock = DINOv3ViTRopePositionEmbedding
    rope_augment: bool

    def forward(self, pixel_values: Tensor) -> RotaryPositions:  # type: ignore[override]
        """Positions for pixels ``[B, 3, H, W]``.

        Raises:
            ValueError: H or W is not a multiple of the patch size.
        """
        batch, _, height, width = pixel_values.shape
        patch = patch_size_of(self.config)
        if height % patch or width % patch or not height or not width:
            raise ValueError(
                f"pixel_values: images of {height}x{width} pixels are not whole patches of "
                f"{patch}x{patch}; resize or pad both sides to multiples of {patch}"
            )
        packed = batch_layout(
            batch,
            (height // patch, width // patch),
            num_prefix_tokens=1 + self.config.num_register_tokens,
            device=pixel_values.device,
        )
        augments = self.training and self.rope_augment
        coords = self._augmented(packed, batch) if augments else packed.coords
        return RotaryPositions(
            packed, coords, rope_frequencies(self.base, self.head_dim, pixel_values.device)
        )

    def _augmented(self, packed: PackedGrids, batch: Any) -> Tensor:
        """One draw for the batch, as the stock model's; prefix tokens stay at the origin.

        `batch` is a symbol, or a traced number, where a graph is made.
        """
        config, prefix = self.config, packed.num_prefix_tokens
        drawn = config.pos_embed_shift, config.pos_embed_jitter, config.pos_embed_rescale
        if drawn == (None, None, None):
            return packed.coords
        coords = packed.coords.reshape(batch, packed.max_seqlen, 2)
        patches = augment_patches_center_coordinates(coords[:, prefix:], *drawn)
        return torch.cat((coords[:, :prefix], patches), 1).flatten(0, 1)


class AcceleratedAttention(DINOv3ViTAttention):
    """The same projections with :func:`varlen_attention` between them, RoPE folded in."""

    __init__ = stock_init(DINOv3ViTAttention)
    hrvlm_stock = DINOv3ViTAttention
    backend: str

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: RotaryPositions | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """``[B, n, C]`` to ``[B, n, C]``, and no attention weights.

        Raises:
            ValueError: asked for attention weights, for a mask, or for dropout.
            TypeError: `position_embeddings` does not come from :class:`AcceleratedRope`.
        """
        self._refuse(attention_mask, kwargs)
        if not isinstance(position_embeddings, RotaryPositions):
            raise TypeError(
                "position_embeddings must be RotaryPositions, not "
                f"{type(position_embeddings).__name__}: the layers of an accelerated model can't "
                "be called with cos and sin; call the model, or restore(model)"
            )
        packed = position_embeddings.packed
        batch, tokens, _ = hidden_states.shape
        rows = (batch * tokens, self.num_heads, self.head_dim)
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (proj(hidden_states).reshape(rows) for proj in projections)
        rope = position_embeddings.rope(q, self.backend)
        out = varlen_attention(q, k, v, packed, self.scaling, rope=rope, backend=self.backend)
        return self.o_proj(out.reshape(batch, tokens, self.num_heads * self.head_dim)), None

    def _refuse(self, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
        asked = kwargs.get("output_attentions")
        if self.config.output_attentions if asked is None else asked:
            raise ValueError(
                "output_attentions: the kernels of an accelerated model make no attention matrix; "
                "call restore(model) and set_attn_implementation('eager'), or use DINOv3Encoder "
                "with output_prefix_attentions=True"
            )
        if attention_mask is not None:
            raise ValueError(
                "attention_mask: an accelerated DINOv3 takes none; restore(model) for that"
            )
        if self.training and self.dropout:
            raise ValueError(
                f"config.attention_dropout is {self.dropout}, and no kernel has dropout: build the "
                "model with 0, or call eval()"
            )


_ACCELERATED: dict[type[nn.Module], type[nn.Module]] = {
    cls.hrvlm_stock: cls for cls in (AcceleratedAttention, AcceleratedRope)
}
# Instance attributes that an accelerated module has beyond the stock one.
OPTIONS = ("backend", "rope_augment")


def swap(
    model: nn.Module, backend: str, rope_augment: bool
) -> list[tuple[str, AcceleratedAttention]]:
    """Accelerate every DINOv3 ViT in `model`; the options are those of :func:`hrvlm.accelerate`.

    Returns:
        Its attention modules, with their names.

    Raises:
        ValueError: one has an attention class of its own, or a forward on the instance.
    """
    parts = list(_parts(model))
    for name, part in parts:
        if type(part) not in _ACCELERATED and not stock_class(part):
            raise ValueError(
                f"{name}: {type(part).__name__} is not transformers' class, and may compute "
                "something else"
            )
        refuse_own_forward(name, part)
    for _, part in parts:
        set_class(part, _ACCELERATED.get(type(part), type(part)))
        if isinstance(part, AcceleratedAttention):
            part.backend = backend
        else:
            cast("AcceleratedRope", part).rope_augment = rope_augment
    return [(name, part) for name, part in parts if isinstance(part, AcceleratedAttention)]


def is_part(module: nn.Module) -> bool:
    """Whether `module` is the attention or the RoPE of a DINOv3."""
    return isinstance(module, tuple(_ACCELERATED))


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The attention and RoPE modules of all DINOv3 encoders in `model`, with their names."""
    for outer, encoder in model.named_modules():
        if isinstance(encoder, (DINOv3ViTModel, DINOv3ViTBackbone)):
            for inner, part in encoder.named_modules(prefix=outer):
                if is_part(part):
                    yield str(inner), cast("nn.Module", part)
