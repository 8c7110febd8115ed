"""The forms in which towers take images: what they are given for images of these grids.

A grid is (frames, patches down, patches across).
"""

import inspect
from functools import partial

import torch

# How many patches each image has, under all names that towers have for it.
SIZES = ("grid_thw", "image_grid_thw", "target_sizes", "image_grid_hw")


def _packed(shape, cls, grids, patch, seed):
    """Patches of all images, one after the other, and their sizes."""
    names = inspect.signature(cls.forward).parameters
    grids = torch.tensor(grids)
    sizes = next(name for name in SIZES if name in names)
    given = grids if sizes.endswith("thw") else grids[:, 1:]
    if shape is _merged and sizes.endswith("thw"):
        given = given // torch.tensor([1, 2, 2])
    rest = {sizes: given}
    if "merge_sizes" in names:
        rest["merge_sizes"] = torch.full((len(grids),), 2)
    name = "hidden_states" if "hidden_states" in names else "pixel_values"
    rng = torch.Generator().manual_seed(seed)
    return {name: shape(int(grids.prod(1).sum()), patch, rng), **rest}


def _rows(count, patch, rng, frames=1):
    return torch.randn(count, frames * 3 * patch**2, generator=rng)


def _squares(count, patch, rng):
    return torch.randn(count, 3, patch, patch, generator=rng)


def _batch(count, patch, rng):
    return _squares(count, patch, rng)[None]


def _strip(count, patch, rng):
    return torch.randn(1, 3, patch, patch * count, generator=rng)


def _merged(count, patch, rng):
    return torch.randn(count // 4, 2 * patch, 2 * patch, 3, generator=rng)


def _canvas(cls, grids, patch, seed, masked=False):
    """Images on a canvas as large as the largest sides; their sizes, or a mask of patches."""
    sides = torch.tensor(grids)[:, 1:]
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randn(len(sides), 3, *(patch * sides.amax(0)).tolist(), generator=rng)
    if not masked:
        return {"pixel_values": pixels, "image_sizes": patch * sides}
    mask = torch.zeros(len(sides), *sides.amax(0).tolist(), dtype=torch.bool)
    for image, (height, width) in enumerate(sides.tolist()):
        mask[image, :height, :width] = True
    return {"pixel_values": pixels, "patch_attention_mask": mask}


def _padded(cls, grids, patch, seed):
    """Rows of patches, padded to the longest image's."""
    sides = torch.tensor(grids)[:, 1:]
    counts = sides.prod(1).tolist()
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randn(len(sides), max(counts), 3 * patch**2, generator=rng)
    mask = (torch.arange(max(counts)) < sides.prod(1, keepdim=True)).long()
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": sides}


# Each makes the keyword arguments of (class of the tower, grids, side of a patch, seed).
FORMS = {
    "rows": partial(_packed, _rows),
    "squares": partial(_packed, _squares),
    "batch of squares": partial(_packed, _batch),
    "pairs of frames": partial(_packed, partial(_rows, frames=2)),
    "strip": partial(_packed, _strip),
    "merged squares": partial(_packed, _merged),
    "canvas": _canvas,
    "padded canvas": partial(_canvas, masked=True),
    "padded rows": _padded,
}
# Those of towers that are given sizes beside patches.
PACKED = tuple(FORMS)[:6]
