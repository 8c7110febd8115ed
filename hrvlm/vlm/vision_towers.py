"""Packed patches through a vision tower of transformers, in the form that it takes.

``hrvlm.accelerate(model)`` takes padding and dense masks out of these towers again, and the loop
over images out of their attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..encoder.inputs import check_pixels
from ..encoder.plain_modules import is_float
from ..images.patches import unpatchify
from ..towers.swapping import stock_class
from .image_embedding import check_attentions
from .placeholders import Grid
from .tower_classes import Form, merged_patches, tower_form

Flags = dict[str, bool | None]


class Encoded(NamedTuple):
    """What a tower gives, packed ``[N, C]``; hidden states as its own layers have them, unpadded.

    SigLIP gives ``[B, n, C]``.
    """

    last_hidden_state: Tensor
    hidden_states: Any
    attentions: Any


def encode(
    encoder: nn.Module, pixel_values: Tensor, grids: list[Grid], patch_size: int, flags: Flags
) -> Encoded:
    """Images through a tower of transformers.

    Args:
        encoder: The tower.
        pixel_values: Packed patches ``[N, 3*p*p]``.
        grids: Patch grid of each image.
        patch_size: p; of a tower that merges, the side of a merged block.
        flags: ``output_attentions``, ``output_hidden_states`` and ``return_dict``; None is for what
            the tower's config says.

    Raises:
        ValueError: the patches do not fit the grids, or the tower (SigLIP) its one size.
    """
    check_pixels(pixel_values, 3)
    config: Any = encoder.config
    form = tower_form(config)
    counts = [hp * wp for hp, wp in grids]
    what = f"{len(grids)} images"
    if form is Form.SQUARES:
        n = _check_squares(grids, config.image_size, config.patch_size)
        what += f" of {n}x{n}"
    expected = sum(counts), 3 * patch_size**2
    if tuple(pixel_values.shape) != expected:
        raise ValueError(
            f"pixel_values: {tuple(pixel_values.shape)}, expected {expected} for {what} patches"
        )
    first = next(encoder.parameters())
    if is_float(first):  # some towers leave that to the model around them
        pixel_values = pixel_values.to(first.dtype)
    kept = None
    if form is Form.MERGED:
        given = _in_blocks(encoder, pixel_values, grids, patch_size)
    elif form is Form.PADDED:
        given, kept = _padded(pixel_values, grids, counts, patch_size)
    else:
        images = _on_canvas(pixel_values, grids, counts, patch_size)
        given = {"pixel_values": images}
        if form is Form.MASKED:
            mask = _mask(grids)
            given["patch_attention_mask"] = mask.to(images.device)
            kept = mask.flatten().nonzero()[:, 0].to(images.device)
        elif form is Form.SIZED:
            given["image_sizes"] = [(hp * patch_size, wp * patch_size) for hp, wp in grids]
    given |= {name: flag for name, flag in flags.items() if flag is not None}
    output = encoder(**given)
    asked = flags["output_attentions"]
    asked = config.output_attentions if asked is None else asked
    check_attentions(bool(asked), output.attentions, "vision_config")
    hidden = output.pooler_output if form is Form.MERGED else output.last_hidden_state
    states = output.hidden_states
    if kept is not None:
        hidden = hidden.flatten(0, 1)[kept]
        states = states and tuple(_rows(state, kept) for state in states)
    elif form is Form.SIZED:
        hidden, states = hidden[0], states and tuple(state[0] for state in states)
    return Encoded(hidden, states, output.attentions)


def _rows(state: Tensor, kept: Tensor) -> Tensor:
    """The rows of a padded hidden state that are no padding; an accelerated tower may have none."""
    rows = state.flatten(0, 1)
    return rows if len(rows) == len(kept) else rows[kept]


def _check_squares(grids: list[Grid], side: int, patch_size: int) -> int:
    n = side // patch_size
    for i, grid in enumerate(grids):
        if grid != (n, n):
            raise ValueError(
                f"image {i}: patch grid {grid[0]}x{grid[1]}, but siglip has positions for "
                f"{n}x{n} only: every image must be {side}x{side} pixels"
            )
    return n


def _on_canvas(rows: Tensor, grids: list[Grid], counts: list[int], patch_size: int) -> Tensor:
    """``[B, 3, H, W]``: each image in the upper left corner of zeros."""
    height, width = (patch_size * max(sizes, default=0) for sizes in zip(*grids, strict=True))
    canvas = rows.new_zeros(len(grids), 3, height, width)
    for image, part, grid in zip(canvas, rows.split(counts), grids, strict=True):
        image[:, : grid[0] * patch_size, : grid[1] * patch_size] = unpatchify(
            part, grid, patch_size
        )
    return canvas


def _mask(grids: list[Grid]) -> Tensor:
    """``[B, hp, wp]``: which patches of the canvas are an image's, on the host."""
    mask = torch.zeros(len(grids), *(max(sizes) for sizes in zip(*grids, strict=True)))
    for image, (hp, wp) in zip(mask, grids, strict=True):
        image[:hp, :wp] = 1
    return mask.bool()


def _padded(
    rows: Tensor, grids: list[Grid], counts: list[int], patch_size: int
) -> tuple[dict[str, Any], Tensor]:
    """What SigLIP2 takes, and which of the padded rows are an image's."""
    rows = rows.unflatten(1, (3, patch_size, patch_size)).permute(0, 2, 3, 1).flatten(1)
    padded = nn.utils.rnn.pad_sequence(rows.split(counts), batch_first=True)  # [B, n, 3*p*p]
    n = padded.shape[1]
    kept = torch.cat([torch.arange(i * n, i * n + count) for i, count in enumerate(counts)])
    kept = kept.to(rows.device)
    mask = torch.zeros(len(grids) * n, dtype=torch.long, device=rows.device)
    given = {
        "pixel_values": padded,
        "pixel_attention_mask": mask.index_fill(0, kept, 1).view(len(grids), n),
        "spatial_shapes": torch.tensor(grids),  # on the host, where it is read
    }
    return given, kept


def _in_blocks(
    encoder: nn.Module, rows: Tensor, grids: list[Grid], patch_size: int
) -> dict[str, Any]:
    """What Qwen's tower takes: each row of pixels is a block of m x m patches, and they follow it.

    An image is a clip of one moment, repeated where a patch of the tower has several.
    """
    config: Any = encoder.config
    m, p = merged_patches(config), patch_size // merged_patches(config)
    moments = getattr(config, "temporal_patch_size", 1)
    blocks = rows.unflatten(1, (3, m, p, m, p)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    clips = blocks[:, :, None].expand(-1, -1, moments, -1, -1)  # [N*m*m, 3, moments, p, p]
    sizes = torch.tensor([(1, hp * m, wp * m) for hp, wp in grids])
    # An accelerated tower reads them on the host; the stock one makes tables where they are.
    accelerated = stock_class(encoder) is not None
    return {
        "hidden_states": clips.flatten(1),
        "grid_thw": sizes if accelerated else sizes.to(rows.device),
    }
