"""Host syncs, launches and bytes of towers on a pretended GPU, before and after accelerate.

Run in a process of its own: the pretended GPU has to be there before hrvlm_kernels is imported. It
computes no numbers, and which rotation a tower's is has to be tried: towers are accelerated on the
CPU and moved then.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import pretended_gpu

pretended_gpu.install(numbers=False)

import torch
from torch import Tensor, nn

import hrvlm
from benchmarks.towers.tiny import LAYERS, MIXED, TOWERS, inputs_of, output_of, tower_of
from pretended_gpu import RECORD
from pretended_gpu.moved_bytes import moved_by

# Of matrix products, which are the same in both, weights and all would be most of the bytes.
_PRODUCTS = ("aten::addmm", "aten::bmm", "aten::linear", "aten::mm")


class Counts(NamedTuple):
    """What a forward does; `bytes` without those of matrix products."""

    syncs: int
    launches: int
    bytes: int


def counts(name: str) -> dict[str, Any]:
    """Of a forward of three images in float32."""
    stock, inputs = tower_of(name), inputs_of(name)
    swapped = tower_of(name)
    report = hrvlm.accelerate(swapped)
    before, after = (_forward(tower, _moved(inputs)) for tower in (stock, swapped))
    # Sizes may be on the host, masks of padding have to be where the pixels are.
    sizes = {
        key: value
        for key, value in inputs.items()
        if not value.is_floating_point() and "mask" not in key
    }
    on_host = _forward(swapped, _moved(inputs) | sizes)
    return {
        "layers": sum(len(part.names) for part in report.swapped),
        "rope_in_kernels": all(part.rope in ("", "RoPE in the kernels") for part in report.swapped),
        "syncs_before": before.syncs,
        "syncs_after": after.syncs,
        "syncs_sizes_on_host": on_host.syncs if sizes else None,
        "launches_before": before.launches,
        "launches_after": after.launches,
    }


def layer(name: str, options: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """What one more layer does, in bfloat16, at the widths that people run: stock, accelerated."""
    inputs = inputs_of(name, MIXED)
    found: dict[str, Any] = {}
    for accelerated in (False, True):
        short, long = (tower_of(name, **options, **depth) for depth in ({"depth": 2}, more))
        for tower in (short, long) if accelerated else ():
            hrvlm.accelerate(tower)
        less, mine = (_forward(t.bfloat16(), _moved(inputs, torch.bfloat16)) for t in (short, long))
        unit = 2 * options["hidden_size"] * int(inputs["grid_thw"].prod(1).sum())
        found["accelerated" if accelerated else "stock"] = {
            "launches": mine.launches - less.launches,
            "syncs": mine.syncs - less.syncs,
            "passes": round((mine.bytes - less.bytes) / unit, 1),
        }
    return found


def _moved(inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        key: (value.to(dtype) if value.is_floating_point() else value).cuda()
        for key, value in inputs.items()
    }


def _forward(tower: nn.Module, inputs: dict[str, Tensor]) -> Counts:
    tower.cuda()
    fresh = {key: value.clone() for key, value in inputs.items()}
    with torch.no_grad():
        moved = moved_by(lambda: output_of(tower, fresh), tokens=0)
    syncs = len(RECORD.syncs)
    ops = [op for op in RECORD.ops if not op.is_view and op.name in moved.launches]
    launched = [op.bytes for op in ops if op.name not in _PRODUCTS]
    kernels = [sum(a.bytes for a in (*k.reads, *k.writes)) for k in RECORD.launches]
    return Counts(syncs, moved.launches.total(), sum(launched) + sum(kernels))


if __name__ == "__main__":
    names = sys.argv[1:]
    found = {"towers": {name: counts(name) for name in names or TOWERS}}
    if not names:
        found["layers"] = {title: layer(*each) for title, each in LAYERS.items()}
    json.dump(found, sys.stdout)
