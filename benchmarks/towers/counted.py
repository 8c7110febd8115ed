"""Host syncs and launches of a tower's forward on a pretended GPU, before and after accelerate.

Run in a process of its own: the pretended GPU has to be there before hrvlm_kernels is imported.
"""

from __future__ import annotations

import json
import sys

import pretended_gpu

pretended_gpu.install(numbers=False)

import torch
from torch import Tensor, nn

import hrvlm
from benchmarks.towers.tiny import TOWERS, inputs_of, output_of, tower_of
from pretended_gpu import RECORD
from pretended_gpu.moved_bytes import moved_by


def counts(name: str) -> dict[str, int]:
    """Of a forward of three images in float32."""
    tower = tower_of(name).cuda()
    inputs = {key: value.cuda() for key, value in inputs_of(name).items()}
    before, launches_before = _forward(tower, inputs)
    report = hrvlm.accelerate(tower)
    after, launches_after = _forward(tower, inputs)
    grids = {k: v for k, v in inputs_of(name).items() if not v.is_floating_point()}
    on_host, _ = _forward(tower, inputs | grids)
    return {
        "layers": sum(len(part.names) for part in report.swapped),
        "syncs_before": before,
        "syncs_after": after,
        "syncs_grids_on_host": on_host,
        "launches_before": launches_before,
        "launches_after": launches_after,
    }


def _forward(tower: nn.Module, inputs: dict[str, Tensor]) -> tuple[int, int]:
    fresh = {key: value.clone() for key, value in inputs.items()}
    with torch.no_grad():
        moved = moved_by(lambda: output_of(tower, fresh))
    return len(RECORD.syncs), moved.calls.total() + moved.launches.total()


if __name__ == "__main__":
    json.dump({name: counts(name) for name in TOWERS}, sys.stdout)
