"""The language model's tokenizer: image token, grid tokens, chat templates."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any
from weakref import WeakKeyDictionary

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..checkpoints.damage import naming_damaged_files
from ..images.geometry import positive_pair

IMAGE_TOKEN = "<|image|>"  # nanoVLM's

# nanoVLM's template, which is ChatML; for tokenizers that bring none.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# In front of a template that knows text only: turns the content of each message from a list of
# parts into a string, or a single part of text, with the image token for an image.
IMAGE_PRELUDE = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is not defined or message['content'] is string"
    " or not message['content'] is iterable -%}"
    "{%- set flat.messages = flat.messages + [message] -%}"
    "{%- else -%}"
    "{%- set part = namespace(text='') -%}"
    "{%- for block in message['content'] -%}"
    "{%- if block['type'] == 'image' -%}"
    "{%- set part.text = part.text + IMAGE_TOKEN -%}"
    "{%- else -%}"
    "{%- set part.text = part.text + block['text'] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=CONTENT)] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)

_TAKES_PARTS = re.compile(r"""\[\s*['"]text['"]\s*\]|\.text\b""")


def with_image_prelude(template: str, image_token: str) -> str:
    """A chat template that turns images into image tokens; one that knows images is as it was."""
    if "image" in template:
        return template
    content = "[{'type': 'text', 'text': part.text}]" if _TAKES_PARTS.search(template) else None
    # JSON's strings are Jinja's.
    prelude = IMAGE_PRELUDE.replace("IMAGE_TOKEN", json.dumps(image_token))
    return prelude.replace("CONTENT", content or "part.text") + template


_GRID_TOKENS: WeakKeyDictionary[Any, tuple[int, frozenset[str]]] = WeakKeyDictionary()


def get_tokenizer(
    name: str,
    extra_special_tokens: Mapping[str, str] | None = None,
    chat_template: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load a language model's tokenizer and teach it the image token.

    Args:
        name: Hub id or directory.
        extra_special_tokens: Named special tokens to add: ``{"image_token": "<|image|>", ...}``.
            Without an "image_token" the tokenizer's own is used, else `IMAGE_TOKEN` is added.
        chat_template: Replaces the tokenizer's.

    Returns:
        A tokenizer that pads on the left (as generation needs), with the attributes ``image_token``
        and ``image_token_id``, and the end token for padding if it had none.

    Raises:
        ValueError: it has neither a padding token nor an end token, or a file is damaged.
    """
    if not isinstance(name, str | PathLike):
        raise TypeError(f"tokenizer: expected a hub id or a directory, got {type(name).__name__}")
    named = dict(extra_special_tokens or {})
    options: dict[str, Any] = {"padding_side": "left"}
    if chat_template is not None:
        options["chat_template"] = chat_template
    with naming_damaged_files(name, all_errors=True):
        if "image_token" not in named:
            plain = AutoTokenizer.from_pretrained(name, **options)
            named["image_token"] = getattr(plain, "image_token", None) or IMAGE_TOKEN
        tokenizer = AutoTokenizer.from_pretrained(name, extra_special_tokens=named, **options)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"{name}: the tokenizer has neither pad_token nor eos_token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def get_image_string(
    tokenizer: PreTrainedTokenizerBase,
    grids: Sequence[tuple[int, int]],
    *,
    append_cls: bool = False,
) -> str:
    """The text of images: exactly gh * gw image tokens each (one more with `append_cls`).

    Where the vocabulary has a grid token ``<row_i_col_j>`` (nanoVLM's, counted from 1), it stands
    before the image token of that place.

    Args:
        tokenizer: With an ``image_token``, as :func:`get_tokenizer` makes it.
        grids: TOKEN grid (gh, gw) of each image.
        append_cls: Whether the model appends a CLS token (``config.mp_append_cls``).

    Raises:
        TypeError: `grids` is no list.
        ValueError: a grid is not two positive ints, or the tokenizer has no image token.
    """
    image_token = image_token_of(tokenizer)
    if not isinstance(grids, Iterable):
        raise TypeError(f"grids: expected a list of (gh, gw), got {type(grids).__name__}")
    known = _grid_tokens(tokenizer)
    parts = []
    for i, grid in enumerate(grids):
        if (pair := positive_pair(grid)) is None:
            raise ValueError(f"image {i}: a token grid is two positive ints (gh, gw), got {grid}")
        gh, gw = pair
        if not known:
            parts.append(image_token * (gh * gw))
        else:
            places = (f"<row_{r}_col_{c}>" for r in range(1, gh + 1) for c in range(1, gw + 1))
            parts += [(p if p in known else "") + image_token for p in places]
        parts.append(image_token * append_cls)
    return "".join(parts)


def image_token_of(tokenizer: Any) -> str:
    """The image token of a tokenizer.

    Raises:
        ValueError: it has none.
    """
    token = getattr(tokenizer, "image_token", None)
    if token is None:
        raise ValueError("tokenizer: it has no image_token; make it with hrvlm.get_tokenizer")
    return str(token)


def _grid_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The grid tokens in the vocabulary, which is read once (it takes long)."""
    size, tokens = _GRID_TOKENS.get(tokenizer, (-1, frozenset()))
    if size != len(tokenizer):
        tokens = frozenset(t for t in tokenizer.get_vocab() if t.startswith("<row_"))
        _GRID_TOKENS[tokenizer] = (len(tokenizer), tokens)
    return tokens
