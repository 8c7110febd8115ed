"""Chats as callers give them: checked, as plain dictionaries, with templates' errors named."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from jinja2 import TemplateError


def kind_of(value: Any) -> str:
    """What a value is, for errors: a list by the types of its items."""
    if isinstance(value, list | tuple):
        return f"a list of {', '.join(sorted({type(item).__name__ for item in value})) or 'none'}"
    return type(value).__name__


def marks_answers(template: str | None) -> bool:
    """Whether a template has ``{% generation %}``."""
    return re.search(r"{%-?\s*generation\b", template or "") is not None


@contextmanager
def naming_the_template() -> Iterator[None]:
    """Jinja's errors, and those that what a template does raises, as ours."""
    try:
        yield
    except Exception as error:
        frames = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
        jinja = isinstance(error, TemplateError | RecursionError | SyntaxError)
        if not jinja and "<template>" not in frames:
            raise
        raise ValueError(f"the chat template does not take this chat: {error}") from error


def plain_chats(value: Any) -> Any:
    """Chats whose messages and parts are objects, as dictionaries; images stay what they are.

    OpenAI's form of an image, ``image_url``, becomes transformers' own.
    """
    if isinstance(value, Mapping):
        if value.get("type") == "image_url" and "image_url" in value:
            image = plain_chats(value["image_url"])
            return {"type": "image", "url": image.get("url") if isinstance(image, dict) else image}
        return {key: plain_chats(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_chats(item) for item in value]
    if isinstance(getattr(value, "messages", None), list | tuple):  # a whole conversation
        return plain_chats(value.messages)
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in fields(value)}
    elif callable(getattr(value, "model_dump", None)):
        own = value.model_dump()
    else:
        return value
    # What is None was not said; templates ask whether it is there.
    return plain_chats({name: item for name, item in own.items() if item is not None})


def blocks(conversation: Any) -> Iterator[tuple[str, str, str]]:
    """(where, type, text) of all contents of a chat or a batch of chats, which are checked.

    Raises:
        TypeError: it is no list of messages.
        ValueError: a message, or a part of one, is not of the form that is known.
    """
    if not isinstance(conversation, list | tuple):
        raise TypeError(f"conversation: expected a list of messages, got {kind_of(conversation)}")
    batched = bool(conversation) and isinstance(conversation[0], list | tuple)
    for c, chat in enumerate(conversation if batched else [conversation]):
        if not chat or not isinstance(chat, list | tuple):
            raise ValueError(f"conversation {c}: expected a list of messages, got {chat!r:.60}")
        for m, message in enumerate(chat):
            where = f"conversation {c}, message {m}" if batched else f"message {m}"
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(
                    f'{where}: expected {{"role": ..., "content": ...}}, got {message!r:.60}'
                )
            content = message.get("content")
            content = [] if content is None else content
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            if not isinstance(content, list | tuple):
                raise ValueError(f"{where}: expected a text or a list, got {content!r:.60}")
            for block in content:
                yield where, *_block(where, block)


def _block(where: str, block: Any) -> tuple[str, str]:
    kind = block.get("type") if isinstance(block, Mapping) else None
    if not isinstance(kind, str) or kind not in ("text", "image", "image_url"):
        raise ValueError(
            f'{where}: expected {{"type": "text", "text": ...}} or {{"type": "image", "image": '
            f"...}}, got {block!r:.60}"
        )
    text = "" if block.get("text") is None else block["text"]
    if not isinstance(text, str) or (kind == "text" and "text" not in block):
        raise ValueError(f"{where}: expected a text in 'text', got {block!r:.60}")
    return kind, text
