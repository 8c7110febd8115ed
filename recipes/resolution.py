"""Does resolution pay? Wide lines of text, read by models of one recipe at 224 and at 768 pixels.

    python -m recipes.resolution                  (all: three seeds of each kind)
    python -m recipes.resolution --page-only      (from the results)

Each model is trained by recipes/resolution.yaml at its own ``max_img_size`` and reads the same
held-out lines. All start from the shipped reader, which knows letters of the size that 768 keeps;
so models at 224 are also trained ten times as long, to see whether they only need more time.

Writes benchmarks/results/reading_resolution.json, and from it the table in docs/experiments.md and
a plot of the errors against the height of the text in source pixels.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting.tables import fill, seed_table
from benchmarks.suite import commit_here
from hrvlm.charts import Axis, Series, line_chart
from hrvlm.drawn_text.drawing import RenderOptions, render
from hrvlm.files import write_text
from hrvlm.inference.text_metrics import edit_distance
from hrvlm.machine import describe_device, pick_device
from hrvlm.reader.score import HELD_OUT_SEED, score
from recipes.reader.train import make_trainer, read_recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reading_resolution.json"
PLOT = ROOT / "docs" / "reading_resolution.svg"
PAGE = ROOT / "docs" / "experiments.md"
MARKS = "<!-- resolution:start -->", "<!-- resolution:end -->"
KINDS = ((224, 1), (224, 10), (768, 1))  # max_img_size, times the recipe's steps
SEEDS, SAMPLES, BIN = (0, 1, 2), 48, 4


def main() -> None:
    """Train, read, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="Optimizer steps; default: the recipe's.")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="Held-out lines.")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--page-only", action="store_true", help="Train nothing.")
    args = parser.parse_args()
    if not args.page_only:
        runs = [run(seed, *kind, args.steps, args.samples) for seed in args.seeds for kind in KINDS]
        write_text(
            args.results,
            json.dumps(
                {
                    "machine": describe_device(pick_device(None)) | {"commit": commit_here()},
                    "runs": runs,
                },
                indent=1,
            ),
        )
    runs = json.loads(args.results.read_text(encoding="utf-8"))["runs"]
    write_text(args.plot, plot(runs))
    if args.results == RESULTS:
        write_text(PAGE, fill(PAGE.read_text(encoding="utf-8"), table(runs), *MARKS))
    for entry in runs:
        print(f"max_img_size {kind_of(entry)}, seed {entry['seed']}: CER {entry['cer']:.3f}")


def run(
    seed: int, max_img_size: int, times: int, steps: int | None, samples: int
) -> dict[str, Any]:
    """Train one model and let it read; errors and characters by height of the text."""
    recipe = read_recipe(Path(__file__).with_suffix(".yaml"))
    recipe["seed"] = seed
    recipe["model"]["max_img_size"] = max_img_size
    draw = RenderOptions(**recipe["reading"]["stages"][0]["draw"])
    steps = times * (recipe["training"]["max_steps"] if steps is None else steps)
    with tempfile.TemporaryDirectory() as directory:
        recipe["training"] |= {"output_dir": directory, "report_to": "none", "max_steps": steps}
        trainer = make_trainer(recipe)
        trainer.train()
    result = score(trainer.model, trainer.processor, draw, samples)
    heights: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for index, read in enumerate(result.read):
        sample = render(HELD_OUT_SEED, index, draw)
        for row, value in enumerate((edit_distance(read, sample.text), len(sample.text))):
            heights[sample.font_size // BIN * BIN][row] += value
    return {
        "seed": seed,
        "max_img_size": max_img_size,
        "steps": steps,
        "samples": samples,
        "cer": result.error_rate,
        "exact": result.exact / samples,
        "by_height": {str(height): heights[height] for height in sorted(heights)},
        "torch": torch.__version__,
    }


def kind_of(entry: dict[str, Any]) -> str:
    """What a run is called in the table and the plot."""
    return f"{entry['max_img_size']}, {entry['steps']} steps"


def table(runs: list[dict[str, Any]]) -> str:
    """Character error rates: a row for each kind, a column for each seed."""
    rates: dict[str, dict[int, float]] = {}
    for entry in runs:
        rates.setdefault(kind_of(entry), {})[entry["seed"]] = entry["cer"]
    return seed_table("`max_img_size`", rates)


def plot(runs: list[dict[str, Any]]) -> str:
    """CER against the height of the text, all seeds of a kind together."""
    kinds: dict[str, dict[int, list[int]]] = {}
    for entry in runs:
        heights = kinds.setdefault(kind_of(entry), defaultdict(lambda: [0, 0]))
        for height, counts in entry["by_height"].items():
            for row in (0, 1):
                heights[int(height)][row] += counts[row]
    series = [
        Series(
            kind, tuple((h + BIN / 2, 100 * heights[h][0] / heights[h][1]) for h in sorted(heights))
        )
        for kind, heights in kinds.items()
    ]
    return line_chart(
        "Wide lines of text: errors against the text's height",
        Axis("font size in source pixels"),
        Axis("character error rate, %"),
        series[::-1],
    )


if __name__ == "__main__":
    main()
