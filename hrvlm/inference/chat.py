"""Answer questions about images with a trained vision-language model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList, TextStreamer

from ..images.geometry import positive_int
from ..images.intake import load_image
from ..machine import MODEL_DTYPES, check_dtype, pick_device
from ..vlm.config import VLMConfig
from ..vlm.processors import VLMProcessor
from ..vlm.vision_language_model import VisionLanguageModel
from .doubts import UNKNOWN_BOUND, TokenProbabilities, doubts
from .loading import check_model_type, quiet_loading


@dataclass(frozen=True)
class GenerateOptions:
    """How the text is decoded."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    num_beams: int = 1
    doubt_below: float = UNKNOWN_BOUND  # the mean log-probability by token of an answer to believe

    def __post_init__(self) -> None:
        """Refuse what can't be decoded, before a model is loaded."""
        for name in ("max_new_tokens", "num_beams"):
            positive_int(name, getattr(self, name))
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")


@dataclass(frozen=True)
class Generated:
    """The answer and what it took."""

    text: str
    prompt_tokens: int  # image tokens included
    new_tokens: int
    seconds: float  # of everything after the model was loaded, images included
    first_token_seconds: float | None  # None with beams, which have no first token until the end
    mean_log_probability: float  # of the new tokens, under the model
    doubts: dict[str, str]  # why not to believe it; see hrvlm.inference.doubts

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


class Chat:
    """Questions and answers about a set of images, each asked with all before it.

    The whole conversation, images included, is run again for every answer: nothing is kept between
    turns but the text.

    Args:
        processor: The model's :class:`~hrvlm.vlm.processors.VLMProcessor`.
        vlm: A VisionLanguageModel, on its device.
        images: What the processor takes as images; they stand before the first question.
        options: Decoding.
    """

    def __init__(
        self,
        processor: Any,
        vlm: Any,
        images: Sequence[Any] = (),
        options: GenerateOptions | None = None,
    ):
        self.processor, self.vlm = processor, vlm
        self.options = options or GenerateOptions()
        self.messages: list[dict[str, Any]] = []
        self.images = list(images)

    def ask(self, prompt: str, *, stream: bool = False) -> Generated:
        """Answer the next question.

        Args:
            prompt: The user's text, without image tokens.
            stream: Print the text on stdout as it comes (with beams: at the end).

        Raises:
            ValueError: the prompt has the image token in it, or the conversation does not fit into
                the model's context; the conversation is then as it was before.
        """
        start = time.perf_counter()
        messages = [*self.messages, user_message(prompt, [] if self.messages else self.images)]
        inputs = chat_inputs(self.processor, messages).to(self.vlm.device)
        streamer = None
        if self.options.num_beams == 1:
            streamer = _Streamer(self.processor.tokenizer, silent=not stream)
        answer, mean = self._answer(inputs, streamer)
        prompt_tokens = inputs["input_ids"].shape[1]
        text = self.processor.tokenizer.decode(answer, skip_special_tokens=True)
        seconds = time.perf_counter() - start
        if stream and streamer is None:
            print(text)
        self.messages = [*messages, assistant_message(text)]
        first = streamer.first_token - start if streamer and streamer.calls > 1 else None
        found = doubts(answer.tolist(), mean, self.options.doubt_below)
        return Generated(text, prompt_tokens, answer.shape[0], seconds, first, mean, found)

    @torch.inference_mode()
    def _answer(self, inputs: Any, streamer: _Streamer | None) -> tuple[torch.Tensor, float]:
        """The new tokens ``[n]``, and their mean log-probability."""
        prompt_tokens = inputs["input_ids"].shape[1]
        if streamer is not None:
            probabilities = TokenProbabilities()
            sequences = self.vlm.generate(
                **inputs,
                **decoding(self.options),
                streamer=streamer,
                logits_processor=LogitsProcessorList([probabilities]),
            )
            answer = sequences[0, prompt_tokens:]
            return answer, probabilities.mean(answer)
        output = self.vlm.generate(
            **inputs, **decoding(self.options), return_dict_in_generate=True, output_scores=True
        )
        answer = output.sequences[0, prompt_tokens:]
        penalty = getattr(self.vlm.generation_config, "length_penalty", None)
        # A beam's score is the sum of its log-probabilities over n ** length_penalty.
        scale = 1.0 if penalty is None else answer.shape[0] ** (penalty - 1)
        return answer, output.sequences_scores[0].item() * scale


