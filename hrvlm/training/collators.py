"""Samples to a batch: text padded, images packed.

A sample is a mapping with

    input_ids      [L] ints, the placeholders of its images among them
    attention_mask [L], optional (ones)
    labels         [L] aligned with input_ids (the model shifts them), -100 where there is no loss
    pixel_values   [N, 3*p*p] and image_grid_hw [images, 2]: packed patches; or
    images         a list of [3, H, W] or [K, 3, S, S] tensors, or of (tensor, grid) as
                   get_image_processor gives them, which are packed here

where a leading axis of 1, as processors give it, is dropped. `None` instead of a sample is skipped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..images.geometry import positive_int
from ..images.patches import check_tensor, pack_images
from ..vlm.placeholders import IGNORE_INDEX

logger = logging.getLogger(__name__)


class BaseCollator:
    """Pads the texts and packs the images of a batch.

    The batch is a dictionary, with `input_ids` first (Trainer takes its length for the batch size):
    ``input_ids``, ``attention_mask`` and, if the samples have them, ``labels``, all
    ``[B, L]``; ``pixel_values`` ``[N, 3*p*p]`` and ``image_grid_hw`` ``[images, 2]``, which have
    zero rows in a batch without images. Labels are -100 at padding and at image tokens.

    Samples longer than `max_length` are dropped: cut, they would lose placeholders. A batch that
    loses all of them (or has none) has ``input_ids`` ``[0, 0]`` and so on; the model takes it and
    returns a loss of 0.

    Args:
        tokenizer: A tokenizer, or a processor that has one.
        max_length: Longest sample, in tokens; None for any.
        patch_size: Side of a patch in pixels, to pack `images`; a processor knows it.
        pad_to_multiple_of: Pad the length of the batch up to a multiple of this.

    Attributes:
        num_dropped: Over-long samples dropped so far, by this copy (each worker of a DataLoader has
            its own).
    """

    needs_labels = False

    def __init__(
        self,
        tokenizer: Any,
        max_length: int | None = None,
        *,
        patch_size: int | None = None,
        pad_to_multiple_of: int | None = None,
    ):
        image_processor = getattr(tokenizer, "image_processor", None)
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if getattr(self.tokenizer, "pad_token_id", None) is None:
            raise ValueError("tokenizer: it has no pad_token; make it with hrvlm.get_tokenizer")
        given = {
            "max_length": max_length,
            "patch_size": patch_size,
            "pad_to_multiple_of": pad_to_multiple_of,
        }
        for name, value in given.items():
            if value is not None:
                positive_int(name, value)
        self.max_length = max_length
        self.patch_size = patch_size or getattr(image_processor, "patch_size", None)
        self.pad_to_multiple_of = pad_to_multiple_of
        self.image_token_id = getattr(self.tokenizer, "image_token_id", None)
        self.num_dropped = 0

    def __call__(self, samples: Sequence[Mapping[str, Any] | None]) -> dict[str, Tensor]:
        """Collate samples; the top of this file says what a sample is.

        Raises:
            TypeError: these are no samples, or the images of one no tensors.
            ValueError: a sample (named by its index) lacks `input_ids` or `labels`, its parts have
                different lengths or are no numbers, it has pixels without grids, or patches of
                another size than those before it.
        """
        if not isinstance(samples, Iterable):
            raise TypeError(f"samples: expected a list of mappings, got {type(samples).__name__}")
        numbered = {
            i: self._row(i, sample) for i, sample in enumerate(samples) if sample is not None
        }
        _check_widths(numbered, self.patch_size)
        rows = list(numbered.values())
        kept = [
            r for r in rows if self.max_length is None or len(r["input_ids"]) <= self.max_length
        ]
        if dropped := len(rows) - len(kept):
            self.num_dropped += dropped
            logger.warning(
                "dropped %d of %d samples longer than %s tokens (%d so far)",
                dropped,
                len(rows),
                self.max_length,
                self.num_dropped,
            )
        return self._batch(kept, with_labels=self.needs_labels or any("labels" in r for r in rows))

    def _row(self, index: int, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        """One sample with tensors only."""
        if not isinstance(sample, Mapping):
            raise TypeError(
                f"sample {index}: expected a mapping with input_ids, got {type(sample).__name__}"
            )
        if "input_ids" not in sample:
            raise ValueError(f"sample {index}: it has no input_ids, only {sorted(sample)}")
        row = {"input_ids": _vector(index, "input_ids", sample["input_ids"])}
        mask = sample.get("attention_mask")
        row["attention_mask"] = torch.ones_like(row["input_ids"])
        if mask is not None:
            mask = row["attention_mask"] = _vector(index, "attention_mask", mask)
            if not ((mask == 0) | (mask == 1)).all():
                raise ValueError(f"sample {index}: attention_mask: expected zeros and ones")
        if sample.get("labels") is not None:
            labels = _vector(index, "labels", sample["labels"])
            is_image = row["input_ids"] == (
                -1 if self.image_token_id is None else self.image_token_id
            )
            if labels.shape == is_image.shape:
                labels = labels.masked_fill(is_image, IGNORE_INDEX)
            row["labels"] = labels
        elif self.needs_labels:
            raise ValueError(f"sample {index}: it has no labels")
        for name, value in row.items():
            if len(value) != len(row["input_ids"]):
                raise ValueError(
                    f"sample {index}: {name} has {len(value)} entries, "
                    f"expected {len(row['input_ids'])} as input_ids"
                )
        return row | self._pixels(index, sample)

    def _pixels(self, index: int, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        pixels, grids = sample.get("pixel_values"), sample.get("image_grid_hw")
        images = sample.get("images")
        if not isinstance(images, list | tuple | None):
            raise TypeError(
                f"sample {index}: images: expected a list of tensors, got {type(images).__name__}"
            )
        if images:
            if self.patch_size is None:
                raise ValueError("patch_size: needed to pack images; pass it, or a processor")
            tensors = [i[0] if isinstance(i, tuple) and i else i for i in images]
            for i, tensor in enumerate(tensors):
                check_tensor(f"sample {index}: image {i}", tensor)
            squares = [i for image in tensors for i in (image if image.ndim == 4 else [image])]
            try:
                pixels, grids = pack_images(squares, self.patch_size)
            except ValueError as error:
                raise ValueError(f"sample {index}: {error}") from error
        if (pixels is None) != (grids is None):
            raise ValueError(f"sample {index}: pixel_values and image_grid_hw go together")
        if pixels is None:
            return {}
        pixels = _tensor(index, "pixel_values", pixels)
        if pixels.ndim != 2:
            shape = tuple(pixels.shape)
            raise ValueError(f"sample {index}: pixel_values must be [N, 3*p*p], got {shape}")
        if not pixels.is_floating_point():
            raise ValueError(
                f"sample {index}: pixel_values: {pixels.dtype}, expected normalised "
                "floating-point numbers"
            )
        grids = _whole(index, "image_grid_hw", grids)
        if grids.numel() % 2:
            shape = tuple(grids.shape)
            raise ValueError(f"sample {index}: image_grid_hw must be [images, 2], got {shape}")
        grids = grids.reshape(-1, 2)
        if (grids < 1).any():
            raise ValueError(
                f"sample {index}: image_grid_hw: expected positive numbers, got {grids.tolist()}"
            )
        if int(grids.prod(1).sum()) != len(pixels):
            raise ValueError(
                f"sample {index}: pixel_values has {len(pixels)} patches, expected "
                f"{int(grids.prod(1).sum())} for image_grid_hw {grids.tolist()}"
            )
        return {"pixel_values": pixels, "image_grid_hw": grids}

    def _batch(self, rows: list[dict[str, Tensor]], with_labels: bool) -> dict[str, Tensor]:
        length = max((len(row["input_ids"]) for row in rows), default=0)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        fills = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0}
        if with_labels:
            fills["labels"] = IGNORE_INDEX
        if with_labels and (missing := [i for i, row in enumerate(rows) if "labels" not in row]):
            raise ValueError(f"sample {missing[0]}: it has no labels, but others of the batch do")
        batch = {
            name: self._padded([row[name] for row in rows], length, fill)
            for name, fill in fills.items()
        }
        width = 3 * self.patch_size**2 if self.patch_size else 0
        pixels = [row["pixel_values"] for row in rows if "pixel_values" in row]
        grids = [row["image_grid_hw"] for row in rows if "image_grid_hw" in row]
        batch["pixel_values"] = torch.cat(pixels) if pixels else torch.zeros(0, width)
        batch["image_grid_hw"] = torch.cat(grids) if grids else torch.zeros(0, 2, dtype=torch.long)
        return batch

    def _padded(self, rows: list[Tensor], length: int, fill: int) -> Tensor:
        if not rows:
            return torch.zeros(0, length, dtype=torch.long)
        left = self.tokenizer.padding_side == "left"
        gaps = [length - len(row) for row in rows]
        sides = [(gap, 0) if left else (0, gap) for gap in gaps]
        return torch.stack([pad(row, s, value=fill) for row, s in zip(rows, sides, strict=True)])


class VQACollator(BaseCollator):
    """For training on questions and answers: every sample must have labels.

    The loss is on what the labels say, the answers; see :class:`BaseCollator` for the rest.
    """

    needs_labels = True


def _vector(index: int, name: str, values: Any) -> Tensor:
    vector = _whole(index, name, values)
    if vector.ndim == 2 and vector.shape[0] == 1:
        vector = vector[0]
    if vector.ndim != 1:
        raise ValueError(f"sample {index}: {name} must be [L], got {tuple(vector.shape)}")
    return vector


def _whole(index: int, name: str, values: Any) -> Tensor:
    """As integers; floats that are whole numbers too, as masks often are."""
    tensor = _tensor(index, name, values)
    whole = tensor.long()
    if tensor.is_floating_point() and not whole.eq(tensor).all():
        raise ValueError(f"sample {index}: {name}: expected whole numbers, got {values!r:.60}")
    return whole


def _tensor(index: int, name: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"sample {index}: {name}: expected numbers, got {values!r:.60}") from error


def _check_widths(rows: Mapping[int, Mapping[str, Tensor]], patch_size: int | None) -> None:
    widths = {i: row["pixel_values"].shape[1] for i, row in rows.items() if "pixel_values" in row}
    for index, width in widths.items():
        if patch_size is not None and width != 3 * patch_size**2:
            raise ValueError(
                f"sample {index}: pixel_values has rows of {width} values, expected "
                f"{3 * patch_size**2} for red, green and blue of patches of {patch_size} pixels"
            )
        first = next(iter(widths))
        if width != widths[first]:
            raise ValueError(
                f"sample {index}: pixel_values has rows of {width} values, those of sample {first} "
                f"have {widths[first]}: expected patches of one size"
            )
