"""The small model that reads: where the one of the package is, its tokenizer, and how to make one.

The tokenizer is byte-level: one token per ASCII character, so that the language model spells.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..vlm.config import VLMConfig
from ..vlm.processors import VLMProcessor
from ..vlm.tokenizer import IMAGE_TOKEN
from ..vlm.vision_language_model import VisionLanguageModel

PROMPT = "Read."  # what it was trained to be asked
# The mean log-probability by token of an answer to believe: recipes/reader/doubts.py.
DOUBT_BELOW = -0.2
WHAT_IT_READS = (
    "the reader of hrvlm, 4.3 million parameters: it reads printed, level English text, best short "
    "lines of 14 to 32 px, and small receipts, forms and panels; not pages, photographs or "
    "handwriting, and whatever the prompt, it answers no questions"
)
# The largest pictures that it is asked about, height and width in pixels: those of its training,
# and a line of 40 characters. In larger ones it makes text up: recipes/reader/peers.py.
LARGEST, LONGEST_LINE = (320, 512), (64, 640)
PAD, END, USER, ANSWER = "<|pad|>", "<|end|>", "<|user|>", "<|answer|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ '<|answer|>' + message['content'] + '<|end|>' }}"
    "{%- else -%}"
    "{{ '<|user|>' + message['content'] }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|answer|>' }}{%- endif -%}"
)


def reader_path() -> str:
    """Directory of the reader that comes with the package, as ``from_pretrained`` takes it.

    Raises:
        FileNotFoundError: the package was built without its data.
    """
    directory = files("hrvlm").joinpath("assets", "reader")
    if not directory.joinpath("model.safetensors").is_file():
        raise FileNotFoundError(
            f"{directory}: the reader's weights are not there; reinstall hrvlm, or give a model"
        )
    return str(directory)


def why_not_read(image: Image.Image) -> str | None:
    """Why the reader can't read a picture, to stand behind its name; None if it may.

    Its size alone tells: what it makes of a small one, ``hrvlm.inference.doubts`` judges.
    """
    height, width = image.height, image.width
    if any(height <= most and width <= widest for most, widest in (LARGEST, LONGEST_LINE)):
        return None
    largest, line = (f"{most} x {widest}" for most, widest in (LARGEST, LONGEST_LINE))
    return (
        f"{height} x {width} px (height x width) is more than the reader of hrvlm has learned to "
        f"read, {largest}, or {line} for a line: give it a line or a small part, with text of 14 "
        "to 32 px, or another model with --model"
    )


def refusal(model: str, image: Image.Image) -> str | None:
    """:func:`why_not_read` where the model is that of :func:`reader_path`; None for others."""
    directory = str(files("hrvlm").joinpath("assets", "reader"))
    ours = os.path.realpath(model) == os.path.realpath(directory)
    return why_not_read(image) if ours else None


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and five special tokens; pads on the left; with a chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_backend([PAD, END, USER, ANSWER]),
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )


def byte_backend(special: Sequence[str]) -> Tokenizer:
    """A token for each of 256 bytes, after the special ones; they never merge."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*special])
    return backend


def new_reader(
    vision_config: Mapping[str, Any], text_config: Mapping[str, Any], **options: Any
) -> tuple[VisionLanguageModel, VLMProcessor]:
    """A reader with random weights, and its processor.

    Args:
        vision_config: Fields of a ``DINOv3ViTConfig``.
        text_config: Fields of a ``LlamaConfig``; the vocabulary is the tokenizer's.
        **options: Fields of :class:`~hrvlm.vlm.config.VLMConfig`, as ``mp_pixel_shuffle_factor``.
    """
    tokenizer = byte_tokenizer()
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    config = VLMConfig(
        vision_config={"model_type": "dinov3_vit", **vision_config},
        text_config=text | dict(text_config),
        image_token_id=tokenizer.image_token_id,
        **options,
    )
    return VisionLanguageModel(config), VLMProcessor.from_config(config, tokenizer)
