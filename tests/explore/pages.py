"""Pages of made-up features for the tests."""

import torch
from PIL import Image

from hrvlm.explore.page import PageImage

# Names that are markup, entities, templates and no text at all.
NAMES = ("</script><script>alert(1)</script>.png", "a&amp;\"'<b>.png", "{{script}} \udcff.png")
GRIDS = ((6, 9), (12, 4), (7, 7))


def page_images(rng, grids=GRIDS, names=NAMES, width=96, attention=True):
    """Images whose features lie in 20 dimensions and whose pictures are plain."""
    basis = torch.randn(20, width, generator=rng)
    made = []
    for i, (name, (rows, columns)) in enumerate(zip(names, grids, strict=True)):
        features = torch.randn(rows, columns, 20, generator=rng) @ basis + basis[0]
        weights = torch.rand(rows, columns, generator=rng) / (rows * columns)
        picture = Image.new("RGB", (16 * columns, 16 * rows), (40 * i, 120, 200 - 40 * i))
        made.append(PageImage(name, picture, features, weights if attention else None, f"note {i}"))
    return made
