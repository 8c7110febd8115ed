"""The page in a real Chromium: mouse, touch and keys, its numbers against torch's, its colours."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hrvlm.explore.page import PageImage, write_page
from hrvlm.inference.pictures import heat_colors
from tests.explore.pages import GRIDS, page_images

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking \
--disable-component-update --disable-sync"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium"),
]
PHOTO = Path(__file__).parents[2] / "examples" / "photo.jpg"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Three images, as written."""
    images = page_images(torch.Generator().manual_seed(7))
    path = tmp_path_factory.mktemp("page") / "page.html"
    return write_page(path, images, title="<h1> & co", start=(0, 2, 3))


@contextmanager
def opened(browser, path, **context):
    """A tab with the page, whose console must stay silent and which asks for nothing."""
    with browser.new_context(viewport={"width": 1100, "height": 900}, **context) as made:
        tab = made.new_page()
        said, asked = [], []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        yield tab
        assert not said
        assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]


def patch(tab, image, row, column):
    """Where a patch lies in the tab, which is scrolled to it."""
    rows, columns = GRIDS[image]
    box = tab.evaluate(
        """([i, part]) => {
          const stage = document.querySelectorAll(".stage")[i];
          const { top, height } = stage.getBoundingClientRect();
          scrollBy(0, top + part * height - innerHeight / 2);
          return stage.getBoundingClientRect().toJSON();
        }""",
        [image, (row + 0.5) / rows],
    )
    return (
        box["x"] + (column + 0.5) * box["width"] / columns,
        box["y"] + (row + 0.5) * box["height"] / rows,
    )


def written(value):
    return f"{value:.2f}".replace("-", "\u2212")


def until(tab, condition):
    """The page's policy forbids the evaluation that playwright's own waiting needs."""
    for _ in range(200):
        if tab.evaluate(condition):
            return
        tab.wait_for_timeout(50)
    raise AssertionError(condition)


def chosen(tab):
    return tab.evaluate("[explorer.state.chosen.image.index, explorer.state.chosen.index]")


def shown_similarities(tab):
    return [torch.tensor(tab.evaluate(f"[...explorer.similarities({i})]")) for i in range(3)]


def expected_similarities(page, image, index):
    """Those of what the page holds, by image."""
    z = page.reduced.coordinates()
    lengths = [rows * columns for rows, columns in GRIDS]
    own = sum(lengths[:image]) + index
    similarity = (z @ z[own]).clamp(-1, 1)
    similarity[own] = 1
    return similarity.split(lengths)


def pixels(tab, image):
    """What is painted over a picture: ``[rows, columns, 4]``."""
    rows, columns = GRIDS[image]
    data = tab.evaluate(
        """([i, w, h]) => [...document.querySelectorAll("canvas")[i].getContext("2d")
        .getImageData(0, 0, w, h).data]""",
        [image, columns, rows],
    )
    return np.array(data).reshape(rows, columns, 4)


def test_a_click_shows_torchs_similarities_everywhere(browser, page):
    images = page_images(torch.Generator().manual_seed(7))
    flat = torch.cat([image.features.flatten(0, 1) for image in images])
    with opened(browser, page.path) as tab:
        assert chosen(tab) == [0, 2 * 9 + 3]
        for image, row, column in ((1, 11, 0), (0, 0, 8), (2, 3, 3)):
            tab.mouse.click(*patch(tab, image, row, column))
            index = row * GRIDS[image][1] + column
            assert chosen(tab) == [image, index]
            shown = shown_similarities(tab)
            stored = expected_similarities(page, image, index)
            for mine, torchs in zip(shown, stored, strict=True):
                torch.testing.assert_close(mine, torchs, rtol=0, atol=1e-6)
            own = images[image].features[row, column]
            true = torch.cosine_similarity(flat, own[None])
            error = (torch.cat(shown) - true).abs().max()
            assert error <= page.reduced.largest_error + 1e-6
            # The rings and their numbers are the best of each other image.
            for other in {0, 1, 2} - {image}:
                best = stored[other].max()
                caption = tab.locator(".best").nth(other).text_content()
                assert caption == f"best {written(best)}"
                place = divmod(int(stored[other].argmax()), GRIDS[other][1])
                x, y = patch(tab, other, *place)
                ring = tab.locator(".ring").nth(other).bounding_box()
                assert abs(ring["x"] + ring["width"] / 2 - x) < 1
                assert abs(ring["y"] + ring["height"] / 2 - y) < 1


