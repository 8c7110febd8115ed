"""When a parameter may be read past its module's call, and what a call wants its input to be.

A parameter is used through its module: hooks, adapters, offloading, quantisation and sharding all
sit on the call, and whoever reads ``child.weight`` passes them by without a word. A fused kernel
has to read the weight, and may where :func:`is_plain` says that the call would do nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

# Not float8, which is a quantiser's storage.
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What nn.Module looks at before it calls forward directly; the names are torch's own.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(torch_modules, f"_global{name}") for name in _HOOKS)
_Kind = TypeVar("_Kind", bound=nn.Module)
_Calls = tuple[Callable[..., Any], ...]
_calls: dict[type[nn.Module], _Calls] = {}  # of each kind, as it was when it was made known


def _calls_of(kind: type[nn.Module]) -> _Calls:
    return kind.forward, kind.__call__, kind._call_impl


def may_be_plain(kind: type[_Kind]) -> type[_Kind]:
    """Remember what calling a module of this kind runs: :func:`is_plain` may be asked for it."""
    _calls[kind] = _calls_of(kind)
    return kind


may_be_plain(nn.Linear)
may_be_plain(nn.LayerNorm)


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether calling `module` is ``kind.forward`` on float parameters that it holds, no more.

    It is of this class exactly (an adapter, a quantised layer, a parametrization and FSDP's units
    are of another), has no hooks, is not compiled by itself and has no forward of its own (the
    offloading of Hugging Face's accelerate), there are no hooks for all modules, and each parameter
    is an ordinary tensor of a real device: not sharded or sparse, not a quantiser's, not on meta.
    Nor has what a call runs been replaced, in the class or for all modules, since `may_be_plain`
    saw it.
    """
    if type(module) is not kind or _calls_of(kind) != _calls[kind]:
        return False
    own = module.__dict__
    if "forward" in own or "_call_impl" in own or own.get("_compiled_call_impl") is not None:
        return False
    if any(_GLOBAL_HOOKS):
        return False
    for name in _HOOKS:
        if own[name]:
            return False
    return all(map(_is_plain_tensor, own["_parameters"].values()))


def _is_plain_tensor(p: Tensor | None) -> bool:
    return p is None or (
        type(p) in (nn.Parameter, Tensor)
        and p.dtype in _FLOATS
        and p.layout is torch.strided
        and not p.is_meta
    )


def is_float(stored: Tensor) -> bool:
    """Whether a parameter holds numbers to compute with, rather than a quantiser's codes.

    Quantisers keep theirs in integers, in float8, or packed into a wider type by a class of
    parameter of their own (bitsandbytes' ``quant_storage``). A tensor subclass (torchao's, DTensor)
    says the dtype that it acts as.
    """
    own_class = issubclass(type(stored), nn.Parameter) and type(stored) is not nn.Parameter
    return stored.dtype in _FLOATS and not own_class


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring parameters to a dtype, but not those of quantisers.

    Nor the buffers, as ``.to(dtype)`` would: RoPE's frequencies stay in float32.
    """
    for parameter in model.parameters():
        if is_float(parameter):
            parameter.data = parameter.data.to(dtype)


def input_dtype(module: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype in which `module`, a linear layer, is to be given `x`.

    That of its weight, as transformers casts for its patch embeddings; that of `x` where the weight
    is a quantiser's, which casts by itself, or where a forward of the module's own may compute in
    another dtype than the one at rest (layerwise casting).
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not is_float(weight):
        return x.dtype
    return x.dtype if "forward" in vars(module) and not weight.is_meta else weight.dtype
