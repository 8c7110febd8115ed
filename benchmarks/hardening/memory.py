"""Memory over ten thousand shapes, and from 224 to 2,048 pixels.

    python -m benchmarks.hardening.memory --shapes 10000 --out FILE

An encoder with random weights encodes packs of images, no shape twice, and merges 2 x 2 patches
where the sides are even, every fourth pack with its gradients: what the process holds stays where
it was, and the caches of layouts and grids, whose bounds are met, stay within them. And for one
image of each side, the peak above what was held before, forward and with the gradients: by token it
stays the same, as attention makes no matrix; the eager backend, which does, is measured beside it
as long as it fits.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DINOv3ViTConfig

from benchmarks.hardening.parts import add_part_options, show_and_add
from hrvlm import DINOv3Encoder
from hrvlm.encoder import rope
from hrvlm_kernels import packed_grids, packed_tables, pixel_shuffle_linear

MIB = 1 << 20
PARTS = ("sides", "shapes")
SIDES = (224, 448, 672, 1024, 1536, 2048)
EAGER_UP_TO = 1024
CACHES = {
    "layouts": packed_grids._build_cached,
    "centres": packed_tables._centres_of,
    "shuffled grids": packed_tables._shuffled_grid,
    "frequencies": rope.rope_frequencies,
}


def _encoder(hidden: int, backend: str = "auto", **options: Any) -> DINOv3Encoder:
    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=1,
        num_attention_heads=hidden // 32, num_register_tokens=4, **options,
    )  # fmt: skip
    return DINOv3Encoder(config, backend=backend).eval()


def _bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _held() -> int:
    """Resident bytes, after all that is free has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _bytes("VmRSS")


def _run(encoder: DINOv3Encoder, images: list[Tensor], *, backward: bool, merge: int = 1) -> None:
    with torch.set_grad_enabled(backward):
        found = encoder(images)
        out = found.packed_last_hidden_state
        if merge > 1:
            weight = torch.ones(8, merge**2 * out.shape[1])
            out = pixel_shuffle_linear(out, found.packed, merge, weight)
        if backward:
            out.backward(torch.randn_like(out))
            encoder.zero_grad()


def _packs(draw: random.Random, count: int, patches: int) -> list[tuple[int, list[Any]]]:
    """Grids of up to so many patches, none twice, one or two together; 2 for even ones, else 1."""
    every = [(h, w) for h in range(1, patches + 1) for w in range(1, patches // h + 1)]
    packs, pools = [], {1: list[Any](), 2: list[Any]()}
    for h, w in draw.sample(every, count):
        pools[1 if h % 2 or w % 2 else 2].append((h, w))
    for merge, grids in pools.items():
        while grids:
            together, grids = grids[: (size := draw.randint(1, 2))], grids[size:]
            packs.append((merge, together))
    draw.shuffle(packs)
    return packs


def shapes(count: int, samples: int = 20, patches: int = 1400, seed: int = 0) -> dict[str, Any]:
    """Encode so many images, each of another shape; what is held after each stretch."""
    draw, side, began = random.Random(seed), 4, time.process_time()
    encoder, packs, rows = _encoder(32, patch_size=side), _packs(draw, count, patches), []
    for number, (merge, grids) in enumerate(packs, 1):
        images = [torch.rand(3, side * h, side * w) for h, w in grids]
        _run(encoder, images, backward=number % 4 == 0, merge=merge)
        if number % max(1, len(packs) // samples) == 0:
            print(number, flush=True)
            rows.append({"packs": number, "held_mib": round(_held() / MIB, 1)})
    growth = rows[-1]["held_mib"] - rows[len(rows) // 2 - 1]["held_mib"]
    return {
        "packs": len(packs),
        "different_shapes": sum(len(grids) for _, grids in packs),
        "growth_in_the_second_half_mib": round(growth, 1),
        "caches": {
            name: {"entries": cache.cache_info().currsize, "bound": cache.cache_info().maxsize}
            for name, cache in CACHES.items()
        },
        "samples": rows,
        "cpu_seconds": round(time.process_time() - began),
    }


def sides(sizes: tuple[int, ...] = SIDES, backend: str = "auto") -> list[dict[str, Any]]:
    """Peak above what was held before, for one square image of each side."""
    encoder, rows = _encoder(64, backend), []
    _run(encoder, [torch.rand(3, 224, 224)], backward=True)  # libraries make their buffers once
    for backward in (False, True):
        for side in sizes:
            images = [torch.rand(3, side, side)]
            before = _held()
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak: proc(5)
            _run(encoder, images, backward=backward)
            tokens, peak = (side // 16) ** 2 + 5, _bytes("VmHWM") - before
            rows.append(
                {
                    "backend": backend,
                    "pass": "forward and backward" if backward else "forward",
                    "side": side,
                    "tokens": tokens,
                    "peak_mib": round(peak / MIB, 1),
                    "bytes_per_token": round(peak / tokens),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=int, default=10_000, help="images, each of another")
    add_part_options(parser, PARTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    small = tuple(side for side in SIDES if side <= EAGER_UP_TO)
    result: dict[str, Any] = {}
    if "sides" in options.parts:
        result["sides"] = sides() + sides(small, "eager")
    if "shapes" in options.parts:
        result["shapes"] = shapes(options.shapes)
    show_and_add(result, options.out)


if __name__ == "__main__":
    main()
