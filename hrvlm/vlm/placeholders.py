"""Whether the placeholders in a text fit the images of the batch: host integers only.

A batch has its images in one packed row, without a list of which sample they belong to. The samples
take them in order: each takes whole images until their tokens are as many as its placeholders.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..images.geometry import image_token_count, positive_pair

Grid = tuple[int, int]

IGNORE_INDEX = -100  # a label without a loss


class BatchCounts(NamedTuple):
    """What the checks read from a batch, in one copy from the device.

    Attributes:
        placeholders: Of each sample.
        lengths: Tokens of each sample, padding left out.
        smallest: Token id of each sample.
        largest: Token id of each sample.
        smallest_label: Of each sample, of those that count; 0 without labels.
        largest_label: Likewise.
    """

    placeholders: list[int]
    lengths: list[int]
    smallest: list[int]
    largest: list[int]
    smallest_label: list[int]
    largest_label: list[int]


def count_batch(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_token_id: int | None,
    labels: Tensor | None = None,
) -> BatchCounts:
    """Read from ``input_ids [B, L]`` (L > 0) what the checks need; waits for the device once."""
    is_image = input_ids == (-1 if image_token_id is None else image_token_id)
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        lengths = attention_mask.sum(1)
    else:
        lengths = torch.full_like(input_ids[:, 0], input_ids.shape[1])
    said = torch.zeros_like(input_ids) if labels is None else labels.to(input_ids.device)
    said = said.masked_fill(said == IGNORE_INDEX, 0)
    rows = [is_image.sum(1), lengths, *(f(1) for x in (input_ids, said) for f in (x.amin, x.amax))]
    return BatchCounts(*torch.stack([row.long() for row in rows]).tolist())


def as_grids(image_grid_hw: Tensor | Sequence[Sequence[int]]) -> list[Grid]:
    """Patch grids as pairs of ints, from pairs or an int tensor ``[B, 2]``.

    Raises:
        ValueError: a grid (named by its image) is not two positive ints.
    """
    rows: Any = image_grid_hw
    if hasattr(rows, "tolist"):
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
            raise ValueError(
                "image_grid_hw: a tensor, whose numbers torch.export does not know: give a list of "
                "pairs of ints, for which the program then holds"
            )
        rows = rows.tolist()
    if not isinstance(rows, Iterable):
        raise ValueError(f"image_grid_hw: expected a pair of ints for each image, got {rows!r:.60}")
    grids = []
    for i, row in enumerate(rows):
        if (pair := positive_pair(row)) is None:
            raise ValueError(
                f"image_grid_hw: image {i}: expected two positive ints (hp, wp), got {row}"
            )
        grids.append(pair)
    return grids


def count_tokens(grids: Sequence[Grid], factor: int, append_cls: bool = False) -> list[int]:
    """Tokens of each image.

    Raises:
        ValueError: the factor does not divide a grid; the image is named.
    """
    counts = []
    for i, grid in enumerate(grids):
        try:
            counts.append(image_token_count(grid, factor, append_cls))
        except ValueError as error:
            raise ValueError(f"image {i}: {error}") from None
    return counts


def images_per_sample(
    placeholders: Sequence[int], grids: Sequence[Grid], tokens: Sequence[int]
) -> list[int]:
    """How many images each sample has.

    Args:
        placeholders: Image placeholders of each sample.
        grids: Patch grid of each image, for the messages.
        tokens: Tokens of each image.

    Raises:
        ValueError: a sample's placeholders are not those of whole images, or images are left over.
    """
    numbers, image = [], 0
    for sample, count in enumerate(placeholders):
        first, total, before = image, 0, 0
        while total < count and image < len(tokens):
            before, total = total, total + tokens[image]
            image += 1
        if total != count:
            options = f"{before} or {total}" if before and total > count else f"{total}"
            blame = _named(image - 1, grids, tokens) if image > first else "no image is left"
            raise ValueError(
                f"sample {sample}: got {count} image placeholders, expected {options} "
                f"({image - first} images from image {first} on; {blame})"
            )
        numbers.append(image - first)
    if image < len(tokens):
        raise ValueError(
            f"sample {len(placeholders) - 1}: the placeholders end before the images do: "
            f"expected {tokens[image]} more, got 0, for {_named(image, grids, tokens)}"
        )
    return numbers


def check_context(
    counts: BatchCounts, numbers: Sequence[int], grids: Sequence[Grid], context: int | None
) -> None:
    """Raise ValueError where a sample with images is longer than the language model's context."""
    first = 0
    for sample, (length, number) in enumerate(zip(counts.lengths, numbers, strict=True)):
        if context is not None and number and length > context:
            shapes = ", ".join(f"{hp}x{wp}" for hp, wp in grids[first : first + number])
            raise ValueError(
                f"sample {sample}: {length} tokens, {counts.placeholders[sample]} of them from "
                f"images {first} to {first + number - 1} (patch grids {shapes}), but the language "
                f"model's context holds {context}: use smaller images (max_img_size) or fewer"
            )
        first += number


def check_vocabulary(
    counts: BatchCounts, input_ids: Tensor, vocab_size: int, labels: Tensor | None = None
) -> None:
    """Raise ValueError where a token id, or a label, is not in the language model's vocabulary."""
    ranges = (
        ("input_ids", input_ids, counts.smallest, counts.largest),
        ("labels", labels, counts.smallest_label, counts.largest_label),
    )
    for name, ids, smallest, largest in ranges:
        for sample, (low, high) in enumerate(zip(smallest, largest, strict=True)):
            if ids is None or (low >= 0 and high < vocab_size):
                continue
            bad = low if low < 0 else high
            position = (ids[sample] == bad).nonzero()[0].item()
            raise ValueError(
                f"{name}: sample {sample}, position {position}: token id {bad} is outside the "
                f"vocabulary of {vocab_size} (was the model resized for the tokenizer's added "
                "tokens?)"
            )


def _named(image: int, grids: Sequence[Grid], tokens: Sequence[int]) -> str:
    hp, wp = grids[image]
    return f"image {image} with patch grid {hp}x{wp} has {tokens[image]}"
