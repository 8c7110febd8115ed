"""Two kinds of charts as SVG text: lines over one axis, and bars around 1.

Everything is drawn with rectangles, lines and text, in colours that are told apart without colour
vision and on a white ground that survives dark pages. Sizes are in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, FONT = 760, "font-family='sans-serif'"
LEFT, RIGHT, TOP, BOTTOM = 78, 24, 48, 56
INK, GRID = "#333333", "#dddddd"
# Okabe and Ito's palette, ours first.
COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6d31", "#666666")
DASHES = ("", "7 4", "2 3", "9 3 2 3")
LEGEND_ROW = 18


@dataclass(frozen=True)
class Series:
    """A line: its name and its points, x ascending."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Axis:
    """A label, whether it is logarithmic, and ticks where the usual ones won't do."""

    label: str
    log: bool = False
    ticks: tuple[float, ...] = ()


def line_chart(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """Lines with a mark at each point and a legend below.

    Raises:
        ValueError: there is no point, or a logarithmic axis gets a number that is not above 0.
    """
    points = [point for line in series for point in line.points]
    if not points:
        raise ValueError("series: expected at least one point, got none")
    plot_height = 330
    legend_top = TOP + plot_height + BOTTOM
    rows = -(-len(series) // 2)
    height = legend_top + rows * LEGEND_ROW + 12
    place_x, ticks_x = _scale([p[0] for p in points], x, LEFT, WIDTH - RIGHT)
    place_y, ticks_y = _scale([p[1] for p in points], y, TOP + plot_height, TOP)
    body = [*_frame(title, x, y, plot_height)]
    for tick in ticks_x:
        at = place_x(tick)
        body.append(_line(at, TOP, at, TOP + plot_height, GRID))
        body.append(_text(at, TOP + plot_height + 18, number(tick), anchor="middle"))
    for tick in ticks_y:
        at = place_y(tick)
        body.append(_line(LEFT, at, WIDTH - RIGHT, at, GRID))
        body.append(_text(LEFT - 8, at + 4, number(tick), anchor="end"))
    body.append(_line(LEFT, TOP + plot_height, WIDTH - RIGHT, TOP + plot_height, INK))
    body.append(_line(LEFT, TOP, LEFT, TOP + plot_height, INK))
    for i, line in reversed(list(enumerate(series))):  # the first lies on top
        color, dash = COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)]
        width = 3 if i == 0 else 2
        placed = [(place_x(a), place_y(b)) for a, b in line.points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in placed)
        body.append(
            f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='{width}' "
            f"stroke-dasharray='{dash}'/>"
        )
        body += [f"<circle cx='{a:.1f}' cy='{b:.1f}' r='3.5' fill='{color}'/>" for a, b in placed]
        at_x, at_y = LEFT + i % 2 * 330, legend_top + i // 2 * LEGEND_ROW
        body.append(_line(at_x, at_y, at_x + 26, at_y, color, width=width, dash=dash))
        body.append(_text(at_x + 34, at_y + 4, line.name))
    return _document(height, body)


