"""How well the reader that comes with hrvlm reads, on samples it has not seen.

    python -m benchmarks.reading_score

Character error rates on single lines (the kind that it was trained for), on every layout of the
full distribution (8 to 40 pixels, up to 40 characters a line), and on a font that it has never
seen. Writes benchmarks/results/reader.json, which the card's figures come from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

import torch

from benchmarks.suite import commit_here
from hrvlm import VisionLanguageModel, VLMProcessor
from hrvlm.reading_score import HELD_OUT, score
from hrvlm.shipped_reader import reader_path
from hrvlm.synthetic import NEW_FONT
from hrvlm.timing import describe_device

RESULTS = Path(__file__).parent / "results" / "reader.json"


def main() -> None:
    """Score every set, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="Directory; default: the shipped reader.")
    parser.add_argument("--lines", type=int, default=512, help="Samples of single lines.")
    parser.add_argument("--others", type=int, default=48, help="Samples of each other set.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    args.results.parent.mkdir(parents=True, exist_ok=True)
    part = args.results.with_name(args.results.name + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(part, args.results)


if __name__ == "__main__":
    main()
