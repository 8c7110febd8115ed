"""Every form of input as packed patches: a batch, a list of images, or patches with their grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hrvlm_kernels import PackedGrids
from hrvlm_kernels.backends import makes_graph
from hrvlm_kernels.traced_grids import TracedGrids

from ..images.patches import pack_named, patchify

if TYPE_CHECKING:
    from .packed_encoder import PackedEncoder

Grids: TypeAlias = PackedGrids | Sequence[Sequence[int]] | Tensor


class PackedInputs(NamedTuple):
    """What an encoder runs on.

    Attributes:
        patches: ``[N, 3*p*p]``.
        packed: Their layout.
        batch: Images of a batch and tokens of each, axes that its output gets back; None if they
            came otherwise.
    """

    patches: Tensor
    packed: PackedGrids
    batch: tuple[int, int] | None


def pack_inputs(
    pixel_values: Tensor | Sequence[Tensor],
    grids: Grids | None,
    encoder: PackedEncoder,
    *,
    device: torch.device | None = None,
) -> PackedInputs:
    """Pack what :meth:`PackedEncoder.forward` takes.

    Args:
        pixel_values: A batch ``[B, 3, H, W]``, a list of ``[3, Hi, Wi]``, or packed patches.
        grids: Patch grids of packed patches; None for images.
        encoder: Whose patches and prefix tokens they become.
        device: Of the layout; default: where the patches are.

    Raises:
        TypeError: an image has integers: bytes that nobody has normalised.
        ValueError: an image's sides are not multiples of the patch size, or shapes do not fit.
    """
    check_pixels(pixel_values, encoder.config.num_channels)
    patch_size, num_channels = encoder.patch_size, encoder.config.num_channels
    batch: tuple[int, int] | None = None
    if isinstance(pixel_values, Tensor) and pixel_values.ndim == 2:
        if grids is None:
            raise ValueError("grids is needed with packed patches [N, 3*p*p]")
        patches = pixel_values
    elif grids is not None:
        got = getattr(pixel_values, "shape", type(pixel_values).__name__)
        raise ValueError(
            f"grids goes with packed patches [N, 3*p*p] only, got {got}; images have their own"
        )
    elif isinstance(pixel_values, Tensor):
        if pixel_values.ndim != 4:
            raise ValueError(
                "pixel_values must be [B, 3, H, W], a list of [3, H, W] or packed patches "
                f"[N, 3*p*p]; got {tuple(pixel_values.shape)}"
            )
        images, _, height, width = pixel_values.shape
        patches = patchify(pixel_values, patch_size).flatten(0, 1)
        prefix, hp, wp = encoder.num_prefix_tokens, height // patch_size, width // patch_size
        there = device or patches.device
        grids = batch_layout(images, (hp, wp), num_prefix_tokens=prefix, device=there)
        if isinstance(grids, TracedGrids):
            return PackedInputs(patches, grids, (images, grids.max_seqlen))
        batch = images, prefix + hp * wp
    else:
        patches, grids = pack_named("pixel_values", pixel_values, patch_size)
    if isinstance(grids, Tensor) and makes_graph():
        packed: PackedGrids = TracedGrids.from_tensor(
            grids, patches.shape[0], num_prefix_tokens=encoder.num_prefix_tokens
        )
        return PackedInputs(patches, packed, None)
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise ValueError(
            "torch.jit.trace: give the encoder a batch [B, 3, H, W], or packed patches with their "
            "grids as an int tensor; the layout of a list is made on the host, and not traced"
        )
    packed = _layout(grids, encoder.num_prefix_tokens, device or patches.device)
    expected = (
        packed.patch_rows().shape[0],  # not from lengths: a graph would hold for their number
        num_channels * patch_size * patch_size,
    )
    if tuple(patches.shape) != expected:
        raise ValueError(
            f"pixel_values: {tuple(patches.shape)} patches for grids that need {expected} "
            f"({len(packed)} images, {num_channels} channels, patch size {patch_size})"
        )
    return PackedInputs(patches, packed, batch)


def check_pixels(pixel_values: Tensor | Sequence[Tensor], num_channels: int) -> None:
    """Check the tensors that images are made of; which image of a list it is, is named.

    Raises:
        TypeError: they have integers: bytes that nobody has normalised.
        ValueError: the channels are not where they should be, or not as many.
    """
    single = isinstance(pixel_values, Tensor)
    if not single and not isinstance(pixel_values, list | tuple):
        return
    for i, image in enumerate([pixel_values] if single else pixel_values):
        if not isinstance(image, Tensor):
            continue
        name = "pixel_values" if single else f"image {i}"
        if image.layout != torch.strided:
            raise TypeError(f"{name}: a {image.layout} tensor, expected a dense one")
        if not image.is_floating_point():
            raise TypeError(
                f"{name}: {image.dtype}, expected normalised floating-point numbers; "
                "get_image_processor makes them of an image of any kind"
            )
        if image.ndim == (4 if single else 3) and image.shape[-3] != num_channels:
            expected = f"[{'B, ' if single else ''}{num_channels}, H, W]"
            raise ValueError(f"{name}: expected {expected}, got {tuple(image.shape)}")


def batch_layout(
    batch: int, grid: tuple[int, int], *, num_prefix_tokens: int, device: torch.device
) -> PackedGrids:
    """The layout of `batch` images of one patch grid; its numbers stay free in a graph."""
    if makes_graph():
        return TracedGrids.from_batch(
            batch, grid, num_prefix_tokens=num_prefix_tokens, device=device
        )
    return PackedGrids.from_grids(
        [grid] * batch, num_prefix_tokens=num_prefix_tokens, device=device
    )


def flat_mask(mask: Tensor | Sequence[Tensor] | None, patches: Tensor) -> Tensor | None:
    """A mask in any form that the encoder takes as ``[N]``, beside the patches ``[N, 3*p*p]``.

    Raises:
        TypeError: it is no tensor, nor a list of tensors.
        ValueError: it is not bool, or not one per patch.
    """
    if mask is None:
        return None
    parts = mask if isinstance(mask, list | tuple) else [mask]
    if not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(
            "bool_masked_pos: expected a tensor, or one for each image, got "
            f"{type(mask).__name__} of {type(next(iter(parts), None)).__name__}"
        )
    flat = mask.flatten() if isinstance(mask, Tensor) else torch.cat([m.flatten() for m in mask])
    if flat.dtype != torch.bool or flat.shape[0] != patches.shape[0]:
        raise ValueError(
            f"bool_masked_pos must be bool, one per patch ({patches.shape[0]}); "
            f"got {flat.dtype} and {flat.shape[0]}"
        )
    return flat.to(patches.device)


def _layout(grids: Grids, num_prefix_tokens: int, device: torch.device) -> PackedGrids:
    if isinstance(grids, PackedGrids):
        if grids.num_prefix_tokens != num_prefix_tokens:
            raise ValueError(
                f"grids: made for {grids.num_prefix_tokens} prefix tokens, "
                f"this model has {num_prefix_tokens}"
            )
        return grids if grids.device == device else grids.to(device)
    pairs = grids.tolist() if isinstance(grids, Tensor) else grids
    return PackedGrids.from_grids(pairs, num_prefix_tokens=num_prefix_tokens, device=device)
