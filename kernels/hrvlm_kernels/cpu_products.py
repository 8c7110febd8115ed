"""Products and the MLP by oneDNN on a CPU, with gradients and little new memory.

torch multiplies float32 by the library that it was built with, MKL on x86, which on AMD's
processors leaves half of their vector units idle; oneDNN, which torch takes for bfloat16 anyway, is
as fast on Intel's and twice as fast on AMD's. torch reaches it for float32 through the products
that Inductor writes, which take transposed operands as they are.

The MLP runs over a few rows at a time, forward and backward, so that what is between its products
stays in the cache: new memory costs a CPU as much as computing what is written there.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .cpu_rope import are_plain

CHUNK = 1024  # rows at most
_ONEDNN = torch.ops.mkldnn
_GELU: tuple[str, list[None], str] = "gelu", [], "none"
_NOTHING: tuple[str, list[None], str] = "none", [], ""


def helps(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether :func:`linear` and :func:`mlp` take `x` and these, and torch's own way is another."""
    return x.dtype == torch.float32 and serves(x, *parameters)


def serves(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether oneDNN may take a product of `x` and these, all of one dtype."""
    tensors = [x, *(p for p in parameters if p is not None)]
    return (
        are_plain(*tensors)
        and x.dtype in (torch.float32, torch.bfloat16)
        and all(a.dtype == x.dtype for a in tensors)
        and x.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
        and _is_supported(x.dtype)
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
    )


@cache
def _is_supported(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or _ONEDNN._is_mkldnn_bf16_supported()


@cache
def has_tiles() -> bool:
    """Whether bfloat16 is multiplied by a matrix unit (AMX), which reads packed weights."""
    return torch.cpu._is_amx_tile_supported()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """``x @ weight.T + bias``, and the exact GELU of it, without gradients; oneDNN :func:`serves`.

    Args:
        x: ``[M, K]``.
        weight: ``[N, K]``, or as ``_reorder_linear_weight`` packed it.
        bias: ``[N]``.
        gelu: Whether to apply it.
    """
    return _ONEDNN._linear_pointwise(x, weight, bias, *(_GELU if gelu else _NOTHING))


def _dense(a: Tensor) -> Tensor:
    """`a` in an order of memory that oneDNN reads: neither expanded nor cut out."""
    return a if a.is_contiguous() or a.T.is_contiguous() else a.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(_dense(x), _dense(weight), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            linear(grad, weight.T) if of_x else None,
            linear(grad.T, x.T) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` with gradients of any order, where it :func:`helps`.

    Args:
        x: ``[M, K]``.
        weight: ``[N, K]``.
        bias: ``[N]``.
    """
    return _Linear.apply(x, weight, bias)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, bias: Tensor | None
    ) -> Tensor:
        x, up_weight, down_weight = _dense(x), _dense(up), _dense(down)
        out, before = torch.empty_like(x), []
        for rows, result in zip(x.split(CHUNK), out.split(CHUNK), strict=True):
            before.append(product(rows, up_weight, up_bias))
            result.copy_(product(F.gelu(before[-1]), down_weight, bias))
        ctx.save_for_backward(x, up, up_bias, down, bias, *before)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, up, up_bias, down, bias, *before = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():  # this gradient is to have one, too
            inputs = [
                a for a, of_a in zip((x, up, up_bias, down, bias), wanted, strict=True) if of_a
            ]
            out = linear(F.gelu(linear(x, up, up_bias)), down, bias)
            found = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
            return tuple(next(found) if of_a else None for of_a in wanted)
        x_grad = torch.empty_like(x) if wanted[0] else None
        sums: dict[int, Tensor] = {}
        for i, (g, inner) in enumerate(zip(grad.contiguous().split(CHUNK), before, strict=True)):
            rows = slice(i * CHUNK, i * CHUNK + len(g))
            if wanted[3]:
                _add(sums, 3, product(g.T, F.gelu(inner).T))
            if wanted[4]:
                _add(sums, 4, g.sum(0))
            if not any(wanted[:3]):
                continue
            turned = product(g, _dense(down).T)
            torch.ops.aten.gelu_backward.grad_input(turned, inner, grad_input=turned)
            if wanted[1]:
                _add(sums, 1, product(turned.T, x[rows].T))
            if wanted[2]:
                _add(sums, 2, turned.sum(0))
            if x_grad is not None:
                x_grad[rows] = product(turned, _dense(up).T)
        return x_grad, *(sums.get(i) for i in range(1, 5))


def _add(sums: dict[int, Tensor], i: int, part: Tensor) -> None:
    sums[i] = sums[i].add_(part) if i in sums else part


def mlp(x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, bias: Tensor | None) -> Tensor:
    """``gelu(x @ up.T + up_bias) @ down.T + bias`` with gradients, where it :func:`helps`.

    Kept for the backward is what GELU takes; what it gives is computed again.

    Args:
        x: ``[M, C]``.
        up: ``[F, C]``.
        up_bias: ``[F]``.
        down: ``[C, F]``.
        bias: ``[C]``.
    """
    return _MLP.apply(x, up, up_bias, down, bias)
