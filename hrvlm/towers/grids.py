"""Towers that compute what their layers share from the grids of the images, on the host.

Transformers keeps that in ``transformers.vision_utils``: cumulative lengths, windows, positions,
the taps of interpolated embeddings. Its functions loop over the images and read the grids back from
the device, each for itself, several times a forward. In an accelerated tower they get the grids'
copy on the host, and what they return is uploaded without waiting.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .block_masks import block_methods, makes_block_mask
from .layouts import begin_forward, end_forward, on_host, upload
from .rebinding import global_names, innermost, rebind

_HOME = "transformers.vision_utils"


def uses_grids(cls: type[nn.Module]) -> bool:
    """Whether a method of `cls` calls a function of grids."""
    return next(_methods(cls), None) is not None


def takes_sizes(cls: type[nn.Module]) -> bool:
    """Whether `cls` is a model that is given sizes of images, and no text."""
    names = inspect.signature(innermost(cls.forward)).parameters
    is_vision = issubclass(cls, PreTrainedModel) and "input_ids" not in names
    return is_vision and any(name.endswith(("grid_thw", "grid_hw")) for name in names)


def tower_methods(cls: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """What an accelerated tower has of its own: functions of grids computed on the host."""
    if makes_block_mask(cls):
        return block_methods(cls)
    methods: dict[str, Callable[..., Any]] = {
        name: rebind(method, helpers) for name, method, helpers in _methods(cls)
    }
    methods["forward"] = _with_grids_beside(methods.get("forward", cls.forward))
    return methods


def _methods(cls: type[nn.Module]) -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        helpers = _helpers(method) if inspect.isfunction(method) else {}
        if helpers:
            yield name, method, helpers


def _helpers(method: Callable[..., Any]) -> dict[str, Any]:
    """The functions of grids that `method` calls, by name, computed on the host."""
    namespace = getattr(innermost(method), "__globals__", {})
    found: dict[str, Any] = {name: namespace.get(name) for name in global_names(method)}
    return {name: on_host(value) for name, value in found.items() if _takes_grids(value)}


def _takes_grids(value: object) -> bool:
    """Whether it is a function of transformers' ``vision_utils``, or a tower's own like those."""
    if not inspect.isfunction(value):
        return False
    return value.__module__ == _HOME or value.__code__.co_varnames[:1] == ("grid_thw",)


def _with_grids_beside(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that takes grids on the host beside pixels on an accelerator."""

    @wraps(forward)
    def with_grids_beside(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        begin_forward()
        try:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            device = next((a.device for a in tensors if a.is_floating_point()), None)
            if device is not None and device.type != "cpu":
                args = tuple(_beside(a, device) for a in args)
                kwargs = {name: _beside(a, device) for name, a in kwargs.items()}
            return forward(self, *args, **kwargs)
        finally:
            end_forward()

    return with_grids_beside


def _beside(argument: Any, device: torch.device) -> Any:
    """`argument`; integers on the host, as grids are, uploaded to `device`."""
    is_host = isinstance(argument, Tensor) and argument.device.type == "cpu"
    return upload(argument, device) if is_host and not argument.is_floating_point() else argument
