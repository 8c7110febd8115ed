"""Image files in packed passes through an encoder.

There is no projector, so an image's sides become multiples of the patch size and of no more, unless
the encoder is the tower of another model, which takes whole blocks of patches that it merges.
Images are read in order and packed until a pass is full, so that memory does not grow with their
number. Nothing is padded or reshaped to a common size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from PIL import Image
from torch import Tensor

from ..images.geometry import Geometry, positive_int
from ..images.intake import load_image
from ..images.processor import get_image_processor
from ..machine import synchronize
from .loading import LoadedEncoder

if TYPE_CHECKING:
    from ..encoder.layers import EncoderLayer
    from ..encoder.output import PackedEncoderOutput
    from .towers import LoadedTower

DEFAULT_MAX_TOKENS = 32768  # patches and prefix tokens


@dataclass
class LoadedImage:
    """An image that waits for its pass.

    Attributes:
        path: Its file.
        size: (height, width), upright.
        geometry: The size it is encoded at.
        pixels: ``[3, H, W]``, normalised.
        shown: What it looks like, already small: originals may be huge.
    """

    path: Path
    size: tuple[int, int]
    geometry: Geometry
    pixels: Tensor
    shown: Image.Image | None


def passes(
    paths: Sequence[Path],
    loaded: LoadedEncoder | LoadedTower,
    *,
    max_img_size: int = 1024,
    allow_upscale: bool = False,
    max_tokens_per_pass: int = DEFAULT_MAX_TOKENS,
    shown_side: int | None = None,
    bad: list[tuple[Path, str]] | None = None,
    on_bad: Callable[[int], None] | None = None,
) -> Iterator[list[LoadedImage]]:
    """Lists of images whose tokens fill a pass; one image always fits.

    Args:
        paths: Image files.
        loaded: The model they are for.
        max_img_size: Limit of the longer side.
        allow_upscale: Enlarge smaller images to it.
        max_tokens_per_pass: Patches and prefix tokens of a pass.
        shown_side: Keep a picture of each image, as it is encoded, its longer side at most this.
        bad: Takes unreadable images and why they are; without it they raise.
        on_bad: Told of each one (1).

    Raises:
        ValueError: an image can't be read (its file is named), or an option is out of range.
        OSError: a file can't be opened.
    """
    positive_int("max_tokens_per_pass", max_tokens_per_pass)
    processor = get_image_processor(
        max_img_size,
        vit_patch_size=loaded.encoder.patch_size,
        pixel_shuffle_factor=loaded.factor,
        allow_upscale=allow_upscale,
        image_mean=loaded.normalization.mean,
        image_std=loaded.normalization.std,
    )
    batch: list[LoadedImage] = []
    total = 0
    for path in paths:
        try:
            image = load_image(path)
        except (ValueError, OSError) as error:
            if bad is None:
                raise
            bad.append((path, str(error)))
            if on_bad:
                on_bad(1)
            continue
        geometry = processor.geometry(image.height, image.width)
        tokens = geometry.num_patches + loaded.encoder.num_prefix_tokens
        if batch and total + tokens > max_tokens_per_pass:
            yield batch
            batch, total = [], 0
        shown = None if shown_side is None else _resized(image, geometry, shown_side)
        size = image.height, image.width
        batch.append(LoadedImage(path, size, geometry, processor(image)[0], shown))
        total += tokens
    if batch:
        yield batch


def _resized(image: Image.Image, geometry: Geometry, side: int) -> Image.Image:
    scale = min(1, side / max(geometry.height, geometry.width))
    size = max(1, round(geometry.width * scale)), max(1, round(geometry.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def forward(
    loaded: LoadedEncoder | LoadedTower, pixels: Sequence[Tensor], *, layers: Sequence[int] = ()
) -> tuple[PackedEncoderOutput, float]:
    """One packed pass, and its time without the copy to the device.

    Args:
        loaded: The model.
        pixels: ``[3, H, W]`` for each image.
        layers: ``out_indices`` of the encoder, before the final norm.

    Raises:
        MemoryError: it does not fit on the device.
    """
    encoder = loaded.encoder
    on_device = [p.to(encoder.device) for p in pixels]
    try:
        with torch.inference_mode():
            synchronize(encoder.device)
            start = time.perf_counter()
            output = encoder(on_device, out_indices=layers, apply_layernorm=False)
            synchronize(encoder.device)
            return output, time.perf_counter() - start
    except torch.OutOfMemoryError as error:
        area = sum(p.shape[1] * p.shape[2] for p in pixels) // encoder.patch_size**2
        raise MemoryError(
            f"a pass of {len(pixels)} images with {area} patches does not fit on "
            f"{encoder.device}: lower --max-tokens-per-pass or --max-img-size"
        ) from error


def cls_attention(
    loaded: LoadedEncoder | LoadedTower, output: PackedEncoderOutput, state: Tensor, block: int = -1
) -> list[Tensor]:
    """Where the CLS token of each image looks, as weights ``[hp, wp]``, float32 on the CPU.

    The mean over the heads of a block; what other prefix tokens take is missing from the sum. Empty
    where the encoder has no CLS token.

    Args:
        loaded: The model.
        output: A pass.
        state: What goes into the block: ``[T, C]``, the layer before it in `output`.
        block: Its index.
    """
    if not isinstance(loaded, LoadedEncoder):
        return []
    layer = cast("EncoderLayer", loaded.encoder.layer[block])
    with torch.inference_mode():
        _, weights = layer.attention(
            layer.norm1(state), output.packed, loaded.encoder.backend, True
        )
    output.packed_prefix_attentions = (weights,)
    return [maps[0].float().mean(0).cpu() for maps in output.attention_maps()]
