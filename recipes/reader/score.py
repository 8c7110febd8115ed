"""How well the reader that comes with hrvlm reads, on samples it has not seen.

    python -m recipes.reader.score            (--card-only: from the last results)

Character error rates on single lines (the kind that it was trained for), on every layout of the
full distribution (8 to 40 pixels, up to 40 characters a line), and on a font that it has never
seen. Writes benchmarks/results/reader.json, and from it the table in the reader's card.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting.tables import fill
from benchmarks.suite import commit_here
from hrvlm import VisionLanguageModel, VLMProcessor
from hrvlm.drawn_text.drawing import NEW_FONT
from hrvlm.files import write_text
from hrvlm.machine import describe_device, pick_device
from hrvlm.reader.model import reader_path
from hrvlm.reader.score import HELD_OUT, score

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reader.json"
CARD = ROOT / "hrvlm" / "assets" / "reader" / "README.md"
START, END = "<!-- figures:start -->", "<!-- figures:end -->"
KINDS = {
    "line": "single lines, up to 20 characters, 14 to 32 px, the fonts of training",
    "line, new font": "the same in a font that it has not seen",
    "full: line": "single lines of up to 40 characters, 8 to 40 px",
    "full: lines": "several lines, 8 to 40 px",
    "full: receipt": "receipts, 8 to 40 px",
    "full: form": "forms, 8 to 40 px",
    "full: panel": "panels of user interfaces, 8 to 40 px",
}


def table(report: dict[str, Any]) -> str:
    """The results as the card shows them."""
    rows = [
        f"| {KINDS[row['set']]} | {row['cer']:.1%} | {row['exact']:.0%} of {row['samples']} |"
        for row in report["sets"]
    ]
    rows.append(f"| the last five together: the full distribution | {report['full_cer']:.1%} | |")
    head = ["| what | character error rate | without an error |", "|---|---|---|"]
    return "\n".join([*head, *rows])


def fill_card(report: dict[str, Any]) -> None:
    """Put the table between the card's markers."""
    write_text(CARD, fill(CARD.read_text(encoding="utf-8"), table(report), START, END))


def main() -> None:
    """Score every set, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="Directory; default: the shipped reader.")
    parser.add_argument("--lines", type=int, default=512, help="Samples of single lines.")
    parser.add_argument("--others", type=int, default=128, help="Samples of each other set.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--card-only", action="store_true", help="Only write the card's table.")
    args = parser.parse_args()
    if args.card_only:
        fill_card(json.loads(args.results.read_text(encoding="utf-8")))
        return
    device = pick_device(None)
    path = args.model or reader_path()
    model = VisionLanguageModel.from_pretrained(path, dtype=torch.float32).to(device).eval()
    processor = VLMProcessor.from_pretrained(path)
    sets = {
        "line": (HELD_OUT["line"], args.lines),
        "line, new font": (
            dataclasses.replace(HELD_OUT["line"], fonts=(NEW_FONT,)),
            args.others,
        ),
    }
    for layout in HELD_OUT["full"].layouts:
        only = dataclasses.replace(HELD_OUT["full"], layouts={layout: 1.0})
        sets[f"full: {layout}"] = (only, args.others)
    rows = []
    for name, (draw, samples) in sets.items():
        result = score(model, processor, draw, samples)
        row = {
            "set": name,
            "samples": samples,
            "characters": result.characters,
            "errors": result.errors,
            "cer": result.error_rate,
            "exact": result.exact / samples,
        }
        rows.append(row)
        print(f"{name}: CER {row['cer']:.4f}, exact {row['exact']:.3f} of {samples}", flush=True)
    full = [row for row in rows if row["set"].startswith("full: ")]
    errors, characters = (sum(row[key] for row in full) for key in ("errors", "characters"))
    print(f"full: CER {errors / characters:.4f} of {characters} characters")
    machine = describe_device(device) | {"commit": commit_here()}
    report = {"machine": machine, "sets": rows, "full_cer": errors / characters}
    write_text(args.results, json.dumps(report, indent=1) + "\n")
    if args.model is None:
        fill_card(report)


if __name__ == "__main__":
    main()