def test_the_colours_are_those_of_the_scale(browser, page):
    with opened(browser, page.path) as tab:
        tab.evaluate(
            "get('strength').value = 100; get('strength').dispatchEvent(new Event('input'))"
        )
        low = float(tab.locator("#low").text_content().replace("\u2212", "-"))
        assert tab.locator("#high").text_content() == "1.00"
        exact = tab.evaluate("scale().low")
        assert abs(low - exact) < 0.006
        every = torch.cat(expected_similarities(page, 0, 21))
        assert abs((every < exact).float().mean() - 0.02) < 0.02
        for i, values in enumerate(expected_similarities(page, 0, 21)):
            heat = heat_colors((values - exact) / (1 - exact)).numpy() * 255
            painted = pixels(tab, i).reshape(-1, 4)
            assert np.abs(painted[:, :3] - heat).max() < 6
            assert painted[:, 3].min() > 140
        brightest = pixels(tab, 0).sum(-1).argmax()
        assert brightest == 21


def test_keys_move_the_patch_and_switch_the_colours(browser, page):
    with opened(browser, page.path) as tab:
        stage = tab.get_by_role("application", name="a&amp;\"'<b>.png")
        best = int(expected_similarities(page, 0, 21)[1].argmax())
        stage.focus()
        tab.keyboard.press("ArrowDown")  # enters at the patch most like the one before
        assert chosen(tab) == [1, best]
        for _ in range(3):
            tab.keyboard.press("Shift+ArrowUp")
        for _ in range(4):
            tab.keyboard.press("ArrowLeft")
        assert chosen(tab) == [1, 0]
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("ArrowDown")
        assert chosen(tab) == [1, 5]
        until(tab, "get('live').textContent.includes('row 2, column 2. Most similar')")
        similarity = pixels(tab, 0)
        tab.keyboard.press("2")
        assert tab.get_by_role("radio", name="PCA").is_checked()
        colors = pixels(tab, 0)
        assert not tab.locator("#scale").is_visible() and not np.array_equal(colors, similarity)
        tab.keyboard.press("3")
        assert tab.locator("#high").text_content().endswith("\u00d7")
        attention = page_images(torch.Generator().manual_seed(7))[0].attention
        painted = pixels(tab, 0)[..., :3].sum(-1)
        assert painted.flat[int(attention.argmax())] == painted.max()
        assert painted.flat[int(attention.argmin())] == painted.min()
        tab.keyboard.press("1")
        assert np.array_equal(pixels(tab, 0), similarity)
        tab.keyboard.press("o")
        assert not pixels(tab, 0)[..., 3].any()
        tab.keyboard.press("?")
        assert tab.get_by_role("dialog", name="Looking through the page").is_visible()
        tab.keyboard.press("Escape")
        assert not tab.locator("#help").is_visible()


def test_a_finger_chooses_and_a_drag_follows(browser, page):
    with opened(browser, page.path, has_touch=True) as tab:
        tab.touchscreen.tap(*patch(tab, 2, 6, 1))
        assert chosen(tab) == [2, 43]
        tab.mouse.move(*patch(tab, 0, 1, 1))
        tab.mouse.down()
        assert chosen(tab) == [0, 10]
        tab.mouse.move(*patch(tab, 0, 4, 7), steps=5)
        until(tab, "explorer.state.chosen.index === 43")
        readout = tab.locator("#readout").text_content()
        assert readout.endswith("row 5, column 8: 1.00")
        tab.mouse.up()
        tab.mouse.move(*patch(tab, 2, 0, 0))
        assert chosen(tab) == [0, 43]  # only looked at
        value = expected_similarities(page, 0, 43)[2][0]
        assert (
            tab.locator("#readout").text_content().endswith(f"{value:.2f}".replace("-", "\u2212"))
        )


