"""How the encoder's work grows with the image: matrix products with tokens, attention with squares.

Counted (hrvlm.encoder.cost), so that no GPU is needed, and measured where a result file has the
parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from hrvlm.encoder.cost import Architecture, Cost, forward_cost, named_architecture

SIZES = (224, 768, 1024)
NAMES = ("vits16", "vitb16", "vitl16", "vith16plus", "vit7b16")


class Crossing(NamedTuple):
    """The smallest square image whose attention costs at least as much as its matrix products."""

    pixels: int
    tokens: int


class Fit(NamedTuple):
    """The straight line ``slope * x + intercept`` of least squares, and how well it fits."""

    slope: float
    intercept: float
    r_squared: float


def cost_of(architecture: Architecture, pixels: int) -> Cost:
    """FLOPs of a square image."""
    return forward_cost(architecture, (pixels // architecture.patch_size) ** 2)


def crossing(architecture: Architecture) -> Crossing:
    """Where attention passes the matrix products, by FLOPs."""
    side = 1
    while (cost := forward_cost(architecture, side * side)).attention < cost.gemm:
        side += 1
    return Crossing(side * architecture.patch_size, architecture.num_prefix_tokens + side * side)


def measured_crossing(
    tokens: Sequence[float], attention: Sequence[float], products: Sequence[float]
) -> float | None:
    """Tokens at which the measured times cross, between two measured sizes; None if they don't.

    Interpolates the logarithm of the quotient over the logarithm of the tokens.
    """
    quotients = [math.log(a / p) for a, p in zip(attention, products, strict=True)]
    for i in range(1, len(tokens)):
        before, after = quotients[i - 1], quotients[i]
        if before < 0 <= after:
            share = -before / (after - before)
            low, high = math.log(tokens[i - 1]), math.log(tokens[i])
            return math.exp(low + share * (high - low))
    return None


def straight_line(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Least squares of y over x.

    Raises:
        ValueError: fewer than three points, or all x are equal.
    """
    if len(x) < 3 or len(set(x)) == 1:
        raise ValueError(f"a fit needs three points at different x, got {list(x)}")
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    intercept = mean_y - slope * mean_x
    left = sum((b - slope * a - intercept) ** 2 for a, b in zip(x, y, strict=True))
    total = sum((b - mean_y) ** 2 for b in y)
    return Fit(slope, intercept, 1 - left / total if total else 1.0)


def flops_table() -> list[str]:
    """A Markdown table: FLOPs of both kinds at each size, and where they cross."""
    heads = [f"{size} px" for size in SIZES]
    lines = [
        f"| model | {' | '.join(heads)} | attention passes the products at |",
        "|---" * (len(SIZES) + 2) + "|",
    ]
    for name in NAMES:
        architecture = named_architecture(name)
        cells = []
        for size in SIZES:
            cost = cost_of(architecture, size)
            cells.append(f"{cost.total / 1e9:,.0f} ({cost.attention / cost.total:.0%})")
        at = crossing(architecture)
        lines.append(f"| {name} | {' | '.join(cells)} | {at.pixels} px, {at.tokens:,} tokens |")
    return lines
