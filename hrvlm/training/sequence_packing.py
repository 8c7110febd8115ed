"""Several samples in one row of the language model, none of which sees another.

    sample 0    sample 1        padding          input_ids      [L]
    0 1 2 3 4   0 1 2 3 4 5 6   0 1 2            position_ids   [L], from 0 for each

The batch has no attention_mask: from position ids that start again, transformers builds a mask
that is block-diagonal and causal within the blocks (`masking_utils.find_packed_sequence_indices`).
It does so only without a cache (pass ``use_cache=False``), and for flash attention only in batches
of one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..images.geometry import positive_int
from ..vlm.placeholders import IGNORE_INDEX
from .collators import VQACollator

Sample = Mapping[str, Tensor]


def pack_sequences(samples: Iterable[Sample], length: int, open_rows: int = 32) -> Iterator[Any]:
    """Fill rows of `length` tokens with samples, best fit among a few rows that are open.

    The order is that of the samples, but for how long a row stays open: it leaves as soon as a
    sample fits into none, the fullest row first.

    Args:
        samples: With ``input_ids`` and ``labels`` [L], and ``pixel_values`` and ``image_grid_hw``
            if they have images; none longer than `length`.
        length: Of a row, in tokens.
        open_rows: How many rows are filled at once: more leave less padding, and mix the order
            over a longer stretch.

    Yields:
        Rows: samples with ``position_ids``.

    Raises:
        TypeError: a sample is no mapping with tensors.
        ValueError: a sample is longer than a row, or a number is no positive int.
    """
    positive_int("length", length)
    positive_int("open_rows", open_rows)
    rows: list[list[Sample]] = []
    free: list[int] = []
    for i, sample in enumerate(samples):
        size = _length(i, sample)
        if size > length:
            raise ValueError(f"a sample of {size} tokens does not fit into a row of {length}")
        fitting = [i for i, space in enumerate(free) if space >= size]
        if fitting:
            best = min(fitting, key=free.__getitem__)
            rows[best].append(sample)
            free[best] -= size
            continue
        if len(rows) == open_rows:
            fullest = free.index(min(free))
            free.pop(fullest)
            yield _joined(rows.pop(fullest))
        rows.append([sample])
        free.append(length - size)
    for row in rows:
        yield _joined(row)


def _length(index: int, sample: Any) -> int:
    given = sample if isinstance(sample, Mapping) else {}
    parts: list[Any] = [given.get(name) for name in ("input_ids", "labels")]
    if not all(isinstance(part, Tensor) and part.ndim == 1 for part in parts):
        raise TypeError(f"sample {index}: expected input_ids and labels, tensors [L]")
    if len(parts[0]) != len(parts[1]) or not len(parts[0]):
        raise ValueError(
            f"sample {index}: {len(parts[0])} input_ids and {len(parts[1])} labels, expected a "
            "label for each token"
        )
    return len(parts[0])


def _joined(samples: Sequence[Sample]) -> dict[str, Tensor]:
    labels = [sample["labels"].clone() for sample in samples]
    for own in labels:
        own[0] = IGNORE_INDEX  # the last token of the sample before does not predict this one
    row = {
        "input_ids": torch.cat([sample["input_ids"] for sample in samples]),
        "labels": torch.cat(labels),
        "position_ids": torch.cat([torch.arange(len(own)) for own in labels]),
    }
    for name in ("pixel_values", "image_grid_hw"):
        if tensors := [sample[name] for sample in samples if name in sample]:
            row[name] = torch.cat(tensors)
    return row


class PackedSequenceCollator(VQACollator):
    """Rows of :func:`pack_sequences` to a batch ``[B, length]``.

    ``input_ids``, ``labels``, ``position_ids``, ``pixel_values`` and ``image_grid_hw``; what a row
    lacks is filled with padding that is a sequence of its own.

    Args:
        tokenizer: A tokenizer, or a processor that has one.
        length: Of a row, in tokens.
        **options: Of :class:`~hrvlm.training.collators.BaseCollator`.
    """

    def __init__(self, tokenizer: Any, length: int, **options: Any):
        positive_int("length", length)
        super().__init__(tokenizer, length, pad_to_multiple_of=length, **options)
        self.length = length

    def __call__(self, samples: Sequence[Mapping[str, Any] | None]) -> dict[str, Tensor]:
        """Collate rows.

        Raises:
            ValueError: as :class:`~hrvlm.training.collators.BaseCollator`, or a row has no
                position_ids.
        """
        if not isinstance(samples, Iterable):
            return super().__call__(samples)  # which says so
        rows = [row for row in samples if row is not None]
        for i, row in enumerate(rows):
            if isinstance(row, Mapping) and "position_ids" not in row:
                raise ValueError(f"sample {i}: it has no position_ids; see pack_sequences")
        batch = super().__call__(rows)
        del batch["attention_mask"]
        left = self.tokenizer.padding_side == "left"
        positions = []
        for row in rows:
            own = torch.as_tensor(row["position_ids"])
            padding = torch.arange(self.length - len(own))
            positions.append(torch.cat([padding, own] if left else [own, padding]))
        batch["position_ids"] = (
            torch.stack(positions) if positions else torch.zeros(0, 0, dtype=torch.long)
        )
        return batch
