"""DINOv3Encoder's torch path on the CPU against transformers' DINOv3ViTModel.

    python -m pytest benchmarks/bench_cpu_encoder.py

ViT-S/16 in float32 with random weights: two images of 224 px, one of 448 px, and eight images of
mixed sizes (longer sides of 64 to 320 px, aspect ratios 1:4 to 4:1), which transformers takes one
by one or padded with a mask. On a busy machine ``--seconds 60`` gives steadier medians.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import encoder_peers
from benchmarks.bench_encoder import FORWARD, TRAINING, Job, make_case
from benchmarks.case import Case, Settings
from hrvlm.measuring.encoder import mixed_grids

SUITE, DEVICE, BUDGET_S = "cpu_encoder", "cpu", 12

PEERS = ("transformers, sdpa", "transformers, eager")
MIXED = (
    "transformers, one by one",
    "transformers, grouped by size",
    "transformers, padded with a mask",
)


def cases(settings: Settings) -> Iterator[Case]:
    """Uniform and mixed, forward, then with a backward."""
    if settings.small:
        uniform = {"32 px": [(2, 2)] * 3}
        mixed = [(2, 3), (1, 4), (3, 3), (2, 3)]
    else:
        uniform = {"224 px": [(14, 14)] * 2, "448 px": [(28, 28)]}
        mixed = mixed_grids(8, shortest=4, longest=20)
    for direction in (FORWARD, TRAINING):
        for images, grids in uniform.items():
            peers = {name: encoder_peers.UNIFORM[name] for name in PEERS}
            yield make_case(settings, Job("S", direction, images, direction, grids, peers))
        peers = {name: encoder_peers.MIXED[name] for name in MIXED}
        job = Job("S", direction, "mixed", f"mixed {direction}", mixed, peers)
        yield make_case(settings, job)


def bench_cpu_encoder(run_case, case):
    run_case(case)
