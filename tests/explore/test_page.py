import base64
import hashlib
import html
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from hrvlm.explore.page import PageImage, write_page
from tests.explore.pages import GRIDS, NAMES, page_images


def data_of(path):
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert len(blocks) == 1
    return json.loads(blocks[0]), text


def test_a_page_holds_what_it_was_given(rng, tmp_path):
    images = page_images(rng)
    page = write_page(tmp_path / "new" / "page.html", images, title="t", about="a model")
    data, text = data_of(page.path)
    assert page.bytes == page.path.stat().st_size == len(text.encode())
    assert data["about"] == "a model" and data["start"] is None
    assert [i["name"] for i in data["images"]] == [*NAMES[:2], "{{script}} ?.png"]
    assert [(i["rows"], i["columns"]) for i in data["images"]] == list(GRIDS)
    values = b"".join(base64.b64decode(i["values"]) for i in data["images"])
    stored = np.frombuffer(values, np.int8).reshape(-1, data["components"])
    assert np.array_equal(stored, page.reduced.values.numpy())
    for given, written in zip(images, data["images"], strict=True):
        attention = np.frombuffer(base64.b64decode(written["attention"]), "<f4")
        assert np.array_equal(attention, given.attention.flatten().numpy())
        assert len(base64.b64decode(written["colors"])) == 3 * given.attention.numel()
        assert written["picture"].startswith("data:image/webp;base64,")
    assert [p.name for p in page.path.parent.iterdir()] == ["page.html"]


def test_names_stay_names(rng, tmp_path):
    """Nothing that was given becomes a tag, and the page runs its own script and style alone."""
    title = "</title><script>alert('{{data}}')</script>"
    page = write_page(tmp_path / "page.html", page_images(rng), title=title, about="<i>")
    _, text = data_of(page.path)
    assert text.count("<script") == 2 and text.count("</script>") == 2
    assert html.escape(title) in text and "<i>" not in text and "alert(1)</" not in text
    script, style = (re.search(rf"<{t}>(.*?)</{t}>", text, re.S)[1] for t in ("script", "style"))
    policy = re.search(r'Security-Policy" content="([^"]*)"', text)[1]
    for kind, part in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "img-src data:" in policy
    others = re.findall(r"\b(?:https?|wss?|file)://[^\s\"']+", text)
    assert set(others) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_large_pictures_fit_their_share(rng, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (900, 1600, 3), dtype=np.uint8)
    features = torch.randn(2, 3, 8, generator=rng)
    images = [PageImage(str(i), Image.fromarray(noise), features) for i in range(2)]
    page = write_page(tmp_path / "page.html", images, title="noise")
    assert page.bytes < 2_100_000
    images = [PageImage(str(i), Image.new("L", (1, 3000)), features) for i in range(2)]
    assert write_page(tmp_path / "page.html", images, title="thin").bytes < 100_000


def test_what_does_not_fit_is_named(rng, tmp_path):
    good, other, _ = page_images(rng)
    picture = good.picture
    for images, message in (
        ([], "at least one"),
        ([good, PageImage("b", picture, torch.zeros(2, 3))], r"image 1 \(b\): features must be"),
        ([good, PageImage("b", picture, torch.zeros(2, 3, 4), torch.zeros(2, 3))], "C as in the"),
        ([good, PageImage("b", picture, other.features)], r"image 1 \(b\): all images have att"),
        ([PageImage("b", picture, good.features, torch.zeros(9, 6))], r"must be \[6, 9\]"),
        ([PageImage("b", picture, good.features / 0)], r"image 0 \(b\): features are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            write_page(tmp_path / "page.html", images, title="t")
    for start in ((1, 0, 0), (0, 6, 0), (0, 0, -1), (-1, 0, 0)):
        with pytest.raises(ValueError, match="there is no patch"):
            write_page(tmp_path / "page.html", [good], title="t", start=start)
    assert not list(tmp_path.iterdir())
