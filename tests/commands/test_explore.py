"""``hrvlm explore``."""

import json

import pytest
import torch

from hrvlm import DINOv3Encoder
from hrvlm.images.processor import SAT493M, get_image_processor
from tests.commands.helpers import error_of, run
from tests.explore.test_page import data_of


def test_explore_writes_a_page_and_says_what_it_keeps(images, model, tmp_path):
    out = tmp_path / "page.html"
    arguments = ("explore", images, "--out", out, "--model", model, "--max-img-size", 128)
    shown = run(*arguments, "--title", "three")
    assert shown.exit_code == 0, shown.output
    assert "of the variance" in shown.stdout and str(out) in shown.stdout
    data, text = data_of(out)
    assert "<h1>three</h1>" in text and data["about"] == str(model)
    assert [i["name"] for i in data["images"]] == ["a_turned.jpg", "b_wide.png", "c_tall.webp"]
    assert [(i["rows"], i["columns"]) for i in data["images"]] == [(8, 5), (4, 8), (8, 2)]
    document = json.loads(run(*arguments, "--layer", 1, "--json").stdout)
    assert document["bytes"] == out.stat().st_size and document["layer"] == 1
    assert document["patches_compared"] == 88 and document["images"][0]["patch_grid"] == [8, 5]
    other, _ = data_of(out)
    assert other["images"][0]["values"] != data["images"][0]["values"]
    assert other["about"].endswith("layer 1 of 3")


@pytest.mark.parametrize("layer", [1, 3])
def test_features_and_attention_are_the_encoders(layer, images, model, tmp_path, monkeypatch):
    from hrvlm.explore import explore

    given = []
    monkeypatch.setattr(explore, "write_page", lambda path, shown, **_: given.extend(shown) or path)
    loaded = explore.LoadedEncoder(
        DINOv3Encoder.from_pretrained(model).freeze(), "tiny", False, SAT493M
    )
    options = explore.ExploreOptions(layer=layer, max_img_size=128)
    explore.explore([images / "b_wide.png"], loaded, tmp_path / "p.html", options)
    process = get_image_processor(128, pixel_shuffle_factor=1, allow_upscale=False,
                                  image_mean=SAT493M.mean, image_std=SAT493M.std)  # fmt: skip
    pixels, _ = process(images / "b_wide.png")
    with torch.no_grad():
        output = loaded.encoder([pixels], output_prefix_attentions=True)
        (expected,) = loaded.encoder.get_intermediate_layers([pixels], [layer - 1], reshape=True)
    torch.testing.assert_close(given[0].features, expected[0].permute(1, 2, 0))
    attention = output.attention_maps(layer - 1)[0][0].mean(0)
    torch.testing.assert_close(given[0].attention, attention)
    assert given[0].picture.size == (128, 64)


def test_what_explore_refuses(images, model, tmp_path):
    common = ("--model", model, "--max-img-size", 64)
    page = tmp_path / "page.html"
    one = images / "b_wide.png"
    assert "layer must be 1 to 3" in error_of(
        run("explore", one, "--out", page, "--layer", 4, *common)
    )
    assert "is a folder" in error_of(run("explore", one, "--out", tmp_path, *common))
    assert "is an input" in error_of(run("explore", one, "--out", one, *common))
    broken = tmp_path / "broken.png"
    broken.write_bytes(one.read_bytes()[:300])
    assert "broken.png" in error_of(run("explore", broken, one, "--out", page, *common))
    assert "no image could be read" in error_of(
        run("explore", broken, "--out", page, "--skip-bad", *common)
    )
    assert not page.exists()
    skipped = run("explore", broken, one, "--out", page, "--skip-bad", *common)
    assert skipped.exit_code == 0 and f"skipped {broken}" in skipped.stderr