def test_lines_join_patches_that_are_each_others_best(browser, page):
    z = page.reduced.coordinates()
    parts = z.split([rows * columns for rows, columns in GRIDS])
    with opened(browser, page.path) as tab:
        tab.mouse.click(*patch(tab, 0, 0, 0))
        tab.get_by_role("button", name="Matches").click()
        for partner in (2, 1):
            if partner not in tab.evaluate("explorer.state.pair.map((i) => i.index)"):
                tab.keyboard.press("n")
            until(tab, "explorer.matches() !== undefined")
            found = tab.evaluate("explorer.matches()")
            assert 2 <= len(found) <= 24
            between = parts[0] @ parts[partner].T
            for match in found:
                i, j = match["from"], match["to"]
                assert int(between[i].argmax()) == j and int(between[:, j].argmax()) == i
                assert match["value"] == pytest.approx(float(between[i, j]), abs=1e-6)
            lines = tab.locator("#lines .line")
            assert lines.count() == len(found) + 1  # and that of the chosen patch
            first = found[0]
            ends = []
            for image, index in ((0, first["from"]), (partner, first["to"])):
                x, y = patch(tab, image, *divmod(index, GRIDS[image][1]))
                box = tab.locator("#gallery").bounding_box()
                ends += [x - box["x"], y - box["y"]]
            drawn = lines.first.get_attribute("d")[1:].replace("L", " ").split()
            assert np.abs(np.array(drawn, float) - ends).max() < 1
        apart = tab.locator("figure.apart .stage")
        assert apart.count() == 1
        apart.click()  # the third image takes the partner's place
        assert tab.evaluate("explorer.state.pair.map((i) => i.index)") == [0, 2]
        tab.keyboard.press("m")
        assert tab.locator("#lines .line").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_can_be_read(scheme, browser, page):
    def luminance(color):
        c = np.array([int(part) for part in color[4:-1].split(",")]) / 255
        c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return c @ [0.2126, 0.7152, 0.0722]

    with opened(browser, page.path, color_scheme=scheme) as tab:
        assert tab.title() == tab.get_by_role("heading").text_content() == "<h1> & co"
        found = {}
        for name in ("html", "h1", "#about", "#facts", ".best", "#readout"):
            style = "color" if name != "html" else "backgroundColor"
            found[name] = luminance(
                tab.evaluate(f"getComputedStyle(document.querySelector('{name}')).{style}")
            )
        paper = found.pop("html")
        assert (paper > 0.9) == (scheme == "light") and (paper < 0.02) == (scheme == "dark")
        for name, ink in found.items():
            contrast = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
            assert contrast > 4.5, name


def test_one_image_without_attention_shows_no_more_than_it_can(browser, rng, tmp_path):
    images = page_images(rng, attention=False)[1:2]
    page = write_page(tmp_path / "one.html", images, title="one")
    with opened(browser, page.path) as tab:
        assert not tab.get_by_role("button", name="Matches").is_visible()
        assert not tab.get_by_text("Attention", exact=True).is_visible()
        for key in "3mn":
            tab.keyboard.press(key)
        assert tab.evaluate("explorer.state.mode") == "similarity"
        assert chosen(tab) == [0, 26] and tab.locator("#lines .line").count() == 0


def test_twenty_large_images_are_a_small_page_that_answers_at_once(browser, rng, tmp_path):
    photo = np.asarray(Image.open(PHOTO).convert("RGB").resize((1024, 1024)))
    noise = np.random.default_rng(0).integers(-12, 13, photo.shape)  # fine grain, as cameras have
    picture = Image.fromarray((photo + noise).clip(0, 255).astype(np.uint8))
    basis = torch.randn(64, 96, generator=rng)
    images = []
    for i in range(20):
        features = torch.randn(73, 73, 64, generator=rng) @ basis  # patches of 14 pixels
        attention = torch.rand(73, 73, generator=rng)
        images.append(PageImage(f"{i}.png", picture, features, attention))
    page = write_page(tmp_path / "page.html", images, title="twenty")
    assert page.bytes <= 15_000_000
    with opened(browser, page.path) as tab:
        # Of the page's own thread: what else the machine does meanwhile is not the page's.
        inside = tab.context.new_cdp_session(tab)
        inside.send("Performance.enable", {"timeDomain": "threadTicks"})

        def busy():
            metrics = inside.send("Performance.getMetrics")["metrics"]
            return next(m["value"] for m in metrics if m["name"] == "TaskDuration")

        took = []
        for i in range(6):
            box = tab.locator(".stage").nth(i).bounding_box()
            tab.mouse.move(box["x"] + 20, box["y"] + 20)
            tab.wait_for_timeout(100)
            before = busy()
            tab.mouse.down()
            assert chosen(tab)[0] == i
            took.append(1000 * (busy() - before))
            tab.mouse.up()
        print("ms of a click:", took)
        assert np.median(took) <= 50, took
