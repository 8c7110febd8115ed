"""The rows of a data set, which training and evaluation both take.

A row is in the form of FineVision, or has one question and answer:

    {"images": [...], "texts": [{"user": "What is it?", "assistant": "A cat"}, ...]}
    {"image": ..., "question": "What is it?", "answer": "A cat"}

The images stand in front of the first question, or where the users' texts have ``<image>``, if they
have it as many times as there are images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

IMAGE_MARKER = "<image>"

Row = Mapping[str, Any]


def images_of(row: Any) -> list[Any]:
    """The images of a row, not opened: what `load_image` takes.

    Raises:
        ValueError: the row is no object, or its images are no list.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    images = row.get("images")
    if images is None:
        images = [] if row.get("image") is None else [row["image"]]
    if not isinstance(images, list | tuple):
        raise ValueError(f"images: expected a list, got {type(images).__name__}")
    # datasets' undecoded images are {"bytes": ..., "path": ...}.
    return [
        (i.get("path") if i.get("bytes") is None else i["bytes"]) if isinstance(i, Mapping) else i
        for i in images
    ]


def turns_of(row: Mapping[str, Any]) -> tuple[list[Any], str, str]:
    """The turns of a row, and the names of a turn's question and answer.

    Raises:
        ValueError: there are none.
    """
    if row.get("texts") is None:
        return [row], "question", "answer"
    turns = records_of("texts", row["texts"])
    if not turns:
        raise ValueError("texts: no turns")
    return turns, "user", "assistant"


def records_of(name: str, value: Any) -> list[Any]:
    """A column's list of records; older `datasets` write one as a record of lists.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, list | tuple):
        return list(value)
    if not isinstance(value, Mapping) or not all(isinstance(v, list) for v in value.values()):
        raise ValueError(f"{name}: expected a list, got {value!r:.60}")
    if len({len(column) for column in value.values()}) > 1:
        raise ValueError(f"{name}: expected lists of one length, got {value!r:.60}")
    return [dict(zip(value, record, strict=True)) for record in zip(*value.values(), strict=True)]


def text_of(index: int, turn: Any, name: str) -> str:
    """One text of turn `index`.

    Raises:
        ValueError: it is not there, or is no text.
    """
    text = turn.get(name) if isinstance(turn, Mapping) else None
    if not isinstance(text, str):
        raise ValueError(f"turn {index}: expected a text in {name!r}, got {text!r:.60}")
    return text


def check_markers(count: int, users: Sequence[str]) -> None:
    """Raise ValueError unless the users' texts mark no place for an image, or one for each."""
    marked = sum(user.count(IMAGE_MARKER) for user in users)
    if marked not in (0, count):
        raise ValueError(f"{count} images, but {marked} times {IMAGE_MARKER} in the texts")


def messages_of(images: Sequence[Any], turns: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """The chat of turns (user, assistant), with the images where they stand.

    Raises:
        ValueError: the texts mark places for more or fewer images.
    """
    check_markers(len(images), [user for user, _ in turns])
    marked = any(IMAGE_MARKER in user for user, _ in turns)
    waiting = iter(images)
    messages: list[dict[str, Any]] = []
    for t, (user, assistant) in enumerate(turns):
        content = [] if marked or t else [_image(image) for image in images]
        for k, text in enumerate(user.split(IMAGE_MARKER)):
            content += [_image(next(waiting))] if k else []
            content += [{"type": "text", "text": text}] if text else []
        answer = [{"type": "text", "text": assistant}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _image(image: Any) -> dict[str, Any]:
    return {"type": "image", "image": image}
