"""Questions with reference answers, from the same rows that training takes.

A row (see :mod:`hrvlm.training_samples`) is in the form of FineVision,

    {"images": [...], "texts": [{"user": "What is it?", "assistant": "A cat"}, ...]}

where each turn is a question that is asked with the turns before it (and their reference answers)
in the conversation, or it is one question:

    {"image": ..., "question": "What is it?", "answer": "A cat"}

In place of "assistant" or "answer" there may be "answers", a list: those of several people.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .training_config import FineVision, JsonL, Parquet, SourceConfig
from .training_samples import IMAGE_MARKER
from .training_sources import open_source


@dataclass(frozen=True)
class Question:
    """One question about images.

    Attributes:
        key: "row" or, in a conversation of several turns, "row.turn"; counted from 0.
        images: Paths or bytes of files, not opened yet.
        turns: (user, assistant) of the turns before, and of this one with its first reference.
        references: Right answers: one, or those of several people.
        problem: Why it can't be asked, if so.
    """

    key: str
    images: tuple[Any, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    references: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def prompt(self) -> str:
        """The user's text."""
        return self.turns[-1][0]

    def conversation(self, images: Sequence[Any]) -> list[dict[str, Any]]:
        """The messages up to this question, with the images opened.

        They stand where the texts have ``<image>``, or in front of the first.
        """
        users = [user for user, _ in self.turns]
        marked = any(IMAGE_MARKER in user for user in users)
        waiting = iter(images)
        messages: list[dict[str, Any]] = []
        for t, (user, assistant) in enumerate(self.turns):
            content = [] if marked or t else [_image(image) for image in images]
            for k, text in enumerate(user.split(IMAGE_MARKER)):
                content += [_image(next(waiting))] if k else []
                content += [{"type": "text", "text": text}] if text else []
            answer = [{"type": "text", "text": assistant}]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": answer})
        return messages[:-1]


@dataclass(frozen=True)
class DataSource:
    """Where the questions are.

    Attributes:
        data: A .jsonl or .parquet file, a directory that `datasets` wrote or can load, or a hub id.
        image_root: Folder that relative paths of images start from; default: that of a .jsonl file.
        name: Configuration of the dataset, for `datasets`.
        split: Split of the dataset; a file has one only.
    """

    data: str
    image_root: Path | None = None
    name: str | None = None
    split: str = "train"

    def questions(self) -> Iterator[Question]:
        """All questions, in order, one row in memory at a time.

        A row that is in none of the forms comes as a question with a `problem`.

        Raises:
            ValueError: there are no rows, or the first one is in none of the forms.
            OSError: there is no such file or dataset.
        """
        source = open_source(self._config())
        for i, (_, row) in enumerate(source.rows(seed=0, epoch=0, shard=0, shards=1)):
            try:
                yield from questions_of(i, row)
            except ValueError as error:
                if i == 0:
                    raise ValueError(f"{self.data}: row 0: {error}") from error
                yield Question(str(i), problem=str(error))

    def _config(self) -> SourceConfig:
        root = None if self.image_root is None else str(self.image_root)
        if self.data.endswith(".jsonl"):
            return JsonL(self.data, root, shuffle=False)
        if self.data.endswith(".parquet"):
            return Parquet(self.data, streaming=True, shuffle=False, image_root=root)
        return FineVision(
            self.data, self.name, self.split, streaming=True, shuffle=False, image_root=root
        )


def questions_of(index: int, row: Any) -> list[Question]:
    """The questions of a row.

    Raises:
        ValueError: it is in none of the forms at the top of this file.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    images = _images_of(row)
    texts, names = row.get("texts"), ("user", "assistant")
    if texts is None:
        texts, names = [row], ("question", "answer")
    turns: tuple[tuple[str, str], ...] = ()
    found = []
    for t, turn in enumerate(texts):
        references = _references(turn, names[1])
        turns = (*turns, (_text(turn, names[0]), references[0]))
        key = f"{index}.{t}" if len(texts) > 1 else str(index)
        found.append(Question(key, images, turns, references))
    if not found:
        raise ValueError("texts: no turns")
    marks = [sum(user.count(IMAGE_MARKER) for user, _ in q.turns) for q in found]
    if not marks[-1]:
        return found
    if marks[-1] != len(images):
        raise ValueError(f"{len(images)} images, but {marks[-1]} times {IMAGE_MARKER} in the texts")
    # A question knows the images up to it only.
    return [replace(q, images=images[:mark]) for q, mark in zip(found, marks, strict=True)]


def _image(image: Any) -> dict[str, Any]:
    return {"type": "image", "image": image}


def _images_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    images = row.get("images")
    if images is None:
        images = [] if row.get("image") is None else [row["image"]]
    if not isinstance(images, list | tuple):
        raise ValueError(f"images: expected a list, got {type(images).__name__}")
    return tuple(
        (i.get("path") if i.get("bytes") is None else i["bytes"]) if isinstance(i, Mapping) else i
        for i in images
    )


def _text(turn: Any, name: str) -> str:
    value = turn.get(name) if isinstance(turn, Mapping) else None
    if not isinstance(value, str):
        raise ValueError(f"expected a text in {name!r}, got {value!r:.60}")
    return value


def _references(turn: Any, single: str) -> tuple[str, ...]:
    answers = turn.get("answers") if isinstance(turn, Mapping) else None
    if answers is None:
        return (_text(turn, single),)
    # VQAv2's own files have {"answer": ..., "answer_confidence": ...} for each person.
    said = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]
    texts = tuple(text for text in said if isinstance(text, str))
    if not texts or len(texts) < len(said):
        raise ValueError(f"expected texts in 'answers', got {answers!r:.60}")
    return texts
