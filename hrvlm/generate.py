"""Answer a prompt about images with a trained vision-language model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from .config import VLMConfig
from .encoder_loading import check_model_type, pick_device, quiet_loading
from .image_intake import load_image
from .processors import VLMProcessor
from .vision_language_model import VisionLanguageModel


@dataclass(frozen=True)
class GenerateOptions:
    """How the text is decoded."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    num_beams: int = 1

    def __post_init__(self) -> None:
        """Refuse what can't be decoded, before a model is loaded."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be >= 1, got {self.num_beams}")


@dataclass(frozen=True)
class Generated:
    """The answer and what it took."""

    text: str
    prompt_tokens: int  # image tokens included
    new_tokens: int
    seconds: float  # of everything after the model was loaded, images included
    first_token_seconds: float | None  # None with beams, which have no first token until the end

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the whole time."""
        return self.new_tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}


class _Streamer(TextStreamer):
    """Prints while it decodes, unless silent, and keeps the time of the first token."""

    def __init__(self, tokenizer: Any, *, silent: bool):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.silent, self.calls, self.first_token = silent, 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        """The first call is the prompt, the second the first token."""
        self.calls += 1
        if self.calls == 2:
            self.first_token = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of text."""
        if not self.silent:
            super().on_finalized_text(text, stream_end)


def generate(
    model: str,
    images: Sequence[Path],
    prompt: str,
    options: GenerateOptions | None = None,
    *,
    device: str | None = None,
    dtype: str = "auto",
    stream: bool = True,
) -> Generated:
    """Load a model and answer.

    Args:
        model: Directory (or hub id) of a VisionLanguageModel with its processor.
        images: Files, in the order in which the prompt speaks of them.
        prompt: The user's text, without image tokens.
        options: Decoding.
        device: Default: the GPU if there is one, else the CPU.
        dtype: "float32", "bfloat16", or "auto" for the checkpoint's.
        stream: Print the text on stdout as it comes (with beams: at the end).

    Raises:
        ValueError: there is no such model, an image can't be read, or the prompt does not fit.
        OSError: a file can't be opened.
    """
    options = options or GenerateOptions()
    pictures = [load_image(path) for path in images]
    processor, vlm = _load(model, pick_device(device), dtype)
    start = time.perf_counter()
    inputs = _inputs(processor, pictures, prompt).to(vlm.device)
    streamer = None
    if options.num_beams == 1:
        streamer = _Streamer(processor.tokenizer, silent=not stream)
    with torch.inference_mode():
        sequences = vlm.generate(**inputs, **_decoding(options), streamer=streamer)
    prompt_tokens = inputs["input_ids"].shape[1]
    answer = sequences[0, prompt_tokens:]
    text = processor.tokenizer.decode(answer, skip_special_tokens=True)
    seconds = time.perf_counter() - start
    if stream and streamer is None:
        print(text)
    first = streamer.first_token - start if streamer and streamer.calls > 1 else None
    return Generated(text, prompt_tokens, answer.shape[0], seconds, first)


def _load(model: str, device: torch.device, dtype: str) -> tuple[Any, Any]:
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype must be auto, float32 or bfloat16, got {dtype!r}")
    check_model_type(model, VLMConfig.model_type)
    vlm: Any
    with quiet_loading():
        processor = VLMProcessor.from_pretrained(model)
        vlm = VisionLanguageModel.from_pretrained(model, dtype=dtype)
    return processor, vlm.to(device).eval()


def _inputs(processor: Any, pictures: Sequence[Any], prompt: str) -> Any:
    """One user turn: the images, then the text; by the chat template where there is one."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in pictures]
    content.append({"type": "text", "text": prompt})
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def _decoding(options: GenerateOptions) -> dict[str, Any]:
    sampling: dict[str, Any] = {"do_sample": options.temperature > 0}
    if options.temperature > 0:
        sampling["temperature"] = options.temperature
    return sampling | {
        "max_new_tokens": options.max_new_tokens,
        "num_beams": options.num_beams,
    }
