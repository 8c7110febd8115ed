"""Towers that keep images apart by a dense mask: Pixtral, and so Mistral 3 and LightOnOCR.

All images' tokens are one sequence of N, and the tower makes an ``[N, N]`` mask of its images'
lengths, which it knows on the host. An accelerated one makes a layout of them instead, and hands it
on in the mask's place:

    generate_block_attention_mask(lengths, tokens) -> PackedGrids -> attention_mask of each layer
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from hrvlm_kernels import PackedGrids

from .layouts import host_copy
from .rebinding import global_names, innermost, rebind

_MASK = "generate_block_attention_mask"


def makes_block_mask(cls: type[nn.Module]) -> bool:
    """Whether the forward of `cls` makes a block mask of its images' lengths."""
    return _MASK in global_names(cls.forward)


def takes_mask(cls: type[nn.Module]) -> bool:
    """Whether the forward of `cls` takes a mask."""
    return "attention_mask" in inspect.signature(innermost(cls.forward)).parameters


def block_methods(cls: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """What an accelerated tower of this kind has of its own: a forward without a mask."""
    return {"forward": _with_sizes_on_host(rebind(cls.forward, {_MASK: _layout_of}))}


@torch.compiler.disable
def _layout_of(lengths: Sequence[int], tokens: Tensor) -> PackedGrids:
    """Stands for transformers' function of the same arguments."""
    return PackedGrids.from_lengths(list(lengths), device=tokens.device)


def _with_sizes_on_host(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that reads sizes back once, where the stock one reads each side of each image."""

    @wraps(forward)
    def with_sizes_on_host(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args = tuple(_on_host(a) for a in args)
        return forward(self, *args, **{name: _on_host(a) for name, a in kwargs.items()})

    return with_sizes_on_host


def _on_host(argument: Any) -> Any:
    is_sizes = isinstance(argument, Tensor) and not argument.is_floating_point()
    return host_copy(argument) if is_sizes else argument
