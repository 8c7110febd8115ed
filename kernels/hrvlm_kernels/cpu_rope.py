"""RoPE by torch's own operations on a CPU, with few passes and little new memory.

    first, second  ->  first cos - second sin, second cos + first sin          (ops/rope_2d.py)

New memory costs a CPU more than arithmetic: each page of it is a fault. So rows are rotated a few
at a time, while they are in the cache, straight into their place; the backward is the same with the
angles turned round, where autograd would keep and make a tensor for every product.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_ELEMENTS = 320_000  # in the cache at a time: 1.3 MB in float32
KEPT = 2_500_000  # floats, of a thread
_kept = threading.local()
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def are_plain(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors of a CPU, and nobody records what is done with them."""
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing())  # type: ignore[attr-defined]
        and all(type(a) in (Tensor, torch.nn.Parameter) and a.device.type == "cpu" for a in tensors)
        and not is_in_torch_dispatch_mode()
        and not _are_functorch_transforms_active()
        and not any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))
    )


def takes(coords: Tensor, inv_freq: Tensor, *heads: Tensor) -> bool:
    """Whether :func:`rotated` serves: it has no gradients of positions."""
    return (
        all(a.dtype in _FLOATS for a in heads)
        and not (coords.requires_grad or inv_freq.requires_grad)
        and are_plain(coords, inv_freq, *heads)
    )


def cos_and_sin(
    coords: Tensor, inv_freq: Tensor, table: Tensor | None = None
) -> tuple[Tensor, ...]:
    """``[T, D / 2]`` float32 each, of the angles of all tokens; from `table` if there is one."""
    if table is not None:
        return table.chunk(2, dim=1)
    from .reference import rope_angles

    angles = rope_angles(coords, inv_freq)
    return angles.cos(), angles.sin()


def both_halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What the halves of a head, and those halves exchanged, are multiplied with: ``[T, D]`` each.

    torch walks over whole heads twice as fast as over their halves.
    """
    return torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)


def rotate(a: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write head vectors ``[T, ..., D]`` into `out`, rotated by :func:`both_halves`.

    They are rotated as ``[..., T, D]``, which is how attention wants them in memory.
    """
    count = max(1, _ELEMENTS // max(1, a.shape[1:].numel()))
    parts = (b.split(count) for b in (a, cos, sin, out))
    for rows, c, s, target in zip(*parts, strict=True):
        rows, target = rows.movedim(0, -2), target.movedim(0, -2)
        wide, exchanged = scratch((2, *rows.shape))
        turned = target
        if rows.dtype != torch.float32:
            rows = turned = wide.copy_(rows)
        first, second = rows.chunk(2, dim=-1)
        torch.cat((second, first), -1, out=exchanged)
        torch.mul(rows, c, out=turned)
        turned.addcmul_(exchanged, s)
        if turned is not target:
            target.copy_(turned)


def scratch(shape: Sequence[int]) -> Tensor:
    """A float32 tensor of a shape, up to 10 MB in memory that every thread keeps and reuses."""
    size = math.prod(shape)
    if size > KEPT:
        return torch.empty(shape, device="cpu", dtype=torch.float32)
    if not hasattr(_kept, "floats") or size > _kept.floats.numel():
        with torch.inference_mode(False):
            _kept.floats = torch.empty(size, device="cpu", dtype=torch.float32)
    return _kept.floats[:size].view(shape)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, cos: Tensor, sin: Tensor, heads_first: bool, *heads: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.save_for_forward(cos, sin)
        return _rotate_all(heads, cos, sin, heads_first)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        turn = rotated if are_plain(*grads) else _by_torch  # which takes batches of gradients
        return None, None, None, *turn(grads, cos, -sin)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, ___: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return rotated(tangents, *ctx.saved_tensors)


def _rotate_all(
    heads: Sequence[Tensor], cos: Tensor, sin: Tensor, heads_first: bool
) -> tuple[Tensor, ...]:
    angles, results = both_halves(cos, sin), []
    for a in heads:
        t, h, d = a.shape
        out = a.new_empty(h, t, d).transpose(0, 1) if heads_first else a.new_empty(a.shape)
        rotate(a, *angles, out)
        results.append(out)
    return tuple(results)


def rotated(
    heads: Sequence[Tensor], cos: Tensor, sin: Tensor, *, heads_first: bool = False
) -> tuple[Tensor, ...]:
    """Head vectors rotated, with gradients.

    Args:
        heads: ``[T, H, D]`` each, which :func:`takes`.
        cos: ``[T, D / 2]`` float32.
        sin: As `cos`.
        heads_first: In memory ``[H, T, D]``, which attention reads faster.
    """
    if len({a.requires_grad for a in heads}) > 1:  # what needs no gradient shall not get one
        return tuple([_Rotated.apply(cos, sin, heads_first, a)[0] for a in heads])
    return _Rotated.apply(cos, sin, heads_first, *heads)


def _by_torch(heads: Sequence[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    from . import reference

    cos, sin = cos[:, None], sin[:, None]
    return tuple([reference.rotate(a.float(), cos, sin).to(a.dtype) for a in heads])
