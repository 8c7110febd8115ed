"""RoPE by torch's own operations on a CPU, with few passes and little new memory.

    first, second  ->  first cos - second sin, second cos + first sin          (ops/rope_2d.py)

New memory costs a CPU more than arithmetic: each page of it is a fault. So rows are rotated a few
at a time, while they are in the cache, straight into their place; the backward is the same with the
angles turned round, where autograd would keep and make a tensor for every product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_ROWS = 256  # of q and k of a ViT-S together: 0.8 MB in float32
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def are_plain(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors of a CPU, and nobody records what is done with them."""
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing())  # type: ignore[attr-defined]
        and all(type(a) in (Tensor, torch.nn.Parameter) and a.device.type == "cpu" for a in tensors)
        and not is_in_torch_dispatch_mode()
        and not _are_functorch_transforms_active()
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


def scratch_for(a: Tensor) -> Tensor | None:
    """Memory in which :func:`rotate` works on head vectors as `a`, any number of them.

    None where it needs none.
    """
    if a.dtype == torch.float32:
        return None
    return a.new_empty((2, min(_ROWS, len(a)), *a.shape[1:]), dtype=torch.float32)


def rotate(a: Tensor, cos: Tensor, sin: Tensor, out: Tensor, scratch: Tensor | None = None) -> None:
    """Write head vectors ``[T, ..., D]`` into `out`, rotated by cos and sin ``[T, D / 2]``.

    Args:
        a: The vectors.
        cos: Of their angles, float32.
        sin: As `cos`.
        out: As `a`.
        scratch: Of :func:`scratch_for`; default: made here.
    """
    shape = (-1, *[1] * (a.ndim - 2), cos.shape[1])
    if scratch is None:
        scratch = scratch_for(a)
    parts = (b.split(_ROWS) for b in (a, cos, sin, out))
    for rows, c, s, target in zip(*parts, strict=True):
        c, s, turned = c.reshape(shape), s.reshape(shape), target
        if scratch is not None:
            wide, turned = scratch[:, : len(rows)]
            rows = wide.copy_(rows)
        first, second = rows.chunk(2, dim=-1)
        one, other = turned.chunk(2, dim=-1)
        torch.mul(first, c, out=one).addcmul_(second, s, value=-1)
        torch.mul(second, c, out=other).addcmul_(first, s)
        if turned is not target:
            target.copy_(turned)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, cos: Tensor, sin: Tensor, heads_first: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.save_for_forward(cos, sin)
        t, h, d = a.shape
        out = a.new_empty(h, t, d).transpose(0, 1) if heads_first else a.new_empty(a.shape)
        rotate(a, cos, sin, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return rotated(grad, cos, -sin), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return rotated(tangent, *ctx.saved_tensors)


def rotated(a: Tensor, cos: Tensor, sin: Tensor, *, heads_first: bool = False) -> Tensor:
    """Head vectors ``[T, H, D]`` rotated, with gradients.

    Args:
        a: The vectors, which :func:`takes`.
        cos: ``[T, D / 2]`` float32.
        sin: As `cos`.
        heads_first: In memory ``[H, T, D]``, which attention reads faster.
    """
    return _Rotated.apply(a, cos, sin, heads_first)
