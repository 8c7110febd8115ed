r"""The rows of a data set, which training and evaluation both take.

A row is in the form of FineVision, has one question and answer, or is a chat, as LLaVA writes one
or as transformers does:

    {"images": [...], "texts": [{"user": "What is it?", "assistant": "A cat"}, ...]}
    {"image": ..., "question": "What is it?", "answer": "A cat"}
    {"image": ..., "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                     {"from": "gpt", "value": "A cat"}, ...]}
    {"messages": [{"role": "user", "content": [{"type": "image", "image": ...},
                                               {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": "A cat"}, ...]}

The images stand in front of the first question, or where the users' texts have ``<image>``, if they
have it as many times as there are images. In ``messages`` an image may stand in the content, or
``{"type": "image"}`` there for the next one of ``images``. ``system`` is a text before all turns.

An image is whatever :func:`hrvlm.images.intake.load_image` takes, an object with its ``bytes``,
``path`` or ``url``, a data URI, base64, or a URL where those are fetched
(:func:`hrvlm.images.fetch.readable`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..images.fetch import unwrapped

IMAGE_MARKER = "<image>"

Row = Mapping[str, Any]

_CHATS = ("messages", "conversations")
_FORMS = "'texts', 'question' and 'answer', 'conversations', or 'messages'"
_ROLES = {"human": "user", "gpt": "assistant"}
_SOURCES = ("image", "path", "url", "base64", "image_url")


def plain_row(row: Any) -> Row:
    """The row with its chat, if it is one, as ``texts``, ``system`` and ``images`` in order.

    Raises:
        ValueError: it is no object, in none of the forms, or its chat is not turns of a user and
            an assistant; or it is itself the error of reading it.
    """
    _check_object(row)
    name = next((name for name in _CHATS if row.get(name) is not None), None)
    if row.get("texts") is not None or row.get("question") is not None or name is None:
        if row.get("texts") is None and "question" not in row:
            raise ValueError(f"expected {_FORMS}, got {sorted(map(str, row))!r:.200}")
        return row
    given = images_of(row)
    waiting = iter(given)
    images: list[Any] = []
    said = [
        _message(name, i, message, waiting, images)
        for i, message in enumerate(records_of(name, row[name]))
    ]
    left = [*waiting]
    if left and images:
        raise ValueError(f"{len(given)} images, but {len(images)} places for one in the texts")
    system = "\n".join(text for role, text in said if role == "system")
    turns = [(role, text) for role, text in said if role != "system"]
    expected = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if not turns or len(turns) % 2 or [role for role, _ in turns] != expected:
        raise ValueError(
            f"{name}: expected turns of a user and an assistant, got {[role for role, _ in said]}"
        )
    pairs = zip(turns[::2], turns[1::2], strict=True)
    texts = [{"user": user, "assistant": answer} for (_, user), (_, answer) in pairs]
    others = {key: value for key, value in row.items() if key not in (*_CHATS, "image")}
    return (
        others | {"images": images or left, "texts": texts} | ({"system": system} if system else {})
    )


def _check_object(row: Any) -> None:
    if isinstance(row, ValueError):  # of reading it
        raise row
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object, got {type(row).__name__}")


def _message(
    name: str, index: int, message: Any, waiting: Any, images: list[Any]
) -> tuple[str, str]:
    """Role and text of one message, with a marker for each of its images, which are added."""
    where = f"{name}: message {index}"
    message = message if isinstance(message, Mapping) else {}
    role = message.get("from") if message.get("role") is None else message["role"]
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or role not in ("system", "user", "assistant"):
        raise ValueError(f"{where}: expected a user, an assistant or system, got {role!r:.60}")
    content = message.get("content")
    content = message.get("value") if content is None else content
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list | tuple):
        raise ValueError(f"{where}: expected a text or a list of contents, got {content!r:.60}")
    parts = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, Mapping) else None
        text = block.get("text") if kind == "text" else None
        if kind in ("image", "image_url"):
            own = next((block[key] for key in _SOURCES if block.get(key) is not None), None)
            if isinstance(own, Mapping) and "url" in own:
                own = own["url"]
            images.append(next(waiting, None) if own is None else own)
            parts.append(IMAGE_MARKER)
        elif isinstance(text, str):
            if role == "user":
                images += [next(waiting, None) for _ in range(text.count(IMAGE_MARKER))]
            parts.append(text)
        else:
            raise ValueError(f"{where}: expected a text or an image, got {block!r:.60}")
    if any(image is None for image in images):
        raise ValueError(f"{where}: it has a place for an image, and no image is left")
    if role != "user" and IMAGE_MARKER in "".join(parts):
        raise ValueError(f"{where}: an image of {role}, expected images of users only")
    return role, "".join(parts)


def images_of(row: Any) -> list[Any]:
    """The images of a row, not opened: what `load_image` takes.

    Raises:
        ValueError: the row is no object, or its images are no list.
    """
    _check_object(row)
    images = row.get("images")
    if images is None:
        image = row.get("image")  # LLaVA has several there, too
        images = image if isinstance(image, list) else [] if image is None else [image]
    if not isinstance(images, list | tuple):
        raise ValueError(f"images: expected a list, got {type(images).__name__}")
    return [unwrapped(image) for image in images]


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


def system_of(row: Mapping[str, Any]) -> str | None:
    """The text before all turns.

    Raises:
        ValueError: it is no text.
    """
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"system: expected a text, got {system!r:.60}")
    return system or None


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


def messages_of(
    images: Sequence[Any], turns: Sequence[tuple[str, str]], system: str | None = None
) -> list[dict[str, Any]]:
    """The chat of turns (user, assistant), with the images where they stand.

    Raises:
        ValueError: the texts mark places for more or fewer images.
    """
    check_markers(len(images), [user for user, _ in turns])
    marked = any(IMAGE_MARKER in user for user, _ in turns)
    waiting = iter(images)
    messages: list[dict[str, Any]] = []
    if system:
        messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
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
