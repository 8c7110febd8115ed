"""What RoPE is worth to an encoder that learns to read: trained the same way with it and without.

    python -m recipes.rope_ablation

Trains by recipes/rope_ablation.yaml and writes the share of characters that the encoder names at
their patches, on held-out pages, into benchmarks/results/rope_ablation.json and the table in
docs/experiments.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting.tables import fill, seed_table
from benchmarks.suite import commit_here
from hrvlm.files import write_text
from hrvlm.machine import describe_device, pick_device
from hrvlm.reader.score import HELD_OUT_SEED
from recipes.reader.losses import BLANK, ReadingCollator, ReadingData
from recipes.reader.train import make_trainer, read_recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "rope_ablation.json"
PAGE = ROOT / "docs" / "experiments.md"
MARKS = "<!-- rope:start -->", "<!-- rope:end -->"
SEEDS = (0, 1)


def main() -> None:
    """Train with and without, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="Optimizer steps; default: the recipe's.")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = [run(s, use_rope, args.steps) for s in args.seeds for use_rope in (True, False)]
    machine = describe_device(pick_device(None)) | {"commit": commit_here()}
    write_text(args.results, json.dumps({"machine": machine, "runs": runs}, indent=1) + "\n")
    if args.results == RESULTS:
        write_text(PAGE, fill(PAGE.read_text(encoding="utf-8"), table(runs), *MARKS))
    for entry in runs:
        print(f"use_rope={entry['use_rope']}, seed {entry['seed']}: {entry['right']:.3f} named")


def table(runs: list[dict[str, Any]]) -> str:
    """Characters named: a row for each kind of encoder, a column for each seed."""
    shares: dict[str, dict[int, float]] = {"with RoPE": {}, "without": {}}
    for entry in runs:
        shares["with RoPE" if entry["use_rope"] else "without"][entry["seed"]] = entry["right"]
    return seed_table("characters named", shares)


def run(seed: int, use_rope: bool, steps: int | None) -> dict[str, Any]:
    """Train one encoder and count the characters that it names rightly."""
    recipe = read_recipe(Path(__file__).with_suffix(".yaml"))
    recipe["seed"] = seed
    recipe["model"]["vision_config"]["use_rope"] = use_rope
    with tempfile.TemporaryDirectory() as directory:
        training = {"output_dir": directory, "report_to": "none"}
        recipe["training"] |= training | ({} if steps is None else {"max_steps": steps})
        trainer = make_trainer(recipe)
        trainer.train()
    model = trainer.model.eval()
    data = ReadingData(trainer.processor, trainer.reading, HELD_OUT_SEED, 32, 1)
    batch = ReadingCollator(trainer.processor)([data[i] for i in range(32)])
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with torch.inference_mode():
        output = model.vision_encoder(batch["pixel_values"], grids=batch["image_grid_hw"])
        logits = model.reading_head(output.packed_patches).view(-1, BLANK + 1)
    targets = batch["characters"].flatten()
    written = targets != BLANK
    right = (logits.argmax(-1) == targets)[written].float().mean().item()
    return {
        "seed": seed,
        "use_rope": use_rope,
        "steps": recipe["training"]["max_steps"],
        "characters": int(written.sum()),
        "right": right,
    }


if __name__ == "__main__":
    main()
