"""Pictures of text with what they say: an endless, seeded supply, drawn with Pillow.

    sample = render(seed=7, index=0)
    sample.image, sample.text

What sample `index` looks like depends on the seed, the index and the options only: a run resumed at
sample n goes on with the very pictures that it would have seen. The fonts come with the package.

Consecutive samples form groups of one layout and one canvas size, so that a batch taken from one
group needs little padding in the language model; groups are independent of each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import as_file, files
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .layouts import LAYOUTS, Ink, Run, advances
from .words import phrase

FONTS = (
    "Aileron",  # Pillow's own
    "Caladea-Bold",
    "Caladea-Regular",
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansCondensed",
    "DejaVuSansMono",
    "DejaVuSerif",
    "Roboto-Bold",
    "Roboto-Regular",
)
NEW_FONT = "Caladea-BoldItalic"  # in no training set: for fine-tuning and held-out tests
PROMPTS = ("", "Read.", "Read the text.", "What does it say?")

# (widths, heights) of a layout's canvas in pixels, both ends included.
_CANVASES = {
    "page": ((64, 256), (64, 128)),
    "lines": ((64, 512), (48, 256)),
    "receipt": ((128, 320), (96, 320)),
    "form": ((160, 448), (64, 256)),
    "panel": ((160, 512), (64, 256)),
}
_MAX_ASPECT = 8
_PATIENCE = 50  # tries with other fonts and texts before a canvas grows


@dataclass(frozen=True)
class TextImage:
    """A picture of text.

    Attributes:
        image: RGB.
        text: What it says: lines apart by a newline, pieces of a line by a space.
        centres: (x, y) in pixels of each character of `text`; of a space between two pieces and of
            a newline, the end of what stands before.
        layout: One of `LAYOUTS`.
        font: Name of the font.
        font_size: In pixels, of the body text.
    """

    image: Image.Image
    text: str
    centres: tuple[tuple[float, float], ...]
    layout: str
    font: str
    font_size: int


@dataclass(frozen=True)
class RenderOptions:
    """What to draw.

    Attributes:
        layouts: Weight of each layout: "line" (one short line), "page" (filled with text, for the
            encoder alone), "lines", "receipt", "form", "panel".
        fonts: Names from `FONTS`, or `NEW_FONT`.
        font_sizes: Smallest and largest, in pixels.
        max_characters: Of a line of layout "line".
        full_lines: Whether those lines have nearly that many characters, instead of 3 and more.
        max_rotation: Degrees, either way.
        max_noise: Standard deviation of the noise, of 255.
        group: Consecutive samples of one layout and canvas size.
        scale: Canvas sides are multiplied by this before they are rounded; a "line" has a canvas
            cut to its text.

    Raises:
        ValueError: a name is unknown or a number out of range.
    """

    layouts: Mapping[str, float] = field(default_factory=lambda: {"line": 1.0})
    fonts: Sequence[str] = FONTS
    font_sizes: tuple[int, int] = (14, 32)
    max_characters: int = 20
    full_lines: bool = False
    max_rotation: float = 3.0
    max_noise: float = 12.0
    group: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check every field."""
        if not isinstance(self.layouts, Mapping) or isinstance(self.fonts, str):
            raise ValueError(
                f"layouts={self.layouts!r}, fonts={self.fonts!r}: expected weights by name and a "
                "list of names"
            )
        if not self.layouts or min(self.layouts.values()) < 0 or not sum(self.layouts.values()):
            raise ValueError(f"layouts={dict(self.layouts)}: expected positive weights")
        for name, known in ((self.layouts, LAYOUTS), (self.fonts, (*FONTS, NEW_FONT))):
            if unknown := sorted(set(name) - set(known)):
                raise ValueError(f"unknown {unknown}: expected some of {sorted(known)}")
        low, high = self.font_sizes
        if not self.fonts or not 5 <= low <= high <= 64:
            raise ValueError(f"fonts={self.fonts}, font_sizes={self.font_sizes}: 5 to 64 pixels")
        if self.group < 1 or self.max_characters < 3 or self.scale <= 0:
            raise ValueError(
                f"group={self.group}, max_characters={self.max_characters}, scale={self.scale}: "
                "expected at least 1, at least 3, more than 0"
            )


def render(seed: int, index: int, options: RenderOptions | None = None) -> TextImage:
    """Draw one sample.

    Args:
        seed: Of the whole supply.
        index: Of the sample, from 0.
        options: What to draw; default: single short lines.
    """
    options = options or RenderOptions()
    group = Random(f"{seed}/group/{index // options.group}")
    names = sorted(options.layouts)
    layout = group.choices(names, [options.layouts[name] for name in names])[0]
    canvas = _canvas(layout, options, group)
    rng = Random(f"{seed}/sample/{index}")
    for attempt in itertools.count():
        name = rng.choice(list(options.fonts))
        size = rng.randint(*options.font_sizes)
        ink = _ink(_font(name, size), rng)
        # A canvas that is too small for all these fonts grows in the end.
        growth = 1 + max(0, attempt - _PATIENCE) / _PATIENCE
        width, height = (round(growth * side) for side in canvas)
        text = ""
        if layout == "line":
            full = options.full_lines
            limit = options.max_characters if full else rng.randint(3, options.max_characters)
            text = phrase(rng, limit, fill=full)
            width, height = _around(text, ink.font, rng)
        image = _background(width, height, ink, rng)
        rows = LAYOUTS[layout](ImageDraw.Draw(image), ink, rng, text)
        if rows:
            break
    image, centres = _rotated(image, rows, ink, rng, options.max_rotation)
    text = "\n".join(" ".join(run.text for run in row) for row in rows)
    return TextImage(_weathered(image, rng, options), text, centres, layout, name, size)


