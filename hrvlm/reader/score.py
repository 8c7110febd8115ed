"""How well a model reads drawn text that it has not seen: character error rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..drawn_text.drawing import RenderOptions, TextImage, render
from ..inference.text_metrics import edit_distance

HELD_OUT_SEED = 1_000_000  # training takes seeds below
HELD_OUT = {
    "line": RenderOptions(layouts={"line": 1.0}, font_sizes=(14, 32)),
    "full": RenderOptions(
        layouts={"line": 1.0, "lines": 1.0, "receipt": 1.0, "form": 1.0, "panel": 1.0},
        font_sizes=(8, 40),
        max_characters=40,
    ),
}


@dataclass(frozen=True)
class ReadingScore:
    """What a model read.

    Attributes:
        errors: Edits from what was read to what is written.
        characters: Written in all samples.
        exact: Samples without an error.
        samples: Number of samples.
        read: What was read, by sample.
    """

    errors: int
    characters: int
    exact: int
    samples: int
    read: tuple[str, ...]

    @property
    def error_rate(self) -> float:
        """Errors by character (CER)."""
        return self.errors / self.characters


def score(
    model: Any,
    processor: Any,
    held_out: str | RenderOptions,
    samples: int,
    *,
    seed: int = HELD_OUT_SEED,
    batch_size: int = 32,
    max_img_size: int | None = None,
) -> ReadingScore:
    """Let a model read held-out samples, greedily.

    Args:
        model: A VisionLanguageModel; its mode is kept.
        processor: Its processor.
        held_out: A name from `HELD_OUT`, or what to draw.
        samples: How many.
        seed: Of the renderer.
        batch_size: Samples read at once.
        max_img_size: Limit of an image's longer side in pixels; default: the processor's.
    """
    options = HELD_OUT[held_out] if isinstance(held_out, str) else held_out
    drawn = [render(seed, i, options) for i in range(samples)]
    order = sorted(range(samples), key=lambda i: drawn[i].image.width * drawn[i].image.height)
    read: dict[int, str] = {}
    training = model.training
    model.eval()
    try:
        for first in range(0, samples, batch_size):
            batch = order[first : first + batch_size]
            texts = read_images(model, processor, [drawn[i] for i in batch], max_img_size)
            read |= dict(zip(batch, texts, strict=True))
    finally:
        model.train(training)
    errors = [edit_distance(read[i], drawn[i].text) for i in range(samples)]
    return ReadingScore(
        errors=sum(errors),
        characters=sum(len(sample.text) for sample in drawn),
        exact=errors.count(0),
        samples=samples,
        read=tuple(read[i] for i in range(samples)),
    )


@torch.inference_mode()
def read_images(
    model: Any, processor: Any, samples: list[TextImage], max_img_size: int | None = None
) -> list[str]:
    """What the model reads in each image, with the prompt it knows best."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read."}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    sizes = {} if max_img_size is None else {"max_img_size": max_img_size}
    inputs = processor(
        images=[[sample.image] for sample in samples], text=[prompt] * len(samples), **sizes
    ).to(model.device)
    longest = max(len(sample.text) for sample in samples)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.float32):
        output = model.generate(**inputs, max_new_tokens=longest + 2, do_sample=False)
    answers = output[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