def start_chat(
    model: str,
    images: Sequence[Path],
    options: GenerateOptions | None = None,
    *,
    device: str | None = None,
    dtype: str = "auto",
) -> Chat:
    """Load images and a model.

    Args:
        model: Directory (or hub id) of a VisionLanguageModel with its processor.
        images: Files, in the order in which the prompts speak of them.
        options: Decoding.
        device: Default: the GPU if there is one, else the CPU.
        dtype: "float32", "bfloat16", or "auto" for the checkpoint's.

    Raises:
        ValueError: there is no such model, or an image can't be read.
        OSError: a file can't be opened.
    """
    return start_chats(model, [images], options, device=device, dtype=dtype)[0]


def start_chats(
    model: str,
    groups: Sequence[Sequence[Path]],
    options: GenerateOptions | None = None,
    *,
    device: str | None = None,
    dtype: str = "auto",
) -> list[Chat]:
    """A chat about each group of images, all with one model; see :func:`start_chat`."""
    check_dtype(dtype, ("auto", *MODEL_DTYPES))
    check_model_type(model, VLMConfig.model_type)
    with quiet_loading(model):
        processor = VLMProcessor.from_pretrained(model)
    # Before the model, which takes long to load.
    reading = processor.reading_options()
    pictures = [[load_image(path, **reading) for path in images] for images in groups]
    processor, vlm = load_vlm(model, device=device, dtype=dtype)
    return [Chat(processor, vlm, images, options) for images in pictures]


def load_vlm(model: str, *, device: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """The processor and the model of a directory or hub id, ready to generate.

    Raises:
        ValueError: there is no such model, or the device or dtype can't be used.
    """
    check_dtype(dtype, ("auto", *MODEL_DTYPES))
    where = pick_device(device)
    check_model_type(model, VLMConfig.model_type)
    vlm: Any
    with quiet_loading(model):
        processor = VLMProcessor.from_pretrained(model)
        vlm = VisionLanguageModel.from_pretrained(model, dtype=dtype)
    return processor, vlm.to(where).eval()


def answer_batch(
    processor: Any,
    vlm: Any,
    conversations: Sequence[Sequence[dict[str, Any]]],
    options: GenerateOptions | None = None,
) -> list[str]:
    """Answer several conversations in one batch, padded on the left.

    Args:
        processor: The model's :class:`~hrvlm.vlm.processors.VLMProcessor`.
        vlm: A VisionLanguageModel, on its device.
        conversations: Messages (see :func:`user_message`), the last of each a user's.
        options: Decoding.

    Raises:
        ValueError: a conversation does not fit into the model's context, or a text has the image
            token in it.
    """
    if not conversations:
        return []
    inputs = chat_inputs(processor, [list(c) for c in conversations]).to(vlm.device)
    with torch.inference_mode():
        sequences = vlm.generate(**inputs, **decoding(options or GenerateOptions()))
    answers = sequences[:, inputs["input_ids"].shape[1] :]
    return [processor.tokenizer.decode(row, skip_special_tokens=True) for row in answers]


def user_message(text: str, images: Sequence[Any] = ()) -> dict[str, Any]:
    """A user's turn: the images, then the text."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def assistant_message(text: str) -> dict[str, Any]:
    """An answer, as a turn of the conversation."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def chat_inputs(processor: Any, conversation: Any) -> Any:
    """The model's inputs for a conversation, or for a list of them, up to the next answer."""
    return processor.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def decoding(options: GenerateOptions) -> dict[str, Any]:
    """The arguments of transformers' ``generate``."""
    sampling: dict[str, Any] = {"do_sample": options.temperature > 0}
    if options.temperature > 0:
        sampling["temperature"] = options.temperature
    return sampling | {
        "max_new_tokens": options.max_new_tokens,
        "num_beams": options.num_beams,
    }