def bar_chart(title: str, label: str, bars: Sequence[tuple[str, float]]) -> str:
    """Horizontal bars from 1: to the right where the number is above it; a logarithmic axis.

    Args:
        title: Above the chart.
        label: Of the axis.
        bars: Names and numbers above 0, from top to bottom.

    Raises:
        ValueError: there is no bar, or a number is not above 0.
    """
    if not bars:
        raise ValueError("bars: expected at least one, got none")
    row, left = 24, 372
    bottom = TOP + row * len(bars)
    axis = Axis(label, log=True)
    place, ticks = _scale([1.0, *(value for _, value in bars)], axis, left, WIDTH - 70)
    body = [_text(LEFT // 2, 26, title, size=16, weight="bold")]
    for tick in ticks:
        at = place(tick)
        body.append(_line(at, TOP, at, bottom, GRID))
        body.append(_text(at, bottom + 18, f"{number(tick)}x", anchor="middle"))
    one = place(1.0)
    for i, (name, value) in enumerate(bars):
        y, end = TOP + row * i, place(value)
        color = COLORS[2] if value >= 1 else COLORS[0]
        body.append(
            f"<rect x='{min(one, end):.1f}' y='{y + 4}' width='{abs(end - one):.1f}' "
            f"height='{row - 8}' fill='{color}'/>"
        )
        body.append(_text(left - 10, y + row / 2 + 4, name, anchor="end", size=12))
        body.append(_text(max(one, end) + 6, y + row / 2 + 4, f"{value:.2f}x", size=12))
    body.append(_line(one, TOP - 4, one, bottom, INK, width=2))
    body.append(_text((left + WIDTH - 70) / 2, bottom + 40, label, anchor="middle"))
    return _document(bottom + 56, body)


def number(value: float) -> str:
    """A tick's text: ``1024``, ``0.25``, ``20k``, ``1.5M``."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.4g}{suffix}"
    return f"{value:.4g}"


def _scale(
    values: Sequence[float], axis: Axis, start: float, end: float
) -> tuple[Callable[[float], float], list[float]]:
    """Where a value lies between `start` and `end`, and the ticks."""
    low, high = min(values), max(values)
    if axis.log:
        if low <= 0:
            raise ValueError(f"{axis.label}: a logarithmic axis needs numbers above 0, got {low}")
        ticks = list(axis.ticks) or _log_ticks(low, high)
        low, high = math.log(min(low, ticks[0])), math.log(max(high, ticks[-1]))
    else:
        ticks = list(axis.ticks) or _linear_ticks(high)
        low, high = 0.0, max(high, ticks[-1])
    span = (high - low) or 1.0

    def place(value: float) -> float:
        position = math.log(value) if axis.log else value
        return start + (end - start) * (position - low) / span

    return place, ticks


def _linear_ticks(high: float) -> list[float]:
    """From 0 in steps of 1, 2 or 5 times a power of ten, about five of them."""
    rough = (high or 1.0) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough)
    return [i * step for i in range(math.ceil((high or 1.0) / step - 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten with 2 and 5 between them, from at most `low` to at least `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [f * 10.0**power for power in range(first, last + 1) for f in (1, 2, 5)]
    if high / low > 1000:
        ticks = [10.0**power for power in range(first, last + 1)]
    start = max((i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9)), default=0)
    stop = next((i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9)), len(ticks) - 1)
    return ticks[start : max(stop, start + 1) + 1]


def _frame(title: str, x: Axis, y: Axis, plot_height: int) -> list[str]:
    middle = TOP + plot_height / 2
    return [
        _text(LEFT // 2, 26, title, size=16, weight="bold"),
        _text((LEFT + WIDTH - RIGHT) / 2, TOP + plot_height + 38, x.label, anchor="middle"),
        f"<text x='18' y='{middle}' {FONT} font-size='13' fill='{INK}' text-anchor='middle' "
        f"transform='rotate(-90 18 {middle})'>{escape(y.label)}</text>",
    ]


def _text(
    x: float, y: float, text: str, *, size: int = 13, anchor: str = "start", weight: str = "normal"
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' {FONT} font-size='{size}' fill='{INK}' "
        f"text-anchor='{anchor}' font-weight='{weight}'>{escape(text)}</text>"
    )


def _line(
    x1: float, y1: float, x2: float, y2: float, color: str, *, width: float = 1, dash: str = ""
) -> str:
    return (
        f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{color}' "
        f"stroke-width='{width}' stroke-dasharray='{dash}'/>"
    )


def _document(height: float, body: Sequence[str]) -> str:
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height:.0f}'>"
    ground = f"<rect width='{WIDTH}' height='{height:.0f}' fill='#ffffff'/>"
    return "\n".join([head, ground, *body, "</svg>", ""])
