"""The one integer function: every size up to 512, extreme ratios, and what the split mode adds."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrvlm.images.geometry import (
    Geometry,
    TileGeometry,
    image_token_count,
    positive_pair,
    shuffled_grid,
    square_side,
    tile_grid,
    token_grid,
)

SIDES = range(1, 513)
COARSE = [*range(1, 40), *range(60, 70), *range(127, 131), *range(190, 513, 17), 511, 512]
FULL = [
    dict(max_img_size=512, patch_size=16, factor=4, allow_upscale=True),
    dict(max_img_size=512, patch_size=16, factor=4, allow_upscale=False),
    dict(max_img_size=300, patch_size=14, factor=1, allow_upscale=True),
]
SAMPLED = [
    dict(max_img_size=512, patch_size=16, factor=2, allow_upscale=False),
    dict(max_img_size=2048, patch_size=16, factor=4, allow_upscale=False),
    dict(max_img_size=64, patch_size=16, factor=4, allow_upscale=True),
    dict(max_img_size=100, patch_size=16, factor=3, allow_upscale=False),
    dict(max_img_size=7, patch_size=1, factor=1, allow_upscale=False),
    dict(max_img_size=2047, patch_size=8, factor=2, allow_upscale=True),
]


def snapped(sides, options):
    """Token rows and columns of every (h, w) in sides x sides, each int64 [n, n]."""
    p, s = options["patch_size"], options["factor"]
    rows = np.empty((len(sides), len(sides)), dtype=np.int64)
    cols = np.empty_like(rows)
    for (i, h), (j, w) in itertools.product(enumerate(sides), enumerate(sides)):
        g = token_grid(h, w, **options)
        gh, gw = g.token_grid
        if g != (gh * s * p, gw * s * p, (gh * s, gw * s), (gh, gw)):
            raise AssertionError(f"{h}x{w}: {g} contradicts itself")
        rows[i, j], cols[i, j] = gh, gw
    return rows, cols


def aspect_error(a, b, long, short):
    """The stretch between a : b and long : short as a fraction >= 1 (numerator, denominator)."""
    x, y = a * short, b * long
    return np.maximum(x, y), np.minimum(x, y)


@pytest.mark.parametrize(
    ("sides", "options"),
    [(SIDES, o) for o in FULL] + [(COARSE, o) for o in SAMPLED],
    ids=lambda v: "-".join(str(x) for x in v.values()) if isinstance(v, dict) else f"{len(v)}sides",
)
def test_every_size(sides, options):
    unit, limit = options["patch_size"] * options["factor"], options["max_img_size"]
    rows, cols = snapped(sides, options)
    side = np.array(sides, dtype=np.int64)
    h, w = np.broadcast_arrays(side[:, None], side[None, :])
    long, short = np.maximum(h, w), np.minimum(h, w)
    n_long, n_short = np.maximum(rows, cols), np.minimum(rows, cols)

    assert (n_short >= 1).all()
    assert (n_long * unit <= limit).all()
    assert (rows == cols.T).all(), "transposing the image transposes its grid"
    assert ((rows >= cols) | (h < w)).all() and ((cols >= rows) | (w < h)).all(), (
        "the longer side stays the longer"
    )
    assert (n_short[h == w] == n_long[h == w]).all(), "a square stays a square"

    # Given the long side, no other short side is nearer to the aspect ratio (exact, in integers).
    num, den = aspect_error(n_long, n_short, long, short)
    for other in range(1, limit // unit + 1):
        other_num, other_den = aspect_error(n_long, other, long, short)
        assert ((num * other_den <= other_num * den) | (other > n_long)).all(), other

    # Monotonic: each side grows with its own pixels, whichever is the longer.
    landscape = (h <= w)[:, :-1]
    assert ((n_long[:, 1:] >= n_long[:, :-1]) | ~landscape).all()
    assert ((n_short[:, 1:] >= n_short[:, :-1]) | landscape).all(), (
        "the short side grows with its pixels"
    )

    up = -(-side // unit)
    if options["allow_upscale"]:
        assert (n_long == limit // unit).all()
    else:
        assert (rows <= up[:, None]).all() and (cols <= up[None, :]).all()
        # The long side gives up one unit at most, and only where the short side is at its bound.
        full = np.minimum(limit // unit, np.maximum(up[:, None], up[None, :]))
        gave_up = n_long < full
        assert (full - n_long <= 1).all()
        assert (n_short[gave_up] == np.minimum(up[:, None], up[None, :])[gave_up]).all()


def test_without_upscaling_near_squares_stay_near_squares():
    # If the long side alone decided, 65x64 would become 128x128, or a picture twice as wide.
    assert token_grid(65, 64, max_img_size=512, allow_upscale=False)[:2] == (64, 64)
    assert token_grid(641, 640, max_img_size=2048, allow_upscale=False)[:2] == (640, 640)
    assert token_grid(100, 20, max_img_size=512, allow_upscale=False)[:2] == (128, 64)


@pytest.mark.parametrize(("rows", "cols"), list(itertools.product(range(1, 9), repeat=2)))
def test_a_snapped_size_stays_without_upscaling(rows, cols):
    first = token_grid(rows * 64, cols * 64, max_img_size=8 * 64, allow_upscale=False)
    assert first == Geometry(rows * 64, cols * 64, (rows * 4, cols * 4), (rows, cols))
    assert token_grid(first.height, first.width, max_img_size=8 * 64, allow_upscale=False) == first


@pytest.mark.parametrize(
    ("factor", "patch_grid", "grid", "tokens"),
    [(4, (40, 60), (10, 15), 150), (2, (40, 60), (20, 30), 600)],
)
@pytest.mark.parametrize("allow_upscale", [True, False])
def test_the_example_of_the_design(factor, patch_grid, grid, tokens, allow_upscale):
    g = token_grid(
        640, 960, max_img_size=960, patch_size=16, factor=factor, allow_upscale=allow_upscale
    )
    assert g == Geometry(640, 960, patch_grid, grid)
    assert (g.num_tokens, g.num_patches) == (tokens, 2400)


@pytest.mark.parametrize(
    ("height", "width", "up", "down"),
    [
        (1, 1, (32, 32), (1, 1)),
        (1, 20000, (1, 32), (1, 32)),
        (20000, 1, (32, 1), (32, 1)),
        (20000, 20, (32, 1), (32, 1)),
        (20, 20000, (1, 32), (1, 32)),
        (1, 1000, (1, 32), (1, 16)),
        (10**30, 10**30 + 1, (32, 32), (32, 32)),
        (10**30, 3 * 10**30, (11, 32), (11, 32)),
    ],
)
def test_extreme_sizes(height, width, up, down):
    assert token_grid(height, width, max_img_size=2048).token_grid == up
    assert token_grid(height, width, max_img_size=2048, allow_upscale=False).token_grid == down


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 10**6),
    width=st.integers(1, 10**6),
    patch=st.integers(1, 32),
    factor=st.integers(1, 8),
    units=st.integers(1, 200),
    allow_upscale=st.booleans(),
)
def test_any_options(height, width, patch, factor, units, allow_upscale):
    unit = patch * factor
    limit = units * unit + unit // 2
    g = token_grid(
        height,
        width,
        max_img_size=limit,
        patch_size=patch,
        factor=factor,
        allow_upscale=allow_upscale,
    )
    n_long, n_short = max(g.token_grid), min(g.token_grid)
    long, short = max(height, width), min(height, width)
    assert max(g.height, g.width) <= limit and g.height % unit == 0 and g.width % unit == 0

    def stretch(n):
        ratio = Fraction(n_long * short, n * long)
        return max(ratio, 1 / ratio)

    assert stretch(n_short) == min(stretch(n) for n in range(1, n_long + 1))
    if not allow_upscale:
        assert g.token_grid[0] <= -(-height // unit) and g.token_grid[1] <= -(-width // unit)


def test_whole_numbers_of_other_libraries_and_plain_ints_in_the_result():
    g = token_grid(np.int64(640), torch.tensor(960), max_img_size=np.uint16(960))
    assert g == token_grid(640, 960, max_img_size=960)
    flat = [g.height, g.width, *g.patch_grid, *g.token_grid]
    assert all(type(n) is int for n in flat)


@pytest.mark.parametrize("bad", [0, -1, 1.0, 640.5, "640", None, True, float("nan")], ids=repr)
@pytest.mark.parametrize("name", ["height", "width", "max_img_size", "patch_size", "factor"])
def test_bad_arguments_are_named(name, bad):
    arguments = dict(height=640, width=960, max_img_size=960, patch_size=16, factor=4) | {name: bad}
    with pytest.raises(ValueError, match=rf"{name}=.*expected a whole number"):
        token_grid(arguments.pop("height"), arguments.pop("width"), **arguments)


def test_a_limit_below_one_token_is_refused():
    with pytest.raises(ValueError, match=r"max_img_size=63 .* 16 \* 4 = 64"):
        token_grid(640, 960, max_img_size=63)
    assert token_grid(640, 960, max_img_size=64).token_grid == (1, 1)


@pytest.mark.parametrize(
    ("size", "options", "expected", "images"),
    [
        (
            (640, 960),
            dict(max_img_size=1024, splitted_image_size=512),
            TileGeometry(512, 1024, (1, 2)),
            3,
        ),
        (
            (900, 960),
            dict(max_img_size=1024, splitted_image_size=512),
            TileGeometry(1024, 1024, (2, 2)),
            5,
        ),
        (
            (3000, 1000),
            dict(max_img_size=2048, splitted_image_size=512),
            TileGeometry(2048, 512, (4, 1)),
            5,
        ),
        (
            (400, 500),
            dict(max_img_size=2048, splitted_image_size=512, allow_upscale=False),
            TileGeometry(512, 512, (1, 1)),
            1,
        ),
        (
            (1, 20000),
            dict(max_img_size=2000, splitted_image_size=512),
            TileGeometry(512, 1536, (1, 3)),
            4,
        ),
    ],
)
def test_tiles(size, options, expected, images):
    tiles = tile_grid(*size, **options)
    assert tiles == expected
    assert tiles.num_images == images
    assert tile_grid(*size[::-1], **options).tiles == expected.tiles[::-1]


@pytest.mark.parametrize(("height", "width"), [(640, 960), (65, 64), (17, 300), (1, 1), (333, 77)])
@pytest.mark.parametrize("factor", [1, 4])
def test_stretch_is_the_aspect_ratios_quotient(height, width, factor):
    size = token_grid(height, width, max_img_size=1024, factor=factor, allow_upscale=False)
    wide = Fraction(size.width, size.height) / Fraction(width, height)
    assert size.stretch(height, width) == pytest.approx(float(max(wide, 1 / wide)))
    assert size.stretch(height, width) == pytest.approx(size.stretch(2 * height, 2 * width))


@pytest.mark.parametrize("name", ["height", "width", "max_img_size", "splitted_image_size"])
def test_bad_tile_arguments_are_named(name):
    arguments = dict(height=640, width=960, max_img_size=1024, splitted_image_size=512) | {name: 0}
    with pytest.raises(ValueError, match=rf"{name}=0"):
        tile_grid(arguments.pop("height"), arguments.pop("width"), **arguments)
    with pytest.raises(ValueError, match=r"max_img_size=511 .* splitted_image_size=512"):
        tile_grid(640, 960, max_img_size=511, splitted_image_size=512)


@pytest.mark.parametrize("flag", [None, 1, "no", torch.tensor([True, False]), torch.tensor(True)])
def test_a_switch_is_true_or_false(flag):
    with pytest.raises(ValueError, match=r"allow_upscale=.*expected True or False"):
        token_grid(480, 640, max_img_size=640, allow_upscale=flag)


def test_a_side_without_a_value_is_no_number():
    with pytest.raises(ValueError, match=r"height=.*expected a whole number"):
        token_grid(torch.tensor(480, device="meta"), 640, max_img_size=640)


@pytest.mark.parametrize("value", [(3, 4), [3, np.int64(4)]])
def test_pairs(value):
    assert positive_pair(value) == (3, 4)


@pytest.mark.parametrize("value", [3, "34", (3,), (3, 4, 5), (3, 0), (3, 4.0), (True, 4), None])
def test_what_is_no_pair(value):
    assert positive_pair(value) is None


def test_tokens_are_those_of_the_shuffled_grid():
    assert shuffled_grid((8, 12), 4) == (2, 3)
    assert image_token_count((8, 12), 4) == 6 and image_token_count((8, 12), 4, True) == 7
    for count in (shuffled_grid, image_token_count):
        with pytest.raises(ValueError, match=r"patch grid 8x10 .* factor 4"):
            count((8, 10), 4)


def test_a_square_has_one_side():
    assert square_side("p", 16) == square_side("p", [16, 16]) == 16
    with pytest.raises(ValueError, match=r"p must be square, got \[16, 14\]"):
        square_side("p", [16, 14])
