"""DINOv3Encoder on a CPU against transformers' and timm's.

    python -m pytest benchmarks/bench_cpu_encoder.py --full --rounds 15

ViT-S/16 with random weights, in float32 and bfloat16, with one and two threads, forward alone and
with a backward. The images:

    224 px, 768 px, 1024 px   two, one and one, as a batch
    8 of 128 to 640 px        the longer sides, aspect ratios 1:4 to 4:1; the others one by one
    512 tiny                  of one to four patches; transformers one by one

Without ``--rounds`` a case has as many as fit in ``--seconds``, between 5 and 30, but at least 2
where one takes minutes: 1024 px and 512 tiny images. Each rival's number is in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch

from benchmarks import encoder_peers
from benchmarks.bench_encoder import FORWARD, TRAINING, Job, make_case
from benchmarks.case import Case, Settings
from benchmarks.encoder_models import Grids
from hrvlm.measuring.encoder import mixed_grids

SUITE, DEVICE, BUDGET_S = "cpu_encoder", "cpu", 60

MIXED, TINY = "8 of 128 to 640 px", "512 tiny"
TINY_GRIDS = ((1, 1), (1, 2), (2, 2), (1, 3))
EAGER = "transformers, eager"  # at 1024 px it would keep 10 GB of scores for the backward


def cases(settings: Settings) -> Iterator[Case]:
    """What a reader wants to know first comes first: time may run out."""
    for images in _small_sets() if settings.small else _sets():
        dtypes = (torch.float32,) if settings.small else (torch.float32, torch.bfloat16)
        threads = (2,) if settings.small else (1, 2)
        for dtype, count, direction in product(dtypes, threads, (FORWARD, TRAINING)):
            if images != TINY or direction == FORWARD:
                yield _case(settings, images, dtype, count, direction)


def _sets() -> dict[str, Grids]:
    return {
        MIXED: mixed_grids(8, shortest=8, longest=40),
        "224 px": [(14, 14)] * 2,
        "768 px": [(48, 48)],
        TINY: [TINY_GRIDS[i * 7 % 4] for i in range(512)],
        "1024 px": [(64, 64)],
    }


def _small_sets() -> dict[str, Grids]:
    return {MIXED: [(2, 3), (1, 4), (3, 3), (2, 3)], "224 px": [(2, 2)] * 3}


def _case(
    settings: Settings, images: str, dtype: torch.dtype, threads: int, direction: str
) -> Case:
    grids = (_small_sets() if settings.small else _sets())[images]
    peers = dict(encoder_peers.CPU_UNIFORM if len(set(grids)) == 1 else encoder_peers.CPU_MIXED)
    if images == TINY:
        peers = {name: peers[name] for name in list(peers)[:1]}
    if images == "1024 px":
        del peers[EAGER]
    name = str(dtype).removeprefix("torch.")
    group = f"{direction}, {name}, {threads} thread{'s' * (threads > 1)}"
    case = make_case(settings, Job("S", direction, images, group, grids, peers), dtype)
    return replace(
        case,
        parameters=case.parameters | {"direction": direction, "threads": threads},
        threads=threads,
        min_rounds=2 if images in (TINY, "1024 px") else None,
    )


def bench_cpu_encoder(run_case, case):
    run_case(case)
