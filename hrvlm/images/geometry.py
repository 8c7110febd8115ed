"""How large an image becomes, and how many patches and tokens: integers only.

Everything that has to know a size asks `token_grid`: the image processors, the text's placeholders,
the encoder, the projector. There is no floating point here, so all of them agree for every size.

With `unit = patch_size * factor`, both sides become multiples of `unit` (so that the pixel shuffle
always divides them):

    long side:   L = max_img_size // unit                                  with upscaling
                 L = min(max_img_size // unit, ceil(long / unit))          without
    short side:  S = the whole number for which L : S is nearest to long : short, at least 1

"Nearest" is by the stretch, the larger of (L / S) / (long / short) and its inverse. With
`t = short * L / long`, S is `floor(t)` or the number above, which wins when
`t^2 > floor(t) * (floor(t) + 1)`. The product of two neighbours is never a square: no ties.

Without upscaling neither side may pass its own next multiple. Where S would (65x64 px: L = 2 asks
for S = 2, but 64 px are one unit), L goes down by one. That is always enough, since
`short * (L - 1) / long < short / unit`.
"""

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex


class Geometry(NamedTuple):
    """The size an image is resized to, and its grids.

    Attributes:
        height: pixels down, after resizing.
        width: pixels across, after resizing.
        patch_grid: (hp, wp), patches down and across.
        token_grid: (gh, gw), visual tokens down and across, (hp // factor, wp // factor).
    """

    height: int
    width: int
    patch_grid: tuple[int, int]
    token_grid: tuple[int, int]

    @property
    def num_patches(self) -> int:
        """Patches of the image: hp * wp."""
        return self.patch_grid[0] * self.patch_grid[1]

    @property
    def num_tokens(self) -> int:
        """Visual tokens of the image: gh * gw."""
        return self.token_grid[0] * self.token_grid[1]

    def stretch(self, height: int, width: int) -> float:
        """How far the aspect ratio is from that of the image of height x width pixels, at least 1.

        The larger of (height / width) / (resized height / resized width) and its inverse.
        """
        ratio = self.height * width / (self.width * height)
        return max(ratio, 1 / ratio)


class TileGeometry(NamedTuple):
    """The size an image is resized to before it is cut into square tiles.

    Attributes:
        height: pixels down, after resizing.
        width: pixels across, after resizing.
        tiles: (n_h, n_w), tiles down and across.
    """

    height: int
    width: int
    tiles: tuple[int, int]

    @property
    def num_images(self) -> int:
        """Squares the encoder sees: the tiles and, unless there is only one, the global image."""
        count = self.tiles[0] * self.tiles[1]
        return count if count == 1 else count + 1


