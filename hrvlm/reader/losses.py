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
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer

from ..drawn_text.drawing import RenderOptions, TextImage, prompt_of, render
from ..drawn_text.words import CHARACTERS
from ..training.collators import VQACollator
from ..vlm.placeholders import as_grids
from .model import ANSWER, END, USER

BLANK = len(CHARACTERS)
_CHARACTER_IDS = {character: i for i, character in enumerate(CHARACTERS)}
IGNORE = -100


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
        labels = torch.tensor([IGNORE] * len(before) + answer)
        pointer = torch.full_like(labels, IGNORE)
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
        batch["pointer"] = torch.full((len(kept), length), IGNORE)
        for row, sample in zip(batch["pointer"], kept, strict=True):
            pointer = sample["pointer"]
            start = length - len(pointer) if left else 0
            row[start : start + len(pointer)] = torch.where(pointer < 0, pointer, pointer + start)
        batch["characters"] = torch.cat([sample["characters"] for sample in kept])
        return batch


class ReadingTrainer(Trainer):
    """A Trainer with the losses of `ReadingOptions`.

    The model gets a ``reading_head`` for the time of training; :func:`without_head` takes it off.
    """

    def __init__(self, model: Any, reading: ReadingOptions, **kwargs: Any):
        self.reading = reading
        self._sums: dict[str, float] = {}
        self._count = 0
        if not hasattr(model, "reading_head"):
            model.reading_head = nn.Linear(
                model.config.vit_hidden_dim, reading.slots * (BLANK + 1)
            ).to(model.device)
        super().__init__(model=model, **kwargs)
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """In order: the data is random by itself, and a resumed run skips without drawing."""
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(data)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The sum at the top of this file; only `characters` in the encoder's own stages."""
        inputs = dict(inputs)
        characters, pointer = inputs.pop("characters"), inputs.pop("pointer")
        if self.reading.stage_at(self.state.global_step).encoder_only:
            output = model.vision_encoder(inputs["pixel_values"], grids=inputs["image_grid_hw"])
            loss = self._characters_loss(model, output.packed_patches, characters)
            self._record(characters=loss)
            return loss
        layer = model.decoder.model.layers[self.reading.pointer_layer]
        with _listening(model.vision_encoder, layer.self_attn) as heard:
            outputs = model(**inputs, use_cache=False)
        patches = heard["encoder"].packed_patches
        by_characters = self._characters_loss(model, patches, characters)
        is_image = inputs["input_ids"] == model.config.image_token_id
        by_pointer = _pointer_loss(layer.self_attn, heard["attention"], pointer, is_image)
        self._record(text=outputs.loss, characters=by_characters, pointer=by_pointer)
        loss = (
            outputs.loss
            + self.reading.characters_weight * by_characters
            + self.reading.pointer_weight * by_pointer
        )
        return (loss, outputs) if return_outputs else loss

    def _characters_loss(self, model: Any, patches: Tensor, targets: Tensor) -> Tensor:
        logits = model.reading_head(patches).float().view(-1, BLANK + 1)
        weights = torch.ones(BLANK + 1, device=logits.device)
        weights[BLANK] = self.reading.blank_weight
        targets = targets.flatten()
        with torch.no_grad():
            written = targets != BLANK
            right = (logits.argmax(-1) == targets)[written].float().mean()
        self._record(characters_right=right)
        return F.cross_entropy(logits, targets, weights)

    def _record(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())
            self._count += name == "characters"

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the parts of the loss since the last log."""
        if self._count and "loss" in logs:
            logs = logs | {k: round(v / self._count, 4) for k, v in self._sums.items()}
            self._sums, self._count = {}, 0
        super().log(logs, *args, **kwargs)


def without_head(model: Any) -> Any:
    """Take the training-time head off a model."""
    if hasattr(model, "reading_head"):
        del model.reading_head
    return model


@contextmanager
def _listening(encoder: nn.Module, attention: nn.Module) -> Iterator[dict[str, Any]]:
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


def _pointer_loss(attention: Any, inputs: Any, targets: Tensor, is_image: Tensor) -> Tensor:
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
