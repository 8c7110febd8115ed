"""Layouts of packed tokens, made once per forward and not once per layer.

A tower of transformers is given the grids of its images and makes from them the cumulative lengths
that it hands to every layer. Where the grids are on an accelerator they are read back once; the
lengths are then computed on the host, and their copy on the device is known to be theirs:

    grids -- read back, unless on the host --> lengths on the host -> PackedGrids
                                                     '-- uploaded --> cu_seqlens, as the tower's

so that no layer asks the device for a length, and windows and whole images have one layout each,
however many layers there are.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hrvlm_kernels import PackedGrids


class _Copies(NamedTuple):
    """A tensor on a device, kept alive so that its address stays its own, and what is known."""

    tensor: Tensor
    version: int
    host: Tensor
    layouts: dict[torch.device, PackedGrids]


# A tower has two kinds of lengths at a time, for windows and for whole images.
_known: deque[_Copies] = deque(maxlen=16)


class _Forwards(threading.local):
    """How many forwards of accelerated towers this thread is in, one inside the other."""

    depth = 0


_forwards = _Forwards()


@torch.compiler.disable
def begin_forward() -> None:
    """A tower's forward begins: until it ends, lengths made under inference_mode are known, too."""
    _forwards.depth += 1


@torch.compiler.disable
def end_forward() -> None:
    """Forget what was made under inference_mode, which can change later without a trace."""
    _forwards.depth -= 1
    if not _forwards.depth:
        tracked = [copies for copies in tuple(_known) if not copies.tensor.is_inference()]
        _known.clear()
        _known.extend(tracked)


@torch.compiler.disable
def host_copy(tensor: Tensor) -> Tensor:
    """`tensor` on the host; one on an accelerator is read back the first time."""
    return tensor if tensor.device.type == "cpu" else _copies(tensor).host


@torch.compiler.disable
def layout_of(cu_seqlens: Tensor, device: torch.device) -> PackedGrids:
    """The layout of cumulative lengths, for tokens on `device`."""
    copies = _copies(cu_seqlens)
    if device not in copies.layouts:
        copies.layouts[device] = PackedGrids.from_cu_seqlens(copies.host, device=device)
    return copies.layouts[device]


@torch.compiler.disable
def upload(host: Tensor, device: torch.device) -> Tensor:
    """`host` on `device`, without waiting; that it is a copy is remembered."""
    if host.device.type != "cpu" or device.type == "cpu":
        return host.to(device)
    pinned = host.pin_memory() if device.type == "cuda" else host
    there = pinned.to(device, non_blocking=True)
    if there.ndim == 1 or (there.ndim == 2 and there.shape[1] <= 3):  # lengths, or grids
        _remember(there, host)
    return there


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of grids, computed on the host; its results are where its first argument is."""

    @wraps(function)
    @torch.compiler.disable
    def computed(grids: Tensor, *args: Any, **options: Any) -> Any:
        host = [host_copy(a) if isinstance(a, Tensor) else a for a in (grids, *args)]
        options = {k: host_copy(a) if isinstance(a, Tensor) else a for k, a in options.items()}
        results = function(*host, **options)
        return pytree.tree_map_only(Tensor, lambda a: upload(a, grids.device), results)

    return computed


def _copies(tensor: Tensor) -> _Copies:
    for copies in tuple(_known):
        if _same(copies, tensor):
            return copies
    return _remember(tensor, tensor.cpu())


def _remember(tensor: Tensor, host: Tensor) -> _Copies:
    copies = _Copies(tensor.detach(), _version(tensor), host, {})
    if _forwards.depth or not tensor.is_inference():
        _known.append(copies)
    return copies


def _same(copies: _Copies, tensor: Tensor) -> bool:
    """Whether it is the same tensor, unchanged; one detached for a recomputation counts as such."""
    known = copies.tensor
    return (
        known.data_ptr() == tensor.data_ptr()
        and known.shape == tensor.shape
        and known.dtype == tensor.dtype
        and known.device == tensor.device
        and known.stride() == tensor.stride()
        and copies.version == _version(tensor)
    )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
