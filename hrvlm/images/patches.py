"""Images to rows of pixels and back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .geometry import positive_int, positive_pair


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError, naming the argument, unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a tensor, got {type(value).__name__}; get_image_processor and "
            "VLMImageProcessor make one of an image of any kind"
        )


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches, one row of pixels each.

    Args:
        image: ``[..., 3, H, W]``.
        patch_size: Side p of a patch in pixels; divides H and W.

    Returns:
        ``[..., hp*wp, 3*p*p]``: patches row by row over the grid, each in the order (channel, dy,
        dx), the order of a convolution's ``weight.flatten(1)``.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has fewer than three axes, or H or W is not a positive multiple of
            `patch_size`.
    """
    check_tensor("image", image)
    positive_int("patch_size", patch_size)
    if image.ndim < 3:
        raise ValueError(f"image: expected [..., 3, H, W], got {tuple(image.shape)}")
    *lead, channels, height, width = image.shape
    p = patch_size
    if not height or not width or height % p or width % p:
        raise ValueError(
            f"image: {height}x{width} pixels is not a positive multiple of the patch size {p}"
        )
    grid = image.reshape(*lead, channels, height // p, p, width // p, p)
    n = len(lead)
    order = [*range(n), n + 1, n + 3, n, n + 2, n + 4]
    return grid.permute(order).reshape(*lead, (height // p) * (width // p), channels * p * p)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Inverse of :func:`patchify`: ``[..., hp*wp, 3*p*p]`` to ``[..., 3, hp*p, wp*p]``.

    Raises:
        TypeError: `patches` is no tensor.
        ValueError: the rows do not fill the `grid` (hp, wp), or this is not two positive ints.
    """
    check_tensor("patches", patches)
    if patches.ndim < 2:
        raise ValueError(f"patches: expected [..., hp*wp, 3*p*p], got {tuple(patches.shape)}")
    if (pair := positive_pair(grid)) is None:
        raise ValueError(f"grid {grid!r:.60}: expected two positive ints (hp, wp)")
    (hp, wp), p = pair, positive_int("patch_size", patch_size)
    *lead, rows, size = patches.shape
    if rows != hp * wp or size % (p * p):
        raise ValueError(
            f"patches: {rows} rows of {size} do not make a {hp}x{wp} grid of {p}x{p} patches"
        )
    n = len(lead)
    x = patches.reshape(*lead, hp, wp, size // (p * p), p, p)
    return x.permute([*range(n), n + 2, n, n + 3, n + 1, n + 4]).reshape(
        *lead, size // (p * p), hp * p, wp * p
    )


def pack_images(images: Iterable[Tensor], patch_size: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Patches of images of different shapes, one image after the other.

    Args:
        images: ``[3, Hi, Wi]`` each.
        patch_size: Side of a patch in pixels.

    Returns:
        ``[N, 3*p*p]`` and the patch grid of each image.

    Raises:
        TypeError: `images` is no list, or an image (named by its index) no tensor.
        ValueError: an image (named by its index) is not ``[3, H, W]``, or its sides are no
            multiples of `patch_size`.
    """
    return pack_named("images", images, patch_size)


def pack_named(
    name: str, images: Iterable[Tensor], patch_size: int
) -> tuple[Tensor, list[tuple[int, int]]]:
    """:func:`pack_images` of an argument that is called `name`."""
    if not isinstance(images, Iterable) or isinstance(images, str | bytes):
        raise TypeError(
            f"{name}: expected a list of tensors [3, H, W], got {type(images).__name__}; "
            "get_image_processor makes one of an image of any kind"
        )
    rows, grids = [], []
    for i, image in enumerate(images):
        check_tensor(f"image {i}", image)
        if image.ndim != 3:
            raise ValueError(f"image {i}: expected [3, H, W], got {tuple(image.shape)}")
        try:
            rows.append(patchify(image, patch_size))
        except ValueError as error:
            raise ValueError(str(error).replace("image:", f"image {i}:", 1)) from None
        grids.append((image.shape[1] // patch_size, image.shape[2] // patch_size))
    if not rows:
        raise ValueError(f"{name}: the list is empty")
    return torch.cat(rows), grids
