"""Packed patches through transformers' SigLIP, of one size, and SigLIP2, which pads and masks.

``hrvlm.accelerate(model)`` takes the padding of SigLIP2's encoder out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..encoder.inputs import check_pixels
from ..images.patches import unpatchify
from .image_embedding import check_attentions
from .placeholders import Grid


class Encoded(NamedTuple):
    """What an encoder gives, and its tokens without padding where it had any."""

    last_hidden_state: Tensor
    hidden_states: Any
    attentions: Any


def encode_squares(
    encoder: nn.Module, pixel_values: Tensor, grids: list[Grid], flags: dict[str, bool | None]
) -> Encoded:
    """Square images through SigLIP, whose positions are for one size: ``[B, n, C]``."""
    config: Any = encoder.config
    p, side = config.patch_size, config.image_size
    n = side // p
    for i, grid in enumerate(grids):
        if grid != (n, n):
            raise ValueError(
                f"image {i}: patch grid {grid[0]}x{grid[1]}, but siglip has positions for "
                f"{n}x{n} only: every image must be {side}x{side} pixels"
            )
    _check_patches(pixel_values, (len(grids) * n * n, 3 * p * p), f"{len(grids)} images of {n}x{n}")
    images = unpatchify(pixel_values.view(len(grids), n * n, 3 * p * p), (n, n), p)
    return _checked(encoder(images, **_given(flags)), config, flags)


def encode_padded(
    encoder: nn.Module, pixel_values: Tensor, grids: list[Grid], flags: dict[str, bool | None]
) -> Encoded:
    """Images of any sizes through SigLIP2: packed ``[N, C]``, the padding taken out again."""
    config: Any = encoder.config
    p, counts = config.patch_size, [hp * wp for hp, wp in grids]
    _check_patches(pixel_values, (sum(counts), 3 * p * p), f"{len(grids)} images")
    rows = pixel_values.unflatten(1, (3, p, p)).permute(0, 2, 3, 1).flatten(1)  # as its processor
    padded = nn.utils.rnn.pad_sequence(rows.split(counts), batch_first=True)  # [B, n, 3*p*p]
    n = padded.shape[1]
    kept = torch.cat([torch.arange(i * n, i * n + count) for i, count in enumerate(counts)])
    kept = kept.to(rows.device)
    mask = torch.zeros(len(grids) * n, dtype=torch.long, device=rows.device)
    output = encoder(
        pixel_values=padded,
        pixel_attention_mask=mask.index_fill(0, kept, 1).view(len(grids), n),
        spatial_shapes=torch.tensor(grids),  # on the host, where it is read
        **_given(flags),
    )
    encoded = _checked(output, config, flags)
    states = encoded.hidden_states
    return Encoded(
        encoded.last_hidden_state.flatten(0, 1)[kept],
        states and tuple(state.flatten(0, 1)[kept] for state in states),
        encoded.attentions,
    )


def _check_patches(pixel_values: Tensor, expected: tuple[int, int], what: str) -> None:
    check_pixels(pixel_values, 3)
    if tuple(pixel_values.shape) != expected:
        raise ValueError(
            f"pixel_values: {tuple(pixel_values.shape)}, expected {expected} for {what} patches"
        )


def _given(flags: dict[str, bool | None]) -> dict[str, bool]:
    """A flag of None would stand in the way of the config's."""
    return {name: flag for name, flag in flags.items() if flag is not None}


def _checked(output: Any, config: Any, flags: dict[str, bool | None]) -> Encoded:
    asked = flags["output_attentions"]
    asked = config.output_attentions if asked is None else asked
    check_attentions(bool(asked), output.attentions, "vision_config")
    return Encoded(output.last_hidden_state, output.hidden_states, output.attentions)
