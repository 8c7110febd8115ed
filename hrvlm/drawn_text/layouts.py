"""Where the text goes: one function per layout, which draws on a canvas and returns its rows.

A layout returns the rows from top to bottom, each the runs from left to right, or nothing where the
text does not fit the canvas. Only `line` uses the text it is given; the others make their own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from random import Random
from typing import Any, NamedTuple

from PIL import ImageDraw

from .words import label, phrase, price, value

Colour = tuple[int, ...]


class Ink(NamedTuple):
    """Font and colours of a picture."""

    font: Any
    text: Colour
    ground: Colour


class Run(NamedTuple):
    """Text in one piece: its top left corner in pixels."""

    text: str
    x: float
    y: float
    font: Any


Rows = list[list[Run]]
_MARGIN = 2
_TIGHTEST = 0.3  # of the font size: narrower than any font's mean advance


def line(draw: ImageDraw.ImageDraw, ink: Ink, rng: Random, text: str) -> Rows:
    """The given text, anywhere on its canvas."""
    width, height = draw.im.size
    text = _fitted(text, ink.font, width)
    line_height = sum(ink.font.getmetrics())
    if not text or line_height > height - 1:
        return []
    x = rng.randint(_MARGIN, max(_MARGIN, int(width - _length(text, ink.font) - _MARGIN)))
    return _drawn(draw, ink, [[Run(text, x, rng.randint(0, height - line_height), ink.font)]])


def page(draw: ImageDraw.ImageDraw, ink: Ink, rng: Random, text: str) -> Rows:
    """As much text as the canvas holds."""
    return _block(draw, ink, rng, fill=True)


def lines(draw: ImageDraw.ImageDraw, ink: Ink, rng: Random, text: str) -> Rows:
    """One to eight lines of any length."""
    return _block(draw, ink, rng, fill=False)


def _block(draw: ImageDraw.ImageDraw, ink: Ink, rng: Random, fill: bool) -> Rows:
    width, height = draw.im.size
    step, line_height = _steps(ink.font, rng)
    most = _most_rows(height - 2, line_height, step)
    if most < 1:
        return []
    count = most if fill else rng.randint(1, min(most, 8))
    room = int((width - 2 * _MARGIN) / (_TIGHTEST * ink.font.size))
    texts = []
    for _ in range(count):
        wanted = room if fill else rng.randint(3, max(3, room))
        if text := _fitted(phrase(rng, max(3, wanted), fill=fill), ink.font, width):
            texts.append(text)
    if not texts:
        return []
    free = height - (len(texts) - 1) * step - line_height
    y = rng.uniform(1, max(1, free - 1))
    widest = max(_length(text, ink.font) for text in texts)
    x = rng.uniform(_MARGIN, max(_MARGIN, width - widest - _MARGIN))
    centred = not fill and rng.random() < 0.2
    rows = []
    for i, text in enumerate(texts):
        indent = (widest - _length(text, ink.font)) / 2 if centred else 0
        rows.append([Run(text, round(x + indent), round(y + i * step), ink.font)])
    return _drawn(draw, ink, rows)


def receipt(draw: ImageDraw.ImageDraw, ink: Ink, rng: Random, text: str) -> Rows:
    """A heading, rows of an item and its price, a rule and the total."""
    width, height = draw.im.size
    step, line_height = _steps(ink.font, rng)
    most = _most_rows(height - 4, line_height, step)
    if most < 3:
        return []
    heading = _fitted(phrase(rng, 16), ink.font, width)
    rows: Rows = [[Run(heading, round((width - _length(heading, ink.font)) / 2), 2, ink.font)]]
    count = rng.randint(1, min(most - 2, 8))
    for i in range(1, count + 2):
        y = round(2 + i * step)
        amount = price(rng)
        right = width - 4 - _length(amount, ink.font)
        text = rng.choice(["Total", "TOTAL", "Sum", "Amount due"])
        if i <= count:
            text = f"{rng.randint(1, 9)} {label(rng)}" if rng.random() < 0.5 else label(rng)
        text = _fitted(text, ink.font, right - 4)
        if not text:
            return []
        rows.append([Run(text, 4, y, ink.font), Run(amount, round(right), y, ink.font)])
    rule = round(2 + (count + 1) * step) - 1
    draw.line([(4, rule), (width - 4, rule)], fill=ink.text, width=1)
    return _drawn(draw, ink, rows) if heading else []


def form(draw: ImageDraw.ImageDraw, ink: Ink, rng: Random, text: str) -> Rows:
    """Rows of a label and a field, its value in a box or on a rule."""
    width, height = draw.im.size
    step, line_height = _steps(ink.font, rng)
    step += 6
    most = _most_rows(height - 8, line_height, step)
    if most < 1:
        return []
    column = round(width * rng.uniform(0.35, 0.5))
    boxed = rng.random() < 0.6
    rows: Rows = []
    for i in range(rng.randint(1, min(most, 7))):
        y = round(4 + i * step)
        name = _fitted(label(rng) + rng.choice([":", "", ":"]), ink.font, column - 4)
        text = _fitted(value(rng), ink.font, width - column - 8)
        if not name or not text:
            return []
        if boxed:
            box = [column - 3, y - 2, width - 4, y + line_height + 1]
            draw.rectangle(box, outline=_between(ink, 0.5), width=1)
        else:
            under = y + line_height + 1
            draw.line([(column, under), (width - 4, under)], fill=_between(ink, 0.5), width=1)
        rows.append([Run(name, 4, y, ink.font), Run(text, column + 2, y, ink.font)])
    return _drawn(draw, ink, rows)


def panel(draw: ImageDraw.ImageDraw, ink: Ink, rng: Random, text: str) -> Rows:
    """A title bar in the text's colour, lines of text, and a row of buttons."""
    width, height = draw.im.size
    step, line_height = _steps(ink.font, rng)
    bar = line_height + 6
    if height < 2 * bar + 6:
        return []
    title = _fitted(label(rng), ink.font, width - 8)
    draw.rectangle([0, 0, width, bar], fill=ink.text)
    rows: Rows = [[Run(title, 6, 3, ink.font)]]
    room = int((height - 2 * bar - 8) // step)
    for i in range(min(room, rng.randint(0, 5))):
        text = _fitted(phrase(rng, 40), ink.font, width - 12)
        rows.append([Run(text, 6, round(bar + 4 + i * step), ink.font)])
    buttons, x = [], 6.0
    y = height - line_height - 6
    for _ in range(rng.randint(1, 3)):
        name = label(rng)
        length = _length(name, ink.font)
        if x + length + 14 > width:
            break
        box = [round(x), y - 3, round(x + length + 10), y + line_height + 2]
        draw.rounded_rectangle(box, radius=4, outline=_between(ink, 0.6), width=1)
        buttons.append(Run(name, round(x + 5), y, ink.font))
        x += length + 20
    if not buttons or not all(run.text for row in rows for run in row):
        return []
    rows.append(buttons)
    draw.text((rows[0][0].x, rows[0][0].y), title, font=ink.font, fill=ink.ground)
    _drawn(draw, ink, rows[1:])
    return rows


LAYOUTS: dict[str, Callable[[ImageDraw.ImageDraw, Ink, Random, str], Rows]] = {
    "line": line,
    "page": page,
    "lines": lines,
    "receipt": receipt,
    "form": form,
    "panel": panel,
}


def _steps(font: Any, rng: Random) -> tuple[float, int]:
    """Distance of two lines, and the height of one."""
    ascent, descent = font.getmetrics()
    return (ascent + descent) * rng.uniform(1.0, 1.3), ascent + descent


def _most_rows(room: int, line_height: int, step: float) -> int:
    """How many lines `step` pixels apart fit `room` pixels; below 1 where not even one does."""
    return int((room - line_height) // step) + 1


def advances(text: str, font: Any) -> list[float]:
    """Where each character ends, in pixels from the start; kerning is left out."""
    return list(accumulate(_advance(character, font) for character in text))


@lru_cache(maxsize=1 << 16)
def _advance(character: str, font: Any) -> float:
    return float(font.getlength(character))


def _length(text: str, font: Any) -> float:
    return sum(_advance(character, font) for character in text)


def _fitted(text: str, font: Any, width: float) -> str:
    """The longest beginning of `text` that fits `width` pixels with its margins."""
    ends = advances(text, font)
    return text[: bisect_right(ends, width - 2 * _MARGIN)].rstrip()


def _between(ink: Ink, share: float) -> Colour:
    return tuple(
        round(share * t + (1 - share) * g) for t, g in zip(ink.text, ink.ground, strict=True)
    )


def _drawn(draw: ImageDraw.ImageDraw, ink: Ink, rows: Rows) -> Rows:
    for row in rows:
        for run in row:
            draw.text((run.x, run.y), run.text, font=run.font, fill=ink.text)
    return rows
