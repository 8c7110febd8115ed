"""Drawn text: the same for the same seed, what it says is what is there, where it says it is."""

import numpy as np
import pytest

from hrvlm.drawn_text.drawing import FONTS, NEW_FONT, PROMPTS, RenderOptions, render, text_images
from hrvlm.drawn_text.layouts import LAYOUTS
from hrvlm.drawn_text.words import CHARACTERS, words
from hrvlm.reader.score import HELD_OUT, HELD_OUT_SEED

PLAIN = {"max_rotation": 0.0, "max_noise": 0.0}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    options = RenderOptions(layouts={layout: 1.0}, font_sizes=(8, 40))
    for index in range(12):
        sample = render(3, index, options)
        assert sample.image.mode == "RGB" and sample.layout == layout
        assert sample.text and set(sample.text) <= set(CHARACTERS)
        assert not any(line != line.strip() for line in sample.text.split("\n"))
        assert len(sample.centres) == len(sample.text)
        width, height = sample.image.size
        assert max(width, height) <= 8 * min(width, height)
        assert all(0 <= x < width and 0 <= y < height for x, y in sample.centres)


def test_a_seed_draws_the_same_again():
    options = RenderOptions(layouts=dict.fromkeys(LAYOUTS, 1.0), font_sizes=(8, 40))
    for index in (0, 5, 11):
        first, second = render(1, index, options), render(1, index, options)
        assert first.image.tobytes() == second.image.tobytes()
        assert (first.text, first.centres) == (second.text, second.centres)
    assert render(1, 0).text != render(2, 0).text


@pytest.mark.parametrize("rotation", [0.0, 3.0])
def test_characters_are_where_the_centres_are(rotation):
    """Letters leave ink in a small window around their centre; the ground is plain."""
    options = RenderOptions(font_sizes=(20, 32), max_rotation=rotation, max_noise=0.0)
    inked = checked = 0
    for index in range(60):
        sample = render(9, index, options)
        pixels = np.asarray(sample.image.convert("L")).astype(int)
        for character, (x, y) in zip(sample.text, sample.centres, strict=True):
            if character.isalnum():
                r = sample.font_size // 4
                rows = slice(max(0, int(y) - r), int(y) + r + 1)
                window = pixels[rows, max(0, int(x) - r) : int(x) + r + 1]
                checked += 1
                inked += window.max() - window.min() > 60
    assert checked > 200 and inked / checked > 0.98


def test_lines_keep_the_limits_and_fonts_differ():
    options = RenderOptions(max_characters=12, font_sizes=(14, 20))
    samples = [render(4, i, options) for i in range(80)]
    assert max(len(s.text) for s in samples) <= 12
    assert {s.font for s in samples} == set(FONTS)
    assert {s.font_size for s in samples} == set(range(14, 21))
    new = RenderOptions(fonts=(NEW_FONT,))
    assert render(4, 0, new).font == NEW_FONT not in FONTS


def test_groups_share_layout_and_canvas():
    options = RenderOptions(layouts={"lines": 1.0, "form": 1.0}, group=4)
    samples = [render(5, i, options) for i in range(16)]
    kinds = [{(s.layout, s.image.size) for s in samples[g : g + 4]} for g in range(0, 16, 4)]
    assert all(len(kind) == 1 for kind in kinds) and len(set.union(*kinds)) > 1


def test_rows_in_finevision_form():
    rows = list(text_images(seed=1, start=2, count=3, font_sizes=(14, 16)))
    assert [r["texts"][0]["assistant"] for r in rows] == [
        render(1, i, RenderOptions(font_sizes=(14, 16))).text for i in (2, 3, 4)
    ]
    assert all(r["texts"][0]["user"] in PROMPTS and len(r["images"]) == 1 for r in rows)


def test_as_a_datasets_source():
    datasets = pytest.importorskip("datasets")
    data = datasets.IterableDataset.from_generator(
        text_images, gen_kwargs={"seed": 1, "count": 3}, features=None
    )
    assert [row["texts"][0]["assistant"] for row in data] == [render(1, i).text for i in range(3)]


def test_held_out_texts_are_not_those_of_training():
    held_out = {render(HELD_OUT_SEED, i, HELD_OUT["line"]).text for i in range(50)}
    seen = {render(0, i, HELD_OUT["line"]).text for i in range(200)}
    assert len({t for t in held_out if len(t) > 6} & seen) == 0
    assert len(words()) > 2500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layouts": {"poster": 1.0}}, "poster"),
        ({"layouts": {}}, "positive weights"),
        ({"layouts": "line"}, "layouts='line'"),
        ({"fonts": "Roboto-Bold"}, "fonts='Roboto-Bold'"),
        ({"fonts": ("Comic",)}, "Comic"),
        ({"font_sizes": (2, 10)}, "font_sizes"),
        ({"group": 0}, "group=0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        RenderOptions(**options)


@pytest.mark.parametrize("layout", ["lines", "receipt", "form", "panel"])
def test_canvases_too_small_for_the_fonts_grow(layout):
    options = RenderOptions(layouts={layout: 1.0}, font_sizes=(40, 40), scale=0.3)
    assert min(render(3, 0, options).image.size) > 40


def test_lines_are_whole_at_any_scale():
    small = RenderOptions(scale=0.3, max_characters=40)
    assert render(3, 0, small).text == render(3, 0, RenderOptions(max_characters=40)).text
