"""Ask a model all questions of a dataset and score the answers; a killed run goes on where it was.

Answers go to a file of JSON lines, a batch at a time. What the run was (model, data, decoding) is
in a file beside it, so that answers of different runs never mix.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from ..files import folder_for_results, write_text
from ..images.fetch import readable
from ..images.geometry import positive_int
from ..images.intake import ImageError, load_image
from .chat import GenerateOptions, answer_batch, load_vlm
from .questions import DataSource, Question
from .text_metrics import (
    MIN_VQA_ANSWERS,
    edit_distance,
    exact_match,
    nearest_reference,
    vqa_accuracy,
)

RUN_SUFFIX = ".run.json"


@dataclass(frozen=True)
class EvaluateOptions:
    """How the questions are asked."""

    batch_size: int = 8
    max_new_tokens: int = 256
    num_beams: int = 1
    limit: int | None = None  # ask only the first so many questions
    fetch: bool = False  # whether images that are URLs are fetched

    def __post_init__(self) -> None:
        """Refuse what can't be run, before a model is loaded."""
        positive_int("batch_size", self.batch_size)
        if self.limit is not None:
            positive_int("limit", self.limit)
        self.decoding()

    def decoding(self) -> GenerateOptions:
        """Greedy or beams: the same answers every time."""
        return GenerateOptions(self.max_new_tokens, 0.0, self.num_beams)


@dataclass(frozen=True)
class Scores:
    """What the answers of a file are worth; rates are None where nothing can be said.

    Attributes:
        questions: Asked or not.
        answered: Questions that have an answer.
        cer: Character error rate of all answers, against the nearest reference of each.
        characters: Length of those references.
        exact_match: Share of answers that are a reference.
        vqa_accuracy: Mean over the questions with enough people's answers.
        vqa_questions: How many these are.
        bad: Key and reason of each question that could not be asked.
    """

    questions: int
    answered: int
    cer: float | None
    characters: int
    exact_match: float | None
    vqa_accuracy: float | None
    vqa_questions: int
    bad: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"bad": [{"id": key, "reason": why} for key, why in self.bad]}


def evaluate(
    model: str,
    source: DataSource,
    out: Path,
    options: EvaluateOptions | None = None,
    *,
    device: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    on_questions: Callable[[int], None] = lambda _: None,
) -> Scores:
    """Answer what is not answered yet, and score all answers.

    Args:
        model: Directory (or hub id) of a VisionLanguageModel with its processor.
        source: The questions.
        out: File of JSON lines to write or to go on with.
        options: How to ask.
        device: Default: the GPU if there is one, else the CPU.
        dtype: "float32", "bfloat16", or "auto" for the checkpoint's.
        overwrite: Begin again.
        on_questions: Told how many questions were dealt with since its last call.

    Raises:
        ValueError: `out` holds answers of another run, the first row is in no known form, or the
            model can't be loaded.
        OSError: the data can't be read.
    """
    options = options or EvaluateOptions()
    run = {
        "model": model,
        "weights": _modified(Path(model)),
        "dtype": dtype,
        "data": source.data,
        "data_modified": _modified(Path(source.data)),
        "name": source.name,
        "split": source.split,
        "max_new_tokens": options.max_new_tokens,
        "num_beams": options.num_beams,
    }
    batches = _batches(islice(source.questions(), options.limit), options.batch_size)
    first = next(batches)  # bad data, or a bad model, costs no answers that are there
    processor = vlm = None
    if overwrite:
        processor, vlm = load_vlm(model, device=device, dtype=dtype)
        out.unlink(missing_ok=True)
    keys: set[str] = set()
    with _claimed(out, run) as done, open(out, "a", encoding="utf-8") as file:
        for batch in chain([first], batches):
            keys.update(question.key for question in batch)
            waiting = [question for question in batch if question.key not in done]
            if waiting and vlm is None:
                processor, vlm = load_vlm(model, device=device, dtype=dtype)
            lines = answer(processor, vlm, waiting, options.decoding(), options.fetch)
            write_predictions(file, lines)
            on_questions(len(batch))
    return score(line for line in read_predictions(out) if line["id"] in keys)


def answer(
    processor: Any,
    vlm: Any,
    questions: list[Question],
    decoding: GenerateOptions,
    fetch: bool = False,
) -> list[dict[str, Any]]:
    """One line of the file for each question: its answer and scores, or why there is none."""
    lines: dict[str, dict[str, Any]] = {}
    asked, conversations = [], []
    for question in questions:
        if question.problem is not None:
            lines[question.key] = {"id": question.key, "error": question.problem}
            continue
        try:
            images = [_opened(processor, question, i, fetch) for i in range(len(question.images))]
        except (ImageError, OSError, TypeError) as error:
            lines[question.key] = {"id": question.key, "error": _image_error(error)}
        else:
            asked.append(question)
            conversations.append(question.conversation(images))
    answers = _answers(processor, vlm, conversations, decoding)
    for question, text in zip(asked, answers, strict=True):
        if isinstance(text, ValueError):
            lines[question.key] = {"id": question.key, "error": str(text)}
        else:
            lines[question.key] = _scored(question, text)
    return [lines[question.key] for question in questions]


