"""What the shipped reader's own probabilities say about pictures with and without text.

    python -m recipes.reader.doubts           (--card-only: from the last results)

Asks, as `hrvlm generate` does but in float32 and for several pictures at once, about drawn text
that the reader has not seen, and about pictures that it can't read: crops of a photograph, noise,
smooth and plain colours, text on its side, upside down and blurred, whole pages. For each answer it
keeps the mean log-probability by token and whether it repeats itself (`hrvlm.inference.doubts`).
Writes benchmarks/results/reading_doubts.json, and from it the table in the reader's card.

`DOUBT_BELOW` was chosen on another draw (seed 2 000 000): of 255 answers with at most a tenth of
the characters wrong, 3 lie below -0.2 and none below -0.3; of 193 pictures without anything to
read, 186 and 168. The longest run of a repeated block in those 255 was 7 tokens, and in all texts
that were drawn; the rule asks for 20.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter

from benchmarks.reporting.tables import fill
from benchmarks.suite import commit_here
from hrvlm.drawn_text.drawing import NEW_FONT, TextImage, render
from hrvlm.files import write_text
from hrvlm.images.intake import load_image
from hrvlm.inference.chat import GenerateOptions, chat_inputs, decoding, load_vlm, user_message
from hrvlm.inference.doubts import doubts
from hrvlm.inference.text_metrics import edit_distance
from hrvlm.machine import describe_device, pick_device
from hrvlm.reader.model import DOUBT_BELOW, PROMPT, reader_path
from hrvlm.reader.score import HELD_OUT
from recipes.reader.score import CARD

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reading_doubts.json"
START, END = "<!-- doubts:start -->", "<!-- doubts:end -->"
SEED = 3_000_000
_BATCH = 16
_SIZES = [(32, 128), (48, 160), (64, 256), (128, 256), (160, 160), (96, 300)]  # height, width
_WRONG = {"right": 0.1, "partly right": 0.5}  # characters wrong, at most


class Asked(NamedTuple):
    """A picture, its kind, and what is written on it if the reader could know."""

    kind: str
    image: Image.Image
    text: str | None


def pictures(small: bool = False) -> Iterator[Asked]:
    """All of them, the same on every machine."""
    line, full = HELD_OUT["line"], HELD_OUT["full"]
    new_font = dataclasses.replace(line, fonts=(NEW_FONT,))
    for options, count in ((line, 120), (new_font, 40), (full, 64)):
        for sample in _drawn(options, 4 if small else count):
            yield Asked("drawn text", sample.image, sample.text)
    rng = np.random.default_rng(SEED)
    photo = load_image(ROOT / "examples" / "photo.jpg")
    for i in range(2 if small else 24):
        yield Asked("crops of a photograph", _crop(photo, *_SIZES[i % 6], rng), None)
    for i in range(2 if small else 8):
        pixels = rng.integers(0, 256, (*_SIZES[i % 6], 3), dtype=np.uint8)
        yield Asked("noise", Image.fromarray(pixels), None)
    for i in range(2 if small else 12):
        pixels = rng.integers(0, 256, (4, 8, 3), dtype=np.uint8)
        height, width = _SIZES[i % 6]
        smooth = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        yield Asked("smooth or plain colours", smooth, None)
        plain = Image.new("RGB", (width, height), tuple(int(v) for v in pixels[0, 0]))
        yield Asked("smooth or plain colours", plain, None)
    for sample in _drawn(line, 2 if small else 24, first=10_000):
        turned = sample.image.transpose(Image.Transpose.ROTATE_90)
        yield Asked("a line of text on its side", turned, None)
        around = sample.image.transpose(Image.Transpose.ROTATE_180)
        yield Asked("a line of text upside down", around, None)
        blurred = sample.image.filter(ImageFilter.GaussianBlur(4))
        yield Asked("a line of text, blurred", blurred, None)
    for name in () if small else ("document", "dashboard", "receipt"):
        page = load_image(ROOT / "examples" / f"{name}.png")
        reduced = page.resize((page.width // 3, page.height // 3))
        yield Asked("a whole page, reduced", reduced, None)


def _drawn(options: Any, count: int, first: int = 0) -> Iterator[TextImage]:
    return (render(SEED, first + i, options) for i in range(count))


def _crop(image: Image.Image, height: int, width: int, rng: np.random.Generator) -> Image.Image:
    y = int(rng.integers(0, image.height - height + 1))
    x = int(rng.integers(0, image.width - width + 1))
    return image.crop((x, y, x + width, y + height))


@torch.inference_mode()
def ask(processor: Any, vlm: Any, asked: Sequence[Asked]) -> Iterator[dict[str, Any]]:
    """Each answer's kind, mean log-probability and doubts, by size of the picture."""
    ordered = sorted(asked, key=lambda a: a.image.width * a.image.height)
    for first in range(0, len(ordered), _BATCH):
        batch = ordered[first : first + _BATCH]
        questions = [[user_message(PROMPT, [a.image])] for a in batch]
        inputs = chat_inputs(processor, questions).to(vlm.device)
        output = vlm.generate(
            **inputs,
            **decoding(GenerateOptions()),
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
        given = torch.stack(output.logits, 1).float().log_softmax(-1)
        given = given.gather(2, tokens[..., None])[..., 0]
        for one, ids, log_probabilities in zip(batch, tokens, given, strict=True):
            ends = (ids == processor.tokenizer.eos_token_id).nonzero()
            n = int(ends[0]) + 1 if len(ends) else len(ids)
            text = processor.tokenizer.decode(ids[:n], skip_special_tokens=True)
            mean = log_probabilities[:n].mean().item()
            found = doubts(ids[:n].tolist(), mean, DOUBT_BELOW)
            yield {"kind": _judged(one, text), "mean": mean, "doubts": [*found]}


def _judged(asked: Asked, answer: str) -> str:
    if asked.text is None:
        return asked.kind
    wrong = edit_distance(answer, asked.text) / max(1, len(asked.text))
    verdict = next((word for word, most in _WRONG.items() if wrong <= most), "wrong")
    return f"{asked.kind}, {verdict}"


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Counts and quantiles by kind, in order of appearance but for drawn text, which is first."""
    order = [f"drawn text, {verdict}" for verdict in (*_WRONG, "wrong")]
    kinds = dict.fromkeys([*order, *(row["kind"] for row in rows)])
    sets = []
    for kind in kinds:
        own = [row for row in rows if row["kind"] == kind]
        if own:
            low, middle, high = np.quantile([row["mean"] for row in own], (0.05, 0.5, 0.95))
            sets.append(
                {
                    "set": kind,
                    "answers": len(own),
                    "doubtful": sum(bool(row["doubts"]) for row in own),
                    "repeats": sum("repeats" in row["doubts"] for row in own),
                    "improbable": sum("improbable" in row["doubts"] for row in own),
                    "mean_log_probability": {"5%": low, "50%": middle, "95%": high},
                }
            )
    return sets


def table(report: dict[str, Any]) -> str:
    """The results as the card shows them."""
    head = [
        "| pictures | answers | doubtful | mean log-probability, 5 % to 95 % |",
        "|---|---|---|---|",
    ]
    rows = []
    for row in report["sets"]:
        low, high = (row["mean_log_probability"][key] for key in ("5%", "95%"))
        cells = row["set"], row["answers"], row["doubtful"], f"{low:.2f} to {high:.2f}"
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*head, *rows])


def fill_card(report: dict[str, Any]) -> None:
    """Put the table between the card's markers."""
    write_text(CARD, fill(CARD.read_text(encoding="utf-8"), table(report), START, END))


def main() -> None:
    """Ask about every picture, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="A few of each; writes nothing.")
    parser.add_argument("--card-only", action="store_true", help="Only write the card's table.")
    args = parser.parse_args()
    if args.card_only:
        fill_card(json.loads(RESULTS.read_text(encoding="utf-8")))
        return
    device = pick_device(None)
    processor, vlm = load_vlm(reader_path(), dtype="float32")
    rows = list(ask(processor, vlm, list(pictures(args.small))))
    machine = describe_device(device) | {"commit": commit_here()}
    report = {"machine": machine, "bound": DOUBT_BELOW, "sets": summary(rows)}
    print(table(report))
    if not args.small:
        write_text(RESULTS, json.dumps(report, indent=1) + "\n")
        fill_card(report)


if __name__ == "__main__":
    main()