def text_images(
    seed: int = 0, start: int = 0, count: int | None = None, **options: Any
) -> Iterator[dict[str, Any]]:
    """Samples as rows of a data set in FineVision's form.

    Args:
        seed: Of the supply.
        start: Index of the first sample.
        count: How many; None for no end.
        **options: Of :class:`RenderOptions`.

    Yields:
        ``{"images": [image], "texts": [{"user": prompt, "assistant": transcript}]}``, the prompt
        one of `PROMPTS`.
    """
    chosen = RenderOptions(**options)
    index = start
    while count is None or index < start + count:
        sample = render(seed, index, chosen)
        yield {
            "images": [sample.image],
            "texts": [{"user": prompt_of(seed, index), "assistant": sample.text}],
        }
        index += 1


def prompt_of(seed: int, index: int) -> str:
    """The prompt that goes with a sample."""
    return Random(f"{seed}/prompt/{index}").choice(PROMPTS)


@lru_cache(maxsize=1024)
def _font(name: str, size: int) -> Any:
    if name == "Aileron":
        return ImageFont.load_default(size)
    with as_file(files("hrvlm").joinpath(f"assets/fonts/{name}.ttf")) as path:
        return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _canvas(layout: str, options: RenderOptions, rng: Random) -> tuple[int, int]:
    """Mostly multiples of 16; a quarter of the groups have any size, which the processor snaps."""
    if layout not in _CANVASES:  # a line's canvas is cut to its text
        return 0, 0
    widths, heights = _CANVASES[layout]
    unit = 1 if rng.random() < 0.25 else 16
    while True:
        width, height = (
            max(16, round(rng.uniform(*sides) * options.scale / unit) * unit)
            for sides in (widths, heights)
        )
        if max(width, height) <= _MAX_ASPECT * min(width, height):
            return width, height


def _around(text: str, font: Any, rng: Random) -> tuple[int, int]:
    """A canvas for one line, with some air around it."""
    unit = 1 if rng.random() < 0.25 else 16
    wide, high = advances(text, font)[-1] + 6, sum(font.getmetrics()) + 2
    width = math.ceil(wide * rng.uniform(1.0, 1.5) / unit) * unit
    height = math.ceil(high * rng.uniform(1.0, 1.6) / unit) * unit
    return max(width, -(-height // _MAX_ASPECT)), max(height, -(-width // _MAX_ASPECT))


def _ink(font: Any, rng: Random) -> Ink:
    """Colours of text and ground, at least 90 of 255 apart in lightness."""
    while True:
        text, ground = (tuple(rng.randint(0, 255) for _ in range(3)) for _ in range(2))
        if rng.random() < 0.4:  # plain: black on white and the like
            shade = rng.randint(0, 40)
            text, ground = (shade,) * 3, (255 - rng.randint(0, 30),) * 3
            if rng.random() < 0.35:
                text, ground = ground, text
        if abs(_lightness(text) - _lightness(ground)) >= 90:
            return Ink(font, text, ground)


def _lightness(colour: Sequence[int]) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _background(width: int, height: int, ink: Ink, rng: Random) -> Image.Image:
    """Plain, or a gradient that stays within 25 of 255 of the ground colour."""
    if rng.random() < 0.7:
        return Image.new("RGB", (width, height), ink.ground)
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(5, 25)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    shade = strength * (x * math.cos(angle) + y * math.sin(angle)) / math.sqrt(2)
    pixels = np.asarray(ink.ground) + shade[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _rotated(
    image: Image.Image, rows: Sequence[Sequence[Run]], ink: Ink, rng: Random, limit: float
) -> tuple[Image.Image, tuple[tuple[float, float], ...]]:
    """Turn a third of the images a little, as far as no text leaves them; with the centres."""
    centres = [c for r, row in enumerate(rows) for c in _row_centres(row, r + 1 < len(rows))]
    if limit <= 0 or rng.random() > 0.33:
        return image, tuple(centres)
    runs = [run for row in rows for run in row]
    top = min(run.y for run in runs)
    bottom = max(run.y + sum(run.font.getmetrics()) for run in runs)
    left = min(run.x for run in runs)
    right = max(run.x + advances(run.text, run.font)[-1] for run in runs)
    middle_x, middle_y = image.width / 2, image.height / 2
    slack = max(0.0, min(top, image.height - bottom, left, image.width - right))
    reach = max(abs(left - middle_x), abs(right - middle_x), middle_y - top, bottom - middle_y)
    most = min(limit, math.degrees(math.asin(min(1.0, slack / reach))))
    angle = rng.uniform(-most, most)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turned = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=ink.ground)
    return turned, tuple(
        (
            middle_x + (x - middle_x) * cos + (y - middle_y) * sin,
            middle_y - (x - middle_x) * sin + (y - middle_y) * cos,
        )
        for x, y in centres
    )


def _row_centres(row: Sequence[Run], newline: bool) -> Iterator[tuple[float, float]]:
    for i, run in enumerate(row):
        y = run.y + 0.65 * run.font.getmetrics()[0]
        before = 0.0
        for after in advances(run.text, run.font):
            yield run.x + (before + after) / 2, y
            before = after
        if i + 1 < len(row) or newline:
            yield run.x + before + 1, y


def _weathered(image: Image.Image, rng: Random, options: RenderOptions) -> Image.Image:
    if rng.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.6)))
    if rng.random() < 0.4 or options.max_noise <= 0:
        return image
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(
        (image.height, image.width, 1 if rng.random() < 0.5 else 3), dtype=np.float32
    )
    pixels = np.asarray(image) + rng.uniform(0, options.max_noise) * noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
