"""The rules of what counts as right, as numbers: an error, its limit, and where it is worst.

- A contraction (attention, projection, a whole encoder) may err at most `factor` times as much,
  against float64, as the eager version in the same precision does: over the whole tensor, in every
  segment, and in the worst row. Two roundings are always allowed, since a baseline may be exact by
  luck (zeros, one-token segments).
- RoPE is elementwise and has an elementwise bound.
- Data movement is equality.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from hrvlm_kernels import PackedGrids

ROUNDINGS = 2.0
FACTOR = 2.0  # how much worse than the eager version an output may be
# torch's own attention in float32 on a GPU: its exponential is the hardware's, its products may be
# sums of TF32 ones, and it scales q beforehand. A rounding to TF32 alone is 500 times as large.
FACTOR_OF_SDPA_FLOAT32 = 8.0


class Finding(NamedTuple):
    """One error measured against one limit.

    Attributes:
        part: what was measured: "whole", "segment 3", "worst row", "element", "equal".
        error: NaN where the output is not finite or has the wrong shape or dtype.
        limit: the largest error that passes.
    """

    part: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error keeps the limit; NaN does not."""
        return self.error <= self.limit

    @property
    def used(self) -> float:
        """Share of the limit that the error takes: above 1 is a failure."""
        if math.isnan(self.error):
            return math.inf
        if self.limit > 0:
            return self.error / self.limit
        return 0.0 if self.error == 0 else math.inf


def factor_of(backend: str, dtype: torch.dtype, device: torch.device) -> float:
    """How much worse than the eager version in `dtype` a backend may be."""
    peer = backend == "sdpa" and dtype == torch.float32 and device.type == "cuda"
    return FACTOR_OF_SDPA_FLOAT32 if peer else FACTOR


def contraction(
    out: Tensor,
    oracle: Tensor,
    baseline: Tensor,
    packed: PackedGrids | None = None,
    *,
    factor: float = FACTOR,
    terms: Tensor | None = None,
) -> list[Finding]:
    """Errors of `out` against the float64 `oracle`, limited by those of the eager `baseline`.

    Rows are dim 0; a one-dimensional tensor is a single row. With `packed` (and T rows) each
    segment has its own limit. Errors are Frobenius norms.

    Args:
        out: What is judged.
        oracle: The result in float64.
        baseline: The result of the eager version in the dtype of `out`.
        packed: Layout of the rows.
        factor: How much worse than the baseline `out` may be.
        terms: One number per row: the size of the terms that cancel in it, where the result is a
            small difference of larger numbers; roundings are then relative to those.
    """
    unusable = _unusable(out, baseline)
    if unusable:
        return [unusable]
    if not out.numel():
        return []
    eps = torch.finfo(out.dtype).eps
    rows = out.shape[0] if out.ndim > 1 else 1
    exact = oracle.detach().double().reshape(rows, -1)
    error, allowed = (
        (a.detach().double().reshape(rows, -1) - exact).norm(dim=1) for a in (out, baseline)
    )
    size = exact.norm(dim=1)
    if terms is not None:
        size = size.maximum(terms)
    parts = {"whole": slice(None)}
    if packed is not None and out.shape[0] == packed.total_tokens:
        ends = packed.cu_seqlens.tolist()
        parts |= {f"segment {i}": slice(a, b) for i, (a, b) in enumerate(pairwise(ends)) if a < b}
    findings = []
    for part, at in parts.items():
        limit = factor * allowed[at].norm() + ROUNDINGS * eps * size[at].norm()
        findings.append(Finding(part, error[at].norm().item(), limit.item()))
    worst = factor * allowed.max() + ROUNDINGS * eps * size.max()
    findings.append(Finding("worst row", error.max().item(), worst.item()))
    return findings


def rope(out: Tensor, a: Tensor, coords: Tensor, inv_freq: Tensor) -> list[Finding]:
    """Error of `out`, which is to be `a` ``[T, H, D]`` rotated, where it is worst.

    The bound of an element is ``eps/2 |ref| + 4 eps32 (|a cos| + |b sin|)``, plus what the rounding
    of a float32 angle can do: an angle w rounded three times is off by at most ``1.5 eps32 |w|``
    and moves the output by that much times ``|a sin| + |b cos|``; b is rotate_half(a), the
    reference float64 on the quantised input.
    """
    unusable = _unusable(out, a)
    if unusable:
        return [unusable]
    if not out.numel():
        return []
    reference, bound = rope_reference(a, coords, inv_freq)
    error = (out.detach().double() - reference).abs()
    at = (error / bound).argmax()
    return [Finding("element", error.flatten()[at].item(), bound.flatten()[at].item())]


def rope_reference(a: Tensor, coords: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """`a` rotated in float64, and the bound of :func:`rope` for each element."""
    kind, eps32 = torch.finfo(a.dtype), torch.finfo(torch.float32).eps
    angles = 2 * torch.pi * coords.double()[:, :, None] * inv_freq.double()  # [T, 2, D/4]
    angles = angles.flatten(1).tile(2)[:, None]  # [T, 1, D]
    a = a.detach().double()
    first, second = a.chunk(2, -1)
    b = torch.cat((-second, first), -1)
    cos, sin = angles.cos(), angles.sin()
    reference = a * cos + b * sin
    bound = (
        0.5 * kind.eps * reference.abs()
        + 4 * eps32 * ((a * cos).abs() + (b * sin).abs())
        + 1.5 * eps32 * angles.abs() * ((a * sin).abs() + (b * cos).abs())
        + 0.5 * kind.smallest_normal * kind.eps
    )
    return reference, bound


def equal(out: Tensor, expected: Tensor) -> list[Finding]:
    """The number of elements of `out` that differ from `expected`; the limit is 0."""
    unusable = _unusable(out, expected, finite=False)
    return [unusable or Finding("equal", float((out != expected).sum().item()), 0.0)]


def relative_error(out: Tensor, oracle: Tensor) -> float:
    """``|out - oracle| / |oracle|`` over the whole tensor in float64; 0 for two empty ones."""
    size = oracle.detach().double()
    error = (out.detach().double() - size).norm()
    return (error / size.norm().clamp_min(1e-300)).item()


def _unusable(out: Tensor, like: Tensor, *, finite: bool = True) -> Finding | None:
    if out.shape != like.shape:
        return Finding(f"shape {tuple(out.shape)}, not {tuple(like.shape)}", math.nan, 0.0)
    if out.dtype != like.dtype:
        return Finding(f"{out.dtype}, not {like.dtype}", math.nan, 0.0)
    if finite and not out.isfinite().all():
        return Finding("not finite", math.nan, 0.0)
    return None
