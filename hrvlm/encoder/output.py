"""What the encoder returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from hrvlm_kernels import PackedGrids


@dataclass
class EncoderOutput(BaseModelOutputWithPooling):
    """Output for a batch: the fields of transformers' DINOv3ViTModel, and more on request.

    Attributes:
        last_hidden_state: ``[B, P + hp*wp, C]`` after the final norm; prefix tokens first.
        pooler_output: ``[B, C]``, the CLS token of `last_hidden_state`.
        hidden_states: On request, the embeddings and the output of each block, all before the final
            norm: as in transformers, ``hidden_states[-1]`` is not `last_hidden_state`.
        selected_hidden_states: Layers asked for by ``out_indices``.
        prefix_attentions: On request, per layer ``[B, P, heads, P + hp*wp]``: row p is the
            attention of prefix token p over the tokens of its image.
    """

    selected_hidden_states: tuple[Tensor, ...] | None = None
    prefix_attentions: tuple[Tensor, ...] | None = None


@dataclass
class PackedEncoderOutput(ModelOutput):
    """Output for images of different shapes.

    What is indexed by image: `pooler_output`, `grids`, `cls`, `registers`, `patches`, `to_maps()`
    and `attention_maps()`. What begins with ``packed`` has the tokens of all images one after the
    other, `packed.split` divides it; the names are those of :class:`EncoderOutput` behind it.

    Attributes:
        packed_last_hidden_state: ``[T, C]`` after the final norm.
        pooler_output: ``[B, C]``, the CLS token of each image.
        packed_hidden_states: On request, the embeddings and the output of each block ``[T, C]``,
            before the final norm.
        packed_selected_hidden_states: Layers asked for by ``out_indices``, ``[T, C]`` each.
        packed_prefix_attentions: On request, per layer ``[P, heads, T]``: row p is the attention of
            prefix token p of each image over the tokens of its own segment.
        packed: The layout.
    """

    # ModelOutput wants a default for every field; these three are always given.
    packed_last_hidden_state: Tensor = None  # type: ignore[assignment]
    pooler_output: Tensor = None  # type: ignore[assignment]
    packed_hidden_states: tuple[Tensor, ...] | None = None
    packed_selected_hidden_states: tuple[Tensor, ...] | None = None
    packed_prefix_attentions: tuple[Tensor, ...] | None = None
    packed: PackedGrids = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        """Say which name a reader of a batch's output is looking for."""
        if f"packed_{name}" in self.__dataclass_fields__:
            raise AttributeError(
                f"{name!r} has a row for each image of a batch; images of different shapes have "
                f"packed_{name}, the tokens of all images, and cls, registers and patches by image"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Patch grid (hp, wp) of each image."""
        return self.packed.grids or ()

    @property
    def cls(self) -> Tensor:
        """``[B, C]``: the CLS token of each image."""
        return self.packed_last_hidden_state[self.packed.cu_seqlens[:-1]]

    @property
    def registers(self) -> Tensor:
        """``[B, R, C]``: the register tokens of each image."""
        first = self.packed.cu_seqlens[:-1, None]
        offset = torch.arange(
            1, self.packed.num_prefix_tokens, dtype=first.dtype, device=first.device
        )
        return self.packed_last_hidden_state[first + offset]

    @property
    def patches(self) -> tuple[Tensor, ...]:
        """The patch tokens of each image ``[hp*wp, C]``: views, row by row of its grid."""
        first = self.packed.num_prefix_tokens
        return tuple(tokens[first:] for tokens in self.packed.split(self.packed_last_hidden_state))

    @property
    def packed_patches(self) -> Tensor:
        """``[sum hp*wp, C]``: the patch tokens of all images, without their prefix tokens."""
        return self.packed_last_hidden_state[self.packed.patch_rows()]

    def to_maps(self, hidden: Tensor | None = None) -> list[Tensor]:
        """Patch features of each image as a map ``[C, hp, wp]``.

        Args:
            hidden: A packed ``[T, C]`` tensor of this batch, e.g. one of
                `packed_selected_hidden_states`; by default `packed_last_hidden_state`.
        """
        hidden = self.packed_last_hidden_state if hidden is None else hidden
        first = self.packed.num_prefix_tokens
        return [
            tokens[first:].T.unflatten(1, grid)
            for tokens, grid in zip(self.packed.split(hidden), self.grids, strict=True)
        ]

    def attention_maps(self, layer: int = -1) -> list[Tensor]:
        """Attention of the prefix tokens over the patches, per image ``[P, heads, hp, wp]``.

        Raises:
            ValueError: the forward was not asked for ``output_prefix_attentions``.
        """
        if self.packed_prefix_attentions is None:
            raise ValueError("attention_maps: call the encoder with output_prefix_attentions=True")
        first = self.packed.num_prefix_tokens
        segments = self.packed_prefix_attentions[layer].split(self.packed.lengths, dim=-1)
        return [
            a[..., first:].unflatten(-1, grid) for a, grid in zip(segments, self.grids, strict=True)
        ]


def batched(fields: dict[str, Any], shape: tuple[int, int]) -> EncoderOutput:
    """Packed fields of equal images as the output of their batch; `shape` is (B, n)."""

    def unpack(x: Tensor) -> Any:  # [T, C] to [B, n, C]
        return x.unflatten(0, shape)

    def unpack_attention(x: Tensor) -> Tensor:  # [P, heads, T] to [B, P, heads, n]
        return x.unflatten(-1, shape).movedim(-2, 0)

    def each(name: str, change: Callable[[Tensor], Tensor]) -> Any:
        return fields[name] and tuple(map(change, fields[name]))

    def unpack_state(x: Tensor) -> Any:  # is [B, n, C] unless its image was encoded alone
        return unpack(x) if x.ndim == 2 else x

    return EncoderOutput(
        last_hidden_state=unpack(fields["packed_last_hidden_state"]),
        pooler_output=fields["pooler_output"],
        hidden_states=each("packed_hidden_states", unpack_state),
        selected_hidden_states=each("packed_selected_hidden_states", unpack_state),
        prefix_attentions=each("packed_prefix_attentions", unpack_attention),
    )
