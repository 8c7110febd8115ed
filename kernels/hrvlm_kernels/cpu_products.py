"""Products and the MLP by oneDNN on a CPU, with gradients and little new memory.

torch multiplies float32 by the library that it was built with, MKL on x86, which on an AMD EPYC
with AVX-512 took twice as long as oneDNN, and on an Intel Xeon, forward, as long. In bfloat16 torch
takes oneDNN by itself, but copies a bias first. It is reached through the products that Inductor
writes.

The MLP of float32 runs over a few rows at a time, forward and backward, so that what is between its
products stays in the cache: new memory costs a CPU as much as computing what is written there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def serves(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether oneDNN may take a product of rows `x` and these, all of one dtype."""
    return x.ndim == 2 and are_served(x, *(p for p in parameters if p is not None))


def are_served(x: Tensor, *others: Tensor) -> bool:
    """The same of tensors whose matrices are multiplied."""
    tensors = (x, *others)
    return (
        are_plain(*tensors)
        and x.dtype in (torch.float32, torch.bfloat16)
        and all(a.dtype == x.dtype and a.layout is torch.strided for a in tensors)
        and x.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
        and _is_supported(x.dtype)
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
    )


@cache
def _is_supported(dtype: torch.dtype) -> bool:
    """On x86, which MKL tells: on ARM, oneDNN is one way of several to the same library."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
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
        weight: ``[N, K]``, dense or transposed, or as ``_reorder_linear_weight`` packed it.
        bias: ``[N]``.
        gelu: Whether to apply it.
    """
    # Detached, their memory stays while oneDNN reads it, whatever another thread does to modules.
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    return _ONEDNN._linear_pointwise(x, weight, bias, *(_GELU if gelu else _NOTHING))


def dense(a: Tensor) -> Tensor:
    """A matrix in an order of memory that oneDNN reads: neither expanded nor cut out."""
    return a if a.is_contiguous() or a.T.is_contiguous() else a.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return product(dense(x), dense(weight), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return (
            None if weight is None else linear(grad, weight.T),
            None if x is None else _of_weight(grad, x, linear),
            grad.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _of_weight(grad: Tensor, x: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``grad.T @ x``; of two transposed operands oneDNN's op copies the first."""
    rows, n, k = *grad.shape, x.shape[1]
    if grad.dtype != torch.float32 or rows * n <= rows * k + n * k:
        return multiply(grad.T, x.T)
    return multiply(x.T, grad.T).T.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` with gradients of any order, by whatever is fastest.

    Args:
        x: ``[M, K]``.
        weight: ``[N, K]``.
        bias: ``[N]``.
    """
    if helps(x, weight, bias):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def helps(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN takes a product, and torch by itself would take a longer way."""
    return (x.dtype == torch.float32 or bias is not None) and serves(x, weight, bias)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, bias: Tensor | None
    ) -> Tensor:
        up_weight, down_weight = dense(up), dense(down)
        out, before = x.new_empty(x.shape[0], down.shape[0]), []
        for rows, result in zip(x.split(CHUNK), out.split(CHUNK), strict=True):
            before.append(product(rows, up_weight, up_bias))
            result.copy_(product(F.gelu(before[-1]), down_weight, bias))
        ctx.save_for_backward(x, up, up_bias, down, bias, *before)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, before = saved[:5], saved[5:]
        if torch.is_grad_enabled() or not serves(grad):
            return recorded_gradients(_plain_mlp, inputs, grad, ctx.needs_input_grad)
        x, up, _, down, _ = inputs
        of_x, of_up, of_up_bias, of_down, of_bias = ctx.needs_input_grad
        x_grad = torch.empty_like(x) if of_x else None
        sums: dict[str, Tensor] = {}
        for i, (g, inner) in enumerate(zip(grad.contiguous().split(CHUNK), before, strict=True)):
            rows = slice(i * CHUNK, i * CHUNK + len(g))
            if of_down:
                _add(sums, "down", _of_weight(g, F.gelu(inner), product))
            if of_bias:
                _add(sums, "bias", g.sum(0))
            if not (of_x or of_up or of_up_bias):
                continue
            turned = product(g, dense(down).T)
            torch.ops.aten.gelu_backward.grad_input(turned, inner, grad_input=turned)
            if of_up:
                _add(sums, "up", _of_weight(turned, dense(x[rows]), product))
            if of_up_bias:
                _add(sums, "up_bias", turned.sum(0))
            if x_grad is not None:
                x_grad[rows] = product(turned, dense(up).T)
        return x_grad, *(sums.get(name) for name in ("up", "up_bias", "down", "bias"))


def _add(sums: dict[str, Tensor], name: str, part: Tensor) -> None:
    sums[name] = sums[name].add_(part) if name in sums else part


def _plain_mlp(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, bias: Tensor | None
) -> Tensor:
    return F.linear(F.gelu(F.linear(x, up, up_bias)), down, bias)


def recorded_gradients(
    op: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    grad: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of `op`, of torch's own operations; with a graph where this is recorded."""
    recorded = torch.is_grad_enabled()
    # Aliases: hooks of the inputs are not theirs, nor are other paths. Autocast around a backward
    # is not the forward's.
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        aliases = [None if a is None else a.view_as(a) for a in inputs]
        leaves = [a for a, of_a in zip(aliases, wanted, strict=True) if of_a and a is not None]
        found = iter(torch.autograd.grad(op(*aliases), leaves, grad, create_graph=recorded))
    return tuple(next(found) if of_a else None for of_a in wanted)


def mlp(x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, bias: Tensor | None) -> Tensor:
    """``gelu(x @ up.T + up_bias) @ down.T + bias`` in float32 with gradients of any order.

    oneDNN :func:`serves`. Kept for the backward is what GELU takes; what it gives is made again.

    Args:
        x: ``[M, C]``.
        up: ``[F, C]``.
        up_bias: ``[F]``.
        down: ``[N, F]``.
        bias: ``[N]``.
    """
    return _MLP.apply(x, up, up_bias, down, bias)
