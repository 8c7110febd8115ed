"""normalize_patchify: the bytes of images to the normalised rows that a patch embedding takes.

    out[n, c*p*p + dy*p + dx] = (pixel[c, y*p + dy, x*p + dx] / 255 - mean[c]) / std[c]

where patch n is the one at (y, x) of its image, counted row by row, image after image. For images
that are on a GPU as bytes, decoded there or copied at a quarter of the size of float32: each pixel
is read once and its number written once, in the dtype of the encoder, in its place in the pack.
There is no gradient: bytes have none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import check_result_dtype, choose_backend
from ..packed_tables import check_int
from .torch_op import add_op_namespace_prefix, ops

CHANNELS = 3


@torch.library.custom_op(add_op_namespace_prefix("normalize_patchify"), mutates_args=())
def _normalize_patchify(
    images: Sequence[Tensor],
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    from ..triton_kernels.normalize_patchify import forward

    out = _empty_rows(images, patch_size, mean, std, dtype)
    start = 0
    for image in images:
        rows = image.shape[0] * image.shape[2] * image.shape[3] // patch_size**2
        forward(image, patch_size, mean, std, out[start : start + rows])
        start += rows
    return out


@_normalize_patchify.register_fake
def _empty_rows(
    images: Sequence[Tensor],
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    rows = sum(a.shape[0] * (a.shape[2] // patch_size) * (a.shape[3] // patch_size) for a in images)
    return torch.empty(rows, CHANNELS * patch_size**2, dtype=dtype, device=images[0].device)


def normalize_patchify(
    images: Tensor | Sequence[Tensor],
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Normalise the bytes of images and cut them into patches, one row of pixels each.

    The rows are those of hrvlm's image processors and of ``hrvlm.pack_images``, computed in float32
    and rounded once, to `dtype`.

    Args:
        images: A batch ``[B, 3, H, W]`` or a list of ``[3, Hi, Wi]``, uint8; any strides. A batch
            is one launch, a list one for each image.
        patch_size: Side p of a patch in pixels; divides every side of every image.
        mean: Of red, green and blue, on the scale of [0, 1].
        std: Likewise.
        dtype: Of the result.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`.

    Returns:
        ``[N, 3*p*p]``, each row in the order (channel, dy, dx), one image after the other; and the
        patch grid (hp, wp) of each image.

    Raises:
        ValueError: there is no image, one (named by its index) is not uint8 ``[3, H, W]``, has
            sides that are no positive multiples of `patch_size` or is on another device; a number
            is out of range; or `dtype` is none of floating-point numbers.
        RuntimeError: the backend asked for can't run here.
    """
    _check_numbers(patch_size, mean, std)
    check_result_dtype(dtype)
    batches, grids = _batches(images, patch_size)
    like = torch.empty(0, dtype=dtype, device=batches[0].device)
    if choose_backend("normalize_patchify", backend, like) == "triton":
        return ops.normalize_patchify(batches, patch_size, list(mean), list(std), dtype), grids
    from .. import reference

    upcast = torch.float64 if dtype == torch.float64 else torch.float32
    rows = reference.normalize_patchify(batches, patch_size, mean, std, upcast=upcast)
    return rows.to(dtype), grids


def _check_numbers(patch_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
    check_int("patch_size", patch_size, 1)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != CHANNELS:
            raise ValueError(f"{name} must be {CHANNELS} numbers, got {values!r}")
    if not min(std) > 0:
        raise ValueError(f"std must be above 0, got {std!r}")


def _batches(
    images: Tensor | Sequence[Tensor], patch_size: int
) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """The images as ``[B, 3, H, W]`` each, and the grid of each image."""
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise ValueError(
                f"images must be [B, 3, H, W] or a list of [3, H, W], got {tuple(images.shape)}"
            )
        batches = [images]
    else:
        batches = [image[None] for image in images]
    if not batches or not batches[0].shape[0]:
        raise ValueError("images: expected at least one image, got none")
    grids = []
    for i, batch in enumerate(batches):
        shape = tuple(batch.shape[1:])
        if batch.dtype != torch.uint8 or batch.ndim != 4 or shape[0] != CHANNELS:
            raise ValueError(f"image {i}: expected uint8 [3, H, W], got {batch.dtype} {shape}")
        if not min(shape) or shape[1] % patch_size or shape[2] % patch_size:
            raise ValueError(
                f"image {i}: {shape[1]}x{shape[2]} pixels is not a positive multiple of the patch "
                f"size {patch_size}"
            )
        if batch.device != batches[0].device:
            raise ValueError(f"image {i} is on {batch.device}, image 0 on {batches[0].device}")
        grids += [(shape[1] // patch_size, shape[2] // patch_size)] * batch.shape[0]
    return batches, grids
