"""How many times as long stock takes as an accelerated tower, on a CPU, images of mixed sizes.

Both end in torch's scaled_dot_product_attention there. Stock calls it for each image or window; the
accelerated one for each run of equal ones. They take turns in one process.
"""

from __future__ import annotations

import json
import sys

import torch

import hrvlm
from benchmarks.towers.tiny import MIXED, inputs_of, output_of, tower_of
from hrvlm.measuring.timing import median_ratio, take_turns

_CPU = {
    "qwen2_5_vl": {"hidden_size": 320, "num_heads": 4, "depth": 4, "fullatt_block_indexes": [3]},
    "qwen3_vl": {"hidden_size": 288, "num_heads": 4, "depth": 4},
}


@torch.inference_mode()
def ratio(name: str) -> float:
    """Of a forward in float32, by one thread."""
    stock, swapped = (tower_of(name, **_CPU[name]) for _ in range(2))
    hrvlm.accelerate(swapped)
    inputs = inputs_of(name, MIXED)
    rivals = {"stock": stock, "swapped": swapped}
    timings = take_turns(
        {key: lambda tower=tower: output_of(tower, inputs) for key, tower in rivals.items()},
        torch.device("cpu"),
        budget_s=10.0,
    )
    return median_ratio(timings["stock"], timings["swapped"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({name: ratio(name) for name in _CPU}, sys.stdout)
