"""Teaching a vision-language model to read: two more losses while it trains on synthetic text.

    loss = next-token loss + characters_weight * characters + pointer_weight * pointer

characters: a linear head on the encoder's patches names the characters whose centres lie in each
patch. Alone, on pages full of text, it teaches the encoder within minutes what a next-token loss
takes very long to find.

pointer: one attention head of the language model, when it is about to write a character, shall look
at the image token which holds that character. It teaches the reading order.

Neither is a part of the trained model: the head is dropped when the model is saved for use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from hrvlm.drawn_text.drawing import RenderOptions, TextImage, prompt_of, render
from hrvlm.drawn_text.words import CHARACTERS
from hrvlm.reader.model import ANSWER, END, USER
from hrvlm.training.collators import IGNORE_INDEX, VQACollator
from hrvlm.vlm.placeholders import as_grids

BLANK = len(CHARACTERS)
_CHARACTER_IDS = {character: i for i, character in enumerate(CHARACTERS)}


@dataclass(frozen=True)
class Stage:
    """Some steps of a run.

    Attributes:
        steps: How many.
        draw: What is drawn for them.
        encoder_only: Train the encoder alone, by `characters`.
    """

    steps: int
    draw: RenderOptions = field(default_factory=RenderOptions)
    encoder_only: bool = False


@dataclass(frozen=True)
class ReadingOptions:
    """The losses and their schedule.

    Attributes:
        stages: One after the other; the last goes on if the run does.
        characters_weight: Of the first loss, where the language model learns too.
        pointer_weight: Of the second loss.
        pointer_layer: The decoder layer whose first head is taught to look.
        slots: Characters that a patch can hold.
        blank_weight: Of a slot that holds none.
    """

    stages: Sequence[Stage]
    characters_weight: float = 1.0
    pointer_weight: float = 1.0
    pointer_layer: int = 1
    slots: int = 2
    blank_weight: float = 0.05

    def stage_at(self, step: int) -> Stage:
        """The stage that optimizer step `step` (from 0) belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]