def _answers(
    processor: Any, vlm: Any, conversations: list[Any], decoding: GenerateOptions
) -> list[str | ValueError]:
    """The answers of a batch; if the model refuses it, each by itself, to find who is to blame."""
    try:
        return list(answer_batch(processor, vlm, conversations, decoding))
    except ValueError as error:
        if len(conversations) == 1:
            return [error]
    return [_answers(processor, vlm, [c], decoding)[0] for c in conversations]


def _opened(processor: Any, question: Question, index: int, fetch: bool) -> Any:
    source, label = question.images[index], f"row {question.key}, image {index}"
    name = None if isinstance(source, Path) else label
    return load_image(
        readable(source, label, fetch=fetch), name=name, **processor.reading_options()
    )


def _image_error(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _scored(question: Question, text: str) -> dict[str, Any]:
    nearest = nearest_reference(text, question.references)
    enough = len(question.references) >= MIN_VQA_ANSWERS
    return {
        "id": question.key,
        "question": question.prompt,
        "prediction": text,
        "references": list(question.references),
        "edits": edit_distance(nearest, text),
        "characters": len(nearest),
        "exact_match": exact_match(text, question.references),
        "vqa_accuracy": vqa_accuracy(text, question.references) if enough else None,
    }


def claim(out: Path, run: dict[str, Any]) -> None:
    """Note what run the answers in `out` are of, or check that it is the one that goes on.

    Raises:
        ValueError: they are of another run, or nothing says of which.
    """
    beside = out.with_name(out.name + RUN_SUFFIX)
    if out.exists() and out.stat().st_size:
        if not beside.exists():
            raise ValueError(f"{out} has content, but no {beside.name} says of which run")
        before = json.loads(beside.read_text(encoding="utf-8"))
        if changed := sorted(k for k in run.keys() | before.keys() if run.get(k) != before.get(k)):
            differences = ", ".join(f"{k} {before.get(k)!r}, now {run.get(k)!r}" for k in changed)
            raise ValueError(
                f"{out} holds answers of another run ({differences}); "
                "choose another file, or overwrite it"
            )
        return
    write_text(beside, json.dumps(run, indent=2) + "\n")


@contextmanager
def _claimed(out: Path, run: dict[str, Any]) -> Iterator[set[str]]:
    """The keys that are answered; if the block fails before there are any, nothing is left."""
    with folder_for_results(out.parent):
        claim(out, run)
        try:
            yield {line["id"] for line in read_predictions(out)}
        except BaseException:
            if not read_predictions(out):
                out.unlink(missing_ok=True)
                out.with_name(out.name + RUN_SUFFIX).unlink(missing_ok=True)
            raise


def read_predictions(out: Path) -> list[dict[str, Any]]:
    """The lines of the file; a last one without its end, left by a kill, is cut off.

    Raises:
        ValueError: a line before the last is no JSON object with an "id".
    """
    if not out.exists():
        return []
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(out, len(whole))
    lines = []
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(text)
            line["id"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{out}, line {number}: no prediction: {text[:60]!r}") from error
        lines.append(line)
    return lines


def write_predictions(file: TextIO, lines: Iterable[dict[str, Any]]) -> None:
    """Append lines, and hand them to the operating system."""
    file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    file.flush()


def score(lines: Iterable[dict[str, Any]]) -> Scores:
    """Sum up the lines of a file."""
    everything = list(lines)
    answered = [line for line in everything if "error" not in line]
    characters = sum(line["characters"] for line in answered)
    vqa = [line["vqa_accuracy"] for line in answered if line["vqa_accuracy"] is not None]
    return Scores(
        questions=len(everything),
        answered=len(answered),
        cer=sum(line["edits"] for line in answered) / characters if characters else None,
        characters=characters,
        exact_match=_mean([line["exact_match"] for line in answered]),
        vqa_accuracy=_mean(vqa),
        vqa_questions=len(vqa),
        bad=tuple((line["id"], line["error"]) for line in everything if "error" in line),
    )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _batches(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    remaining = iter(questions)
    while batch := list(islice(remaining, size)):
        yield batch


def _modified(path: Path) -> int | None:
    """When a file, or the weights in a directory, last changed, in ns; None for a hub id."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return max((file.stat().st_mtime_ns for file in files if file.is_file()), default=None)
