"""Whether the encoder waits for its images: `python -m benchmarks.embedding.speed`.

In one run, on the same images and weights: the encoder alone on pixels that are ready (before and
after), `hrvlm embed`, and two plain loops, an image at a time at the same sizes: over transformers'
processor and model, and over dinotool's where it is installed. All with one thread for the encoder.
Take the ratios: they are of one run, on a machine whose load is written beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import RESULTS
from benchmarks.embedding.inputs import write_encoder, write_pictures
from hrvlm.embed.config import EmbedConfig, Manifest, Resources
from hrvlm.embed.model import FeatureModel
from hrvlm.embed.parts import read_parts
from hrvlm.embed.rows import Row
from hrvlm.embed.run import embed
from hrvlm.embed.sources import list_images, open_source
from hrvlm.embed.stages import Run, decode, encode
from hrvlm.embed.store import Store
from hrvlm.files import write_text
from hrvlm.images.intake import load_image
from hrvlm.machine import describe_device, installed_version

SIDES, PART = (160, 320), 8
MODEL = "facebook/dinov3-vits16"


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Its result, and seconds."""
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def transformers_loop(folder: Path, rows: list[Row]) -> list[torch.Tensor]:
    """The pooled output of each image, read, resized to its own size and encoded alone."""
    from transformers import DINOv3ViTImageProcessor, DINOv3ViTModel

    model = DINOv3ViTModel.from_pretrained(folder / MODEL).eval()
    processor = DINOv3ViTImageProcessor()
    found = []
    with torch.inference_mode():
        for row in rows:
            height, width = row.resized or (0, 0)
            size = {"height": height, "width": width}
            image = load_image(folder / "in" / row.id)
            inputs = processor(images=image, size=size, return_tensors="pt")
            found.append(model(**inputs).pooler_output[0])
    return found


def dinotool_loop(folder: Path, rows: list[Row]) -> list[torch.Tensor]:
    """The CLS token and the patches of each image, as dinotool's own API gives them."""
    from dinotool import DinoToolModel

    before = Path.cwd()
    os.chdir(folder)  # it takes DINOv3 by the hub's names alone
    try:
        model = DinoToolModel(MODEL, device="cpu", verbose=False)
    finally:
        os.chdir(before)
    found = []
    for row in rows:
        height, width = row.resized or (0, 0)
        transform = model.get_transform((width, height)).transform
        pixels = transform(load_image(folder / "in" / row.id))
        found.append(model(pixels[None], features="all", normalized=False)[1][0])
    return found


def run(images: int) -> dict[str, Any]:
    """All of it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "in", images, SIDES, distinct=images)
        write_encoder(folder / MODEL)
        config = EmbedConfig(
            str(folder / "in"), str(folder / "out"), model=str(folder / MODEL),
            rows_per_part=PART,
        )  # fmt: skip
        model, source = FeatureModel(config), open_source(config)
        entries = list_images(source)
        one = Run(config, Manifest.make(config, model.facts(), images, images, ""))
        ready = decode(source, entries, 0, one)
        encode([replace(ready[0])], model, one)

        def bare() -> None:
            for first in range(0, images, PART):  # the packs that the run has
                encode([replace(row) for row in ready[first : first + PART]], model, one)

        before = timed(bare)[1]
        report = embed(config, Resources(cpus=2, threads=1))
        after = timed(bare)[1]
        pooled, loop = timed(lambda: transformers_loop(folder, ready))
        their_tool = installed_version("dinotool")
        tool = timed(lambda: dinotool_loop(folder, ready))[1] if their_tool else None
        store = Store(config.out)
        manifest = store.read_manifest()
        assert manifest is not None
        rows = read_parts(store, manifest, ["cls"])["cls"].to_pylist()
        worst = max(
            float((torch.tensor(row) - theirs).abs().max())
            for row, theirs in zip(rows, pooled, strict=True)
        )
    alone = (before + after) / 2
    return {
        "command": f"python -m benchmarks.embedding.speed --images {images}",
        "images": images,
        "tokens": report.tokens,
        "load_average": round(os.getloadavg()[0], 1),
        "seconds": {
            "encoder_alone": [round(before, 2), round(after, 2)],
            "hrvlm_embed": round(report.seconds, 2),
            "transformers_loop": round(loop, 2),
            "dinotool_loop": tool and round(tool, 2),
        },
        "encoder_idle": round(1 - (report.busy or 0.0), 4),
        "embed_against_encoder_alone": round(alone / report.seconds, 3),
        "embed_against_transformers_loop": round(loop / report.seconds, 3),
        "embed_against_dinotool_loop": tool and round(tool / report.seconds, 3),
        "largest_difference_from_transformers": worst,
        "dinotool": their_tool or "not installed",
        "machine": describe_device(torch.device("cpu")) | {"ray": installed_version("ray")},
    }


def main(arguments: list[str] | None = None) -> None:
    """Run, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--out", type=Path, default=RESULTS / "embedding_speed.json")
    options = parser.parse_args(arguments)
    write_text(options.out, json.dumps(run(options.images), indent=2) + "\n")


if __name__ == "__main__":
    main()