class ReadingData(Dataset):
    """Rendered samples by index, processed for the model, with the targets of the two losses.

    Args:
        processor: The model's.
        options: What to draw when.
        seed: Of the renderer.
        batch_size: Samples of a step.
        steps: Steps of the run.
    """

    def __init__(
        self, processor: Any, options: ReadingOptions, seed: int, batch_size: int, steps: int
    ):
        self.processor = processor
        self.options = options
        self.seed = seed
        self.batch_size = batch_size
        self.length = steps * batch_size

    def __len__(self) -> int:
        """Samples of the whole run."""
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``input_ids``, ``labels`` [L]; ``pixel_values``, ``image_grid_hw``; the two targets.

        ``characters`` [hp*wp, slots] are places in `CHARACTERS`, `BLANK` where there are none;
        ``pointer`` [L] is the position of the image token to look at, -100 for none.
        """
        stage = self.options.stage_at(index // self.batch_size)
        return self.features(render(self.seed, index, stage.draw), prompt_of(self.seed, index))

    def features(self, sample: TextImage, prompt: str) -> dict[str, Tensor]:
        """One drawn sample as the model takes it."""
        pixels = self.processor.image_processor([sample.image], return_tensors="pt")
        grid = as_grids(pixels["image_grid_hw"])[0]
        p = self.processor.image_processor.patch_size
        across, down = p * grid[1] / sample.image.width, p * grid[0] / sample.image.height
        places = [
            (min(int(y * down) // p, grid[0] - 1), min(int(x * across) // p, grid[1] - 1))
            for x, y in sample.centres
        ]
        image = self.processor.replace_image_token(pixels, 0)
        tokenize = self.processor.tokenizer
        before = tokenize(f"{USER}{image}{prompt}{ANSWER}")["input_ids"]
        answer = tokenize(f"{sample.text}{END}")["input_ids"]
        labels = torch.tensor([IGNORE_INDEX] * len(before) + answer)
        pointer = torch.full_like(labels, IGNORE_INDEX)
        s = self.processor.image_processor.pixel_shuffle_factor
        first = before.index(self.processor.image_token_id)
        for i, (row, column) in enumerate(places):
            pointer[len(before) + i - 1] = first + (row // s) * (grid[1] // s) + column // s
        return {
            "input_ids": torch.tensor(before + answer),
            "labels": labels,
            "pixel_values": pixels["pixel_values"],
            "image_grid_hw": pixels["image_grid_hw"],
            "characters": self._characters(sample.text, places, grid),
            "pointer": pointer,
        }

    def _characters(
        self, text: str, places: Sequence[tuple[int, int]], grid: tuple[int, int]
    ) -> Tensor:
        slots = torch.full((grid[0] * grid[1], self.options.slots), BLANK)
        used: dict[int, int] = {}
        for character, (row, column) in zip(text, places, strict=True):
            patch = row * grid[1] + column
            slot = used.get(patch, 0)
            if slot < self.options.slots:
                slots[patch, slot] = _CHARACTER_IDS[character]
            used[patch] = slot + 1
        return slots


class ReadingCollator(VQACollator):
    """:class:`~hrvlm.training.collators.VQACollator` that carries the two targets along."""

    def __call__(self, samples: Sequence[Mapping[str, Any] | None]) -> dict[str, Tensor]:
        """Collate; positions of `pointer` are those of the padded row."""
        kept = [sample for sample in samples if sample is not None]
        batch = super().__call__(kept)
        length = batch["input_ids"].shape[1]
        left = self.tokenizer.padding_side == "left"
        batch["pointer"] = torch.full((len(kept), length), IGNORE_INDEX)
        for row, sample in zip(batch["pointer"], kept, strict=True):
            pointer = sample["pointer"]
            start = length - len(pointer) if left else 0
            row[start : start + len(pointer)] = torch.where(pointer < 0, pointer, pointer + start)
        batch["characters"] = torch.cat([sample["characters"] for sample in kept])
        return batch


def new_head(model: Any, slots: int) -> nn.Linear:
    """The linear head of `characters`, for a model."""
    return nn.Linear(model.config.vit_hidden_dim, slots * (BLANK + 1)).to(model.device)


def characters_loss(
    head: nn.Module, patches: Tensor, targets: Tensor, blank_weight: float
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the head on `patches` ``[N, C]``, and the share of characters it got."""
    logits = head(patches).float().view(-1, BLANK + 1)
    weights = torch.ones(BLANK + 1, device=logits.device)
    weights[BLANK] = blank_weight
    targets = targets.flatten()
    with torch.no_grad():
        written = targets != BLANK
        right = (logits.argmax(-1) == targets)[written].float().mean()
    return F.cross_entropy(logits, targets, weights), right


@contextmanager
def listening(encoder: nn.Module, attention: nn.Module) -> Iterator[dict[str, Any]]:
    """Keep the encoder's output and the attention's inputs of one forward."""
    heard: dict[str, Any] = {}

    def keep_output(module: nn.Module, args: Any, output: Any) -> None:
        heard["encoder"] = output

    def keep_inputs(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        heard["attention"] = (hidden, kwargs["position_embeddings"])

    handles = [
        encoder.register_forward_hook(keep_output),
        attention.register_forward_pre_hook(keep_inputs, with_kwargs=True),
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def pointer_loss(attention: Any, inputs: Any, targets: Tensor, is_image: Tensor) -> Tensor:
    """Cross entropy of the first head's scores over the image tokens of each row."""
    hidden, (cos, sin) = inputs
    width = attention.head_dim
    query = attention.q_proj(hidden)[..., :width]
    key = attention.k_proj(hidden)[..., :width]
    query, key = (x * cos + _rotate_half(x) * sin for x in (query, key))
    scores = (query @ key.transpose(1, 2)).float() * attention.scaling
    scores = scores.masked_fill(~is_image[:, None, :], float("-inf"))
    asked = targets >= 0
    if not asked.any():
        return scores.sum() * 0
    return F.cross_entropy(scores[asked], targets[asked])


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)
