"""Towers that pad images to one length and mask it: SigLIP2 NaFlex, LFM2-VL, Idefics, SmolVLM.

Padding is taken out in front of the encoder and put back, as zeros, behind it:

    [B, N, C] and a mask [B, N] -- valid rows --> [1, T, C] and a layout -- encoder --> [B, N, C]

so that its layers have neither padding nor a mask. The stock encoder leaves numbers in padded rows
that mean nothing; what comes after it masks them or drops them.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hrvlm_kernels import PackedGrids

from .layouts import host_copy, upload
from .rebinding import global_names, innermost, rebind

_MASK = "create_bidirectional_mask"


class Padding(NamedTuple):
    """Stands in the place of a mask of padded images.

    Attributes:
        packed: The layout of what is no padding.
        rows: ``[T]``: where it is among all ``B * N`` rows.
        shape: ``(B, N)``.
    """

    packed: PackedGrids
    rows: Tensor
    shape: tuple[int, int]

    def pad(self, tokens: Tensor) -> Tensor:
        """``[T, C]`` to ``[B, N, C]``, zeros where padding is."""
        batch, length = self.shape
        empty = tokens.new_zeros(batch * length, tokens.shape[-1])
        return empty.index_copy(0, self.rows, tokens).unflatten(0, (batch, length))


class _Last(threading.local):
    """The padding that this thread's last forward found, for the hidden states that it returns."""

    padding: Padding | None = None


_last = _Last()


def masks_padding(module: nn.Module) -> bool:
    """Whether the forward of `module` masks padded patches for an encoder in it."""
    cls, encoder = type(module), getattr(module, "encoder", None)
    if not isinstance(encoder, nn.Module) or not {_MASK, "encoder"} <= global_names(cls.forward):
        return False
    names = inspect.signature(innermost(cls.forward)).parameters.keys()
    inner = inspect.signature(innermost(type(encoder).forward)).parameters.keys()
    masks = names & {"pixel_attention_mask", "patch_attention_mask"}
    return "pixel_values" in names and bool(masks) and {"inputs_embeds", "attention_mask"} <= inner


def padded_methods(cls: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """What a tower of this kind has of its own: a forward that finds its padding."""
    forward = rebind(cls.forward, {_MASK: _padding_of})

    @wraps(forward)
    def padded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args = tuple(_sizes_on_host(a) for a in args)
        kwargs = {name: _sizes_on_host(a) for name, a in kwargs.items()}
        return _pad_hidden_states(forward(self, *args, **kwargs))

    return {"forward": padded}


def _sizes_on_host(argument: Any) -> Any:
    """Heights and widths read back at once, where the stock tower reads each side of each image."""
    is_table = isinstance(argument, Tensor) and argument.ndim == 2 and argument.shape[1] == 2
    is_sizes = is_table and argument.dtype in (torch.int32, torch.int64)
    return host_copy(argument) if is_sizes else argument


def encoder_methods(cls: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """What the encoder in such a tower has of its own: a forward on what is no padding."""
    forward: Callable[..., Any] = cls.forward

    @wraps(forward)
    def unpadded(
        self: nn.Module, inputs_embeds: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        if not isinstance(attention_mask, Padding):
            return forward(self, inputs_embeds, attention_mask, **kwargs)
        tokens = inputs_embeds.flatten(0, 1).index_select(0, attention_mask.rows)
        out = forward(self, tokens[None], attention_mask.packed, **kwargs)
        hidden = out.last_hidden_state[0]
        out.last_hidden_state = attention_mask.pad(hidden)
        return out

    return {"forward": unpadded}


@torch.compiler.disable
def _padding_of(
    config: object, inputs_embeds: Tensor, attention_mask: Tensor | None, **options: Any
) -> Padding | None:
    """Stands for transformers' function of these arguments; reads the mask back once.

    Where all is padding it stays: no layer takes no tokens, and nothing that comes out is read.
    """
    _last.padding = None
    if attention_mask is None:
        return None
    valid = host_copy(attention_mask).flatten(1).bool()
    if not valid.any():
        return None
    rows = upload(valid.flatten().nonzero()[:, 0], inputs_embeds.device)
    packed = PackedGrids.from_lengths(valid.sum(1).tolist(), device=inputs_embeds.device)
    _last.padding = Padding(packed, rows, (valid.shape[0], valid.shape[1]))
    return _last.padding


@torch.compiler.disable
def _pad_hidden_states(out: Any) -> Any:
    """Hidden states of layers, if they were asked for, with their padding."""
    padding, _last.padding = _last.padding, None
    if padding is None or padding.shape == (1, padding.packed.total_tokens):
        return out
    inner = (1, padding.packed.total_tokens)

    def pad(a: Tensor) -> Tensor:
        return padding.pad(a[0]) if a.ndim == 3 and a.shape[:2] == inner else a

    return pytree.tree_map_only(Tensor, pad, out)
