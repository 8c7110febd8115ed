"""Questions with reference answers, from the same rows that training takes.

The forms of a row are in :mod:`hrvlm.data.rows`. Each turn is a question that is asked with the
turns before it (and their reference answers) in the conversation. In place of "assistant" or
"answer" there may be "answers", a list: those of several people.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data.config import FineVision, JsonL, Parquet, SourceConfig
from ..data.rows import (
    IMAGE_MARKER,
    check_markers,
    images_of,
    messages_of,
    plain_row,
    records_of,
    system_of,
    text_of,
    turns_of,
)
from ..data.sources import open_source


@dataclass(frozen=True)
class Question:
    """One question about images.

    Attributes:
        key: "row" or, in a conversation of several turns, "row.turn"; counted from 0.
        images: Paths or bytes of files, not opened yet.
        turns: (user, assistant) of the turns before, and of this one with its first reference.
        references: Right answers: one, or those of several people.
        problem: Why it can't be asked, if so.
        system: A text before all turns.
    """

    key: str
    images: tuple[Any, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    references: tuple[str, ...] = ()
    problem: str | None = None
    system: str | None = None

    @property
    def prompt(self) -> str:
        """The user's text."""
        return self.turns[-1][0]

    def conversation(self, images: Sequence[Any]) -> list[dict[str, Any]]:
        """The messages up to this question, with the images opened."""
        return messages_of(images, self.turns, self.system)[:-1]


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
        i = None
        for i, (_, row) in enumerate(source.rows(seed=0, epoch=0, shard=0, shards=1)):
            try:
                yield from questions_of(i, row)
            except ValueError as error:
                if i == 0:
                    raise ValueError(f"{self.data}: row 0: {error}") from error
                yield Question(str(i), problem=str(error))
        if i is None:
            raise ValueError(f"{self.data}: it has no rows")

    def _config(self) -> SourceConfig:
        root = None if self.image_root is None else str(self.image_root)
        if self.data.endswith(".jsonl"):
            return JsonL(self.data, root, shuffle=False)
        if self.data.endswith(".parquet"):
            return Parquet(self.data, streaming=True, shuffle=False, image_root=root)
        return FineVision(
            self.data,
            streaming=True,
            shuffle=False,
            image_root=root,
            name=self.name,
            split=self.split,
        )


def questions_of(index: int, row: Any) -> list[Question]:
    """The questions of a row.

    Raises:
        ValueError: it is in none of the forms.
    """
    row = plain_row(row)
    images, system = tuple(images_of(row)), system_of(row)
    texts, asked, answered = turns_of(row)
    turns: tuple[tuple[str, str], ...] = ()
    found = []
    for t, turn in enumerate(texts):
        references = _references(t, turn, answered)
        turns = (*turns, (text_of(t, turn, asked), references[0]))
        key = f"{index}.{t}" if len(texts) > 1 else str(index)
        found.append(Question(key, images, turns, references, system=system))
    check_markers(len(images), [user for user, _ in turns])
    marks = [sum(user.count(IMAGE_MARKER) for user, _ in q.turns) for q in found]
    if not marks[-1]:
        return found
    # A question knows the images up to it only.
    return [replace(q, images=images[:mark]) for q, mark in zip(found, marks, strict=True)]


def _references(index: int, turn: Any, single: str) -> tuple[str, ...]:
    answers = turn.get("answers") if isinstance(turn, Mapping) else None
    if answers is None:
        return (text_of(index, turn, single),)
    # VQAv2's own files have {"answer": ..., "answer_confidence": ...} for each person.
    said = [
        answer.get("answer") if isinstance(answer, Mapping) else answer
        for answer in records_of(f"turn {index}: answers", answers)
    ]
    texts = tuple(text for text in said if isinstance(text, str))
    if not texts or len(texts) < len(said):
        raise ValueError(f"turn {index}: expected texts in 'answers', got {answers!r:.60}")
    return texts