def token_grid(
    height: SupportsIndex,
    width: SupportsIndex,
    *,
    max_img_size: SupportsIndex,
    patch_size: SupportsIndex = 16,
    factor: SupportsIndex = 4,
    allow_upscale: bool = True,
) -> Geometry:
    """Size, patch grid and token grid of an image (the rule is at the top of this file).

    640x960 px, `max_img_size=960`: stays 640x960, patch grid 40x60, token grid 10x15, 150 tokens.

    Args:
        height: pixels down, of the upright image.
        width: pixels across, of the upright image.
        max_img_size: limit of the longer side in pixels, of which the largest multiple of
            `patch_size * factor` counts.
        patch_size: side of a patch in pixels.
        factor: the pixel shuffle's factor: `factor` x `factor` patches make a token.
        allow_upscale: True brings the longer side of every image to the limit; False enlarges an
            image no further than each side's next multiple.

    Raises:
        ValueError: an argument is not a whole number of at least 1, or
            `max_img_size < patch_size * factor`.
    """
    height, width = positive_int("height", height), positive_int("width", width)
    patch, factor = positive_int("patch_size", patch_size), positive_int("factor", factor)
    limit = positive_int("max_img_size", max_img_size)
    true_or_false("allow_upscale", allow_upscale)
    unit = patch * factor
    if limit < unit:
        raise ValueError(
            f"max_img_size={limit} is smaller than one token: "
            f"expected at least patch_size * factor = {patch} * {factor} = {unit}"
        )
    gh, gw = _snap(height, width, unit, limit // unit, allow_upscale)
    return Geometry(gh * unit, gw * unit, (gh * factor, gw * factor), (gh, gw))


def tile_grid(
    height: SupportsIndex,
    width: SupportsIndex,
    *,
    max_img_size: SupportsIndex,
    splitted_image_size: SupportsIndex,
    allow_upscale: bool = True,
) -> TileGeometry:
    """Size and tiles of an image in nanoVLM's split mode: the same rule, a tile's side as the unit.

    nanoVLM (`data/custom_transforms.py`) rounds the short side up; here it goes to the nearest
    aspect ratio, as everywhere.

    Args:
        height: pixels down, of the upright image.
        width: pixels across, of the upright image.
        max_img_size: limit of the longer side in pixels, of which the largest multiple of
            `splitted_image_size` counts.
        splitted_image_size: side of a tile in pixels.
        allow_upscale: as in `token_grid`.

    Raises:
        ValueError: an argument is not a whole number of at least 1, or
            `max_img_size < splitted_image_size`.
    """
    height, width = positive_int("height", height), positive_int("width", width)
    limit = positive_int("max_img_size", max_img_size)
    true_or_false("allow_upscale", allow_upscale)
    side = positive_int("splitted_image_size", splitted_image_size)
    if limit < side:
        raise ValueError(
            f"max_img_size={limit} is smaller than one tile: "
            f"expected at least splitted_image_size={side}"
        )
    n_h, n_w = _snap(height, width, side, limit // side, allow_upscale)
    return TileGeometry(n_h * side, n_w * side, (n_h, n_w))


def shuffled_grid(patch_grid: tuple[int, int], factor: int) -> tuple[int, int]:
    """The token grid (gh, gw) that the pixel shuffle makes of a patch grid (hp, wp).

    Raises:
        ValueError: the factor does not divide the patch grid, or they are no positive ints.
    """
    if (pair := positive_pair(patch_grid)) is None:
        raise ValueError(f"patch grid {patch_grid!r:.60}: expected two positive ints (hp, wp)")
    (hp, wp), factor = pair, positive_int("factor", factor)
    if hp % factor or wp % factor:
        raise ValueError(
            f"patch grid {hp}x{wp} is not divisible by the pixel-shuffle factor {factor}"
        )
    return hp // factor, wp // factor


def image_token_count(patch_grid: tuple[int, int], factor: int, append_cls: bool = False) -> int:
    """Tokens that an image has in the language model: gh * gw, and one more for its CLS.

    Raises:
        ValueError: the factor is no whole number of at least 1, or does not divide the patch grid.
    """
    gh, gw = shuffled_grid(patch_grid, positive_int("factor", factor))
    return gh * gw + append_cls


def positive_int(name: str, value: SupportsIndex) -> int:
    """`value` as an int of at least 1; whole numbers of numpy and torch count, bools do not.

    Raises:
        ValueError: it is anything else; `name` says which argument.
    """
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):  # the latter: a tensor without a value, on "meta"
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
    return number


def positive_number(name: str, value: float) -> float:
    """`value`, if it is a finite number above 0; bools are none.

    Raises:
        ValueError: it is anything else; `name` says which argument.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: expected a positive number")
    return value


def positive_pair(value: object) -> tuple[int, int] | None:
    """`value` as two positive ints (see `positive_int`), such as a size or a grid; None if not."""
    if not isinstance(value, Sequence) or len(value) != 2:
        return None
    try:
        return positive_int("first", value[0]), positive_int("second", value[1])
    except ValueError:
        return None


def square_side(name: str, size: int | Sequence[int]) -> int:
    """The side of a square that is given as one number or as a pair.

    Raises:
        ValueError: the two differ; `name` says which argument.
    """
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"{name} must be square, got {size}")
    return int(sides.pop())


def true_or_false(name: str, value: bool) -> bool:
    """`value`, if it is a bool: a tensor, a number or a word is a mistake, not a truth.

    Raises:
        ValueError: it is none; `name` says which argument.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected True or False")
    return value


def _snap(
    height: int, width: int, unit: int, max_units: int, allow_upscale: bool
) -> tuple[int, int]:
    """Rows and columns of units; the rule is derived at the top of this file."""
    long, short = max(height, width), min(height, width)
    long_units = max_units if allow_upscale else min(max_units, -(-long // unit))
    short_units = _nearest_ratio(short * long_units, long)
    if not allow_upscale and short_units > -(-short // unit):
        long_units -= 1
        short_units = _nearest_ratio(short * long_units, long)
    return (short_units, long_units) if height <= width else (long_units, short_units)


def _nearest_ratio(numerator: int, denominator: int) -> int:
    """The whole number n >= 1 with the least stretch between n and numerator / denominator."""
    below = numerator // denominator
    return below + (numerator**2 > below * (below + 1) * denominator**2)
