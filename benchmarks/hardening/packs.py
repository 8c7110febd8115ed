"""Whether an image has the same bits in thousands of random packs, and how far they are without.

    python -m benchmarks.hardening.packs --packs 10000 --out FILE

An encoder with random weights encodes random packs of 64 images of 12 to 64 patches, with
``batch_invariant=True``; each image's features are compared with those that it has alone, bit for
bit. A tenth of the packs is encoded without it too, and the largest difference is told.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DINOv3ViTConfig

from hrvlm import DINOv3Encoder
from hrvlm.images.patches import patchify
from hrvlm.machine import device_name

IMAGES, LARGEST = 64, 8


@torch.inference_mode()
def compare(
    packs: int, dtype: torch.dtype = torch.float32, threads: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Encode random packs; how many images were compared, and how many had other bits."""
    draw, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    config = DINOv3ViTConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=2, num_attention_heads=3,
        num_register_tokens=4, batch_invariant=True,
    )  # fmt: skip
    encoder = DINOv3Encoder(config).eval().to(dtype)
    grids = [(draw.randint(3, LARGEST), draw.randint(4, LARGEST)) for _ in range(IMAGES)]
    patches = [
        patchify(torch.randn(3, 16 * h, 16 * w, generator=rng), 16).to(dtype) for h, w in grids
    ]

    def features(images: list[int]) -> list[torch.Tensor]:
        out = encoder(torch.cat([patches[i] for i in images]), grids=[grids[i] for i in images])
        return out.packed.split(out.packed_last_hidden_state)

    began = time.process_time()
    alone = [features([i])[0] for i in range(IMAGES)]
    compared = different = other_without = 0
    furthest = 0.0
    for number in range(packs):
        images = draw.choices(range(IMAGES), k=draw.randint(2, 6))
        for i, found in zip(images, features(images), strict=True):
            compared += 1
            different += not torch.equal(found, alone[i])
        if number % 10 == 0:
            encoder.batch_invariant = False
            for i, found in zip(images, features(images), strict=True):
                other_without += not torch.equal(found, alone[i])
                error = (found.double() - alone[i].double()).abs().max() / alone[i].abs().max()
                furthest = max(furthest, float(error))
            encoder.batch_invariant = True
    return {
        "packs": packs,
        "images_compared": compared,
        "with_other_bits": different,
        "with_other_bits_in_a_tenth_of_the_packs_without_batch_invariant": other_without,
        "largest_relative_difference_without": furthest,
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "cpu_seconds": round(time.process_time() - began),
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packs", type=int, default=10_000, help="in all")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    kinds = [(torch.float32, 1, 0.6), (torch.float32, 2, 0.2), (torch.bfloat16, 1, 0.2)]
    runs = [
        compare(round(options.packs * share), dtype, threads) for dtype, threads, share in kinds
    ]
    result = {"cpu": device_name(torch.device("cpu")), "torch": torch.__version__, "runs": runs}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
