"""Whether an image has the same bits in thousands of random packs, and how far they are without.

    python -m benchmarks.hardening.packs --packs 10000 --out FILE

A small encoder with random weights encodes random packs of 64 images of 12 to 36 patches, with
``batch_invariant=True``; each image's features are compared with those that it has alone, bit for
bit. A tenth of the packs is encoded without it too, and the largest difference is told.

The alternative to one image at a time is a product in blocks of a fixed number of rows. Whether a
row then has the same bits wherever it stands in a block is the library's affair: it is counted for
the one at hand. And the CPU time of images one by one is compared with that of the pack.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import DINOv3ViTConfig

from benchmarks.hardening.parts import add_part_options, show_and_add
from hrvlm import DINOv3Encoder
from hrvlm.images.patches import patchify

IMAGES, LARGEST = 64, 6
# Of the packs: dtype, threads, share. Two threads on busy cores mostly wait for each other.
KINDS = ((torch.float32, 1, 0.75), (torch.bfloat16, 1, 0.24), (torch.float32, 2, 0.01))
PARTS = ("packs", "blocks", "price")
PRODUCTS = ((192, 576), (192, 768), (768, 192), (384, 1152), (1024, 3072), (768, 384))


@torch.inference_mode()
def compare(
    packs: int, dtype: torch.dtype = torch.float32, threads: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Encode random packs; how many images were compared, and how many had other bits."""
    draw, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    config = DINOv3ViTConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=1,
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


@torch.inference_mode()
def blocks(dtype: torch.dtype, rows: tuple[int, ...] = (64, 256)) -> dict[str, Any]:
    """Products in blocks of fixed shape: how many rows have other bits at another place."""
    torch.set_num_threads(1)
    rng, tried, other = torch.Generator().manual_seed(0), 0, 0
    for inner, outer in PRODUCTS:
        weight = torch.randn(outer, inner, generator=rng).to(dtype)
        for count in rows:
            x = torch.randn(count, inner, generator=rng).to(dtype)
            there = linear(x, weight)
            for shift in (1, 5, 7, 16, 33, count // 2):
                moved = linear(x.roll(shift, 0), weight).roll(-shift, 0)
                tried, other = tried + count, other + int((moved != there).any(1).sum())
    return {
        "dtype": str(dtype).removeprefix("torch."), "rows": tried, "with_other_bits": other
    }  # fmt: skip


@torch.inference_mode()
def price(side: int, images: int = 16, repeats: int = 3) -> dict[str, Any]:
    """CPU seconds of a pack of images of about one size, together and one by one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=6
    )
    encoder, seconds = DINOv3Encoder(config).eval(), {}
    pixels = [torch.randn(3, side, side + 16 * (i % 3)) for i in range(images)]
    for together in (True, False):
        encoder.batch_invariant = not together
        encoder(pixels)
        times = []
        for _ in range(repeats):
            began = time.process_time()
            encoder(pixels)
            times.append(time.process_time() - began)
        seconds["together" if together else "one_by_one"] = round(min(times), 4)
    return {"side": side, "images": images, "cpu_seconds": seconds}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packs", type=int, default=10_000, help="in all")
    add_part_options(parser, PARTS)
    options = parser.parse_args()
    result: dict[str, Any] = {}
    if "packs" in options.parts:
        result["runs"] = [
            compare(round(options.packs * share), dtype, threads) for dtype, threads, share in KINDS
        ]
    if "blocks" in options.parts:
        result["rows_in_blocks"] = [blocks(dtype) for dtype in (torch.float32, torch.bfloat16)]
    if "price" in options.parts:
        result["price"] = [price(side) for side in (64, 224, 448)]
    show_and_add(result, options.out)


if __name__ == "__main__":
    main()
