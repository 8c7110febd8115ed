"""From a row of a data set to a sample to train on: images opened, chat rendered, answers labelled.

The forms of a row are in :mod:`hrvlm.data.rows`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.rows import images_of, messages_of, plain_row, system_of, text_of, turns_of
from ..files import write_text
from ..images.fetch import readable
from ..images.geometry import positive_int
from ..images.intake import load_image
from ..vlm.answers import tokens_of
from ..vlm.placeholders import IGNORE_INDEX

SKIPS_FILE, REPORT_FILE = "skipped.jsonl", "data_report.json"
_BAD_IMAGE, _BAD_ROW, _TOO_LONG, _NO_ANSWER = "bad image", "bad row", "too long", "no answer"
_GIVE_UP_AFTER = 1000


class SkippedError(Exception):
    """A row that is left out; `reason` is the kind, the message the details."""

    def __init__(self, reason: str, details: str):
        super().__init__(details)
        self.reason = reason


class SampleMaker:
    """Turns rows into samples; the rows that can't be used are written to a file and left out.

    Args:
        processor: The model's :class:`~hrvlm.vlm.processors.VLMProcessor`, with a fast tokenizer.
        max_length: Longest sample, in tokens; None for any.
        report: Directory for the list of what was left out; None for no list.
        fetch: Whether images that are URLs are fetched.

    Raises:
        ValueError: the tokenizer can't tell which characters a token stands for.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        report: Path | None = None,
        *,
        fetch: bool = False,
    ):
        if not processor.tokenizer.is_fast:
            raise ValueError(
                "processor: its tokenizer is not a fast one, which the labels need: they are on "
                "the tokens of the answers' characters"
            )
        if max_length is not None:
            positive_int("max_sample_length", max_length)
        self.processor = processor
        self.max_length = max_length
        self.report = report
        self.fetch = fetch
        self._skipped_in_a_row = 0

    def __call__(self, row: Mapping[str, Any], where: str) -> dict[str, Tensor] | None:
        """``input_ids`` and ``labels`` [L], with ``pixel_values`` and ``image_grid_hw`` if any.

        Args:
            row: In a form of :mod:`hrvlm.data.rows`.
            where: The row's name in the report.

        Returns:
            The sample, or None where it was left out.

        Raises:
            ValueError: so many rows were left out one after the other that none may be left.
        """
        try:
            sample = self._sample(row)
        except SkippedError as skip:
            self._write(skip.reason, where, str(skip))
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= _GIVE_UP_AFTER:
                raise ValueError(
                    f"{self._skipped_in_a_row} rows one after the other could not be used; "
                    f"the last: {where}: {skip.reason}: {skip}"
                ) from skip
            return None
        self._skipped_in_a_row = 0
        return sample

    def _sample(self, row: Mapping[str, Any]) -> dict[str, Tensor]:
        try:
            row = plain_row(row)
            images, turns = images_of(row), _question_and_answer(row)
            opened = [self._opened(i, image) for i, image in enumerate(images)]
            pieces = self.processor.chat_pieces(messages_of(opened, turns, system_of(row)))
        except ValueError as error:
            raise SkippedError(_BAD_ROW, str(error)) from error
        sample, strings = {}, iter(())
        if opened:
            prepared, *_ = self.processor.prepare_inputs_layout(images=opened)
            pixels = self.processor.image_processor(prepared, return_tensors="pt")
            sample = {name: pixels[name] for name in ("pixel_values", "image_grid_hw")}
            strings = (self.processor.replace_image_token(pixels, i) for i in range(len(opened)))
        processor = self.processor
        tokens, said = tokens_of(processor.tokenizer, pieces, processor.image_token, strings)
        ids = torch.tensor(tokens)
        labels = ids.where(torch.tensor(said, dtype=torch.bool), IGNORE_INDEX)
        if self.max_length is not None and len(ids) > self.max_length:
            raise SkippedError(_TOO_LONG, f"{len(ids)} tokens, above {self.max_length}")
        if not labels[1:].ne(IGNORE_INDEX).any():
            raise SkippedError(_NO_ANSWER, "no token of an answer to learn from")
        return {"input_ids": ids, "labels": labels, **sample}

    def _opened(self, index: int, image: Any) -> Any:
        try:
            image = readable(image, "it", fetch=self.fetch)
            return load_image(image, **self.processor.reading_options())
        except (ValueError, OSError, TypeError) as error:
            raise SkippedError(_BAD_IMAGE, f"image {index}: {error}") from error

    def _write(self, reason: str, where: str, details: str) -> None:
        """Append a line; one write, so that the lines of several processes do not mix."""
        if self.report is None:
            return
        self.report.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"reason": reason, "row": where, "details": details}) + "\n"
        with open(self.report / SKIPS_FILE, "ab", buffering=0) as file:
            file.write(line.encode())


def write_report(directory: Path, most: int = 1000) -> dict[str, Any]:
    """Sum up what was left out, in ``data_report.json``.

    A row that was met again (in a later epoch, or after a resume) counts once.

    Args:
        directory: The `report` of the SampleMaker.
        most: So many rows are named at most.

    Returns:
        ``{"skipped": {reason: number of rows}, "rows": [{"reason", "row", "details"}]}``.
    """
    rows: dict[str, dict[str, str]] = {}
    path = directory / SKIPS_FILE
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            rows[entry["row"]] = entry
    counts = Counter(entry["reason"] for entry in rows.values())
    report = {"skipped": dict(counts), "rows": list(rows.values())[:most]}
    write_text(directory / REPORT_FILE, json.dumps(report, indent=2) + "\n")
    return report


def _question_and_answer(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    turns, user, assistant = turns_of(row)
    return [(text_of(t, turn, user), text_of(t, turn, assistant)) for t, turn in enumerate(turns)]
