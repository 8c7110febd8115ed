"""DINOv3Encoder against transformers and timm on a GPU: time and memory.

    python -m pytest benchmarks/bench_encoder.py           # a few minutes: ViT-L, some of the rest
    python -m pytest benchmarks/bench_encoder.py --full    # all models, peers and directions

bfloat16, random weights and pixels. A batch fills the card by its tokens: 64k in a forward (fewer
for the two largest models), 16k in a forward and backward; 64k are 326, 28 or 16 images of 224,
768 or 1024 px. A forward with mixed sizes is the whole draw. Groups:

    forward, forward + backward          images of one size, for us as a batch and as a list
    mixed forward, ... + backward        the mixed draw, and its first 16 images
    one image                            the time of a single image, where launches count
    growing                              one image of 224 to 2048 px, forward + backward: memory,
                                         and the time of attention and of the matrix products
    max-autotune, ...                    against torch.compile at its most thorough

Useful FLOPs are those of the matrix products and of attention (hrvlm.encoder.cost), three times
that with a backward. Memory is the peak beside weights and inputs, gradients included; a rival that
works in the memory of CUDA graphs has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from benchmarks import encoder_peers
from benchmarks.case import MIXED_GRIDS, OURS, Case, Prepared, Rival, Run, Settings
from benchmarks.encoder_models import Grids, Models
from benchmarks.encoder_peers import MakeEncode
from hrvlm.checkpoints.family import CONFIGS, get_config
from hrvlm.encoder.cost import Architecture, forward_cost

SUITE, DEVICE, BUDGET_S = "encoder", "cuda", 170

# Two encoders in bfloat16 differ by the roundings of all their blocks; wrong positions or another
# image's tokens by 0.1 and more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
MODELS = {"S": "vits16", "B": "vitb16", "L": "vitl16", "H+": "vith16plus", "7B": "vit7b16"}
TOKENS = {"S": 65536, "B": 65536, "L": 65536, "H+": 32768, "7B": 16384}
TRAINING_TOKENS, TRAINING_IMAGES = 16384, 16
SIDES = (14, 48, 64)  # patches: 224, 768 and 1024 px
GROWING = (14, 32, 48, 64, 96, 128)
FORWARD, TRAINING = "forward", "forward + backward"
# Of one size, and of mixed ones: what every short run compares with.
HEADLINES = ("transformers, sdpa + compile", "transformers, padded + compile")


class Job(NamedTuple):
    """A case before its inputs are made.

    Attributes:
        full_only: Runs with ``--full`` alone.
        full_peers: Likewise, of its peers.
        peers: Who runs beside us.
    """

    model: str
    direction: str
    images: str
    group: str
    grids: Grids
    peers: dict[str, MakeEncode]
    full_only: bool = False
    full_peers: tuple[str, ...] = ()


def cases(settings: Settings) -> Iterator[Case]:
    """In the order of what a reader wants to know first: time may run out."""
    for job in _small_jobs() if settings.small else _jobs():
        yield make_case(settings, job)


def _jobs() -> Iterator[Job]:
    uniform, compiling = encoder_peers.UNIFORM, _compiling(encoder_peers.UNIFORM)
    # Beside transformers under torch.compile, which every short run has: hours of compiling in all.
    others = (
        "transformers, eager",
        "transformers, sdpa flash + compile",
        "timm + compile",
        "hrvlm + compile",
    )
    yield _uniform("L", FORWARD, 64, uniform, full_peers=others)
    yield _mixed("L", FORWARD, MIXED_GRIDS)
    for side in (48, 14):
        yield _uniform("L", FORWARD, side, uniform, full_peers=others)
    yield _mixed("L", TRAINING, MIXED_GRIDS[:TRAINING_IMAGES])
    yield _uniform("L", TRAINING, 48, uniform, full_peers=others)
    growing = {name: uniform[name] for name in ("transformers, sdpa", "transformers, eager")}
    for side in GROWING:
        yield Job("L", TRAINING, f"{16 * side} px", "growing", [(side, side)], growing)
    launched = _compiling(encoder_peers.LATENCY)
    for side in SIDES:
        job = _uniform("L", FORWARD, side, encoder_peers.LATENCY, full_peers=launched)
        yield job._replace(group="one image", grids=job.grids[:1])
    for model in ("B", "S", "H+", "7B"):
        for side in SIDES:
            yield _uniform(model, FORWARD, side, uniform, full_peers=compiling)
    tuned = {name: uniform[name] for name in ("transformers, sdpa", HEADLINES[0])}
    for model in ("L", "B", "S"):
        for direction in (FORWARD, TRAINING):
            for side in (48, 64, 14):
                job = _uniform(model, direction, side, tuned | encoder_peers.MAX_AUTOTUNE)
                group = f"max-autotune, {direction}"
                yield job._replace(group=group, full_only=True)
    for model in ("S", "B", "L"):
        for side in SIDES:
            if (model, side) != ("L", 48):
                yield _uniform(model, TRAINING, side, uniform)._replace(full_only=True)
        if model != "L":
            yield _mixed(model, FORWARD, MIXED_GRIDS)._replace(full_only=True)
            grids = MIXED_GRIDS[:TRAINING_IMAGES]
            yield _mixed(model, TRAINING, grids)._replace(full_only=True)


def _small_jobs() -> Iterator[Job]:
    for direction in (FORWARD, TRAINING):
        grids = [(2, 2)] * 3
        yield Job("S", direction, "32 px", direction, grids, encoder_peers.UNIFORM)
        yield _mixed("S", direction, [(2, 3), (1, 4), (3, 3), (2, 3)])
    yield Job("S", FORWARD, "32 px", "one image", [(2, 2)], encoder_peers.LATENCY)


def _uniform(
    model: str,
    direction: str,
    side: int,
    peers: dict[str, MakeEncode],
    full_peers: tuple[str, ...] = (),
) -> Job:
    budget = TOKENS[model] if direction == FORWARD else TRAINING_TOKENS
    count = max(1, round(budget / (5 + side * side)))
    images = f"{16 * side} px"
    grids = [(side, side)] * count
    return Job(model, direction, images, direction, grids, peers, full_peers=full_peers)


def _mixed(model: str, direction: str, grids: Grids) -> Job:
    peers = encoder_peers.MIXED
    full_peers = tuple(name for name in peers if "compile" in name and name not in HEADLINES)
    group = f"mixed {direction}"
    return Job(model, direction, "mixed", group, grids, peers, full_peers=full_peers)


def _compiling(peers: dict[str, MakeEncode]) -> tuple[str, ...]:
    return tuple(name for name in peers if compiles(name))


def compiles(peer: str) -> bool:
    """Whether a peer takes long to make."""
    return any(word in peer for word in ("compile", "Flex", "flash-attn-4"))


def make_case(settings: Settings, job: Job, dtype: torch.dtype | None = None) -> Case:
    """The case of a job, by default in bfloat16 on a GPU and in float32 on a CPU."""
    device = settings.device
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    name = MODELS[job.model]
    layers = 2 if settings.small else CONFIGS[name]["num_hidden_layers"]
    config = get_config(name, num_hidden_layers=layers)
    architecture = Architecture.from_config(config)
    costs = [forward_cost(architecture, hp * wp) for hp, wp in job.grids]
    times = 1 if job.direction == FORWARD else 3
    return Case(
        name=f"ViT-{job.model} {job.group}, {job.images}",
        group=job.group,
        op="encoder",
        parameters={
            "model": job.model,
            "layers": layers,
            "images": job.images,
            "count": len(job.grids),
            "tokens": sum(architecture.num_prefix_tokens + hp * wp for hp, wp in job.grids),
            "direction": job.direction,
            "gemm_flops": times * sum(cost.gemm for cost in costs),
            "attention_flops": times * sum(cost.attention for cost in costs),
        },
        prepare=lambda: _prepare(
            Models(name, config, device, dtype, "triton" if device.type == "cuda" else "sdpa"), job
        ),
        dtype=dtype,
        flops=times * sum(cost.total for cost in costs),
        tolerance=TOLERANCE[dtype],
        full_only=job.full_only,
    )


def _prepare(models: Models, job: Job) -> Prepared:
    def runner(make: MakeEncode) -> Callable[[], Run]:
        if job.direction == FORWARD:
            return lambda: encoder_peers.inference(make(models, job.grids))
        return lambda: encoder_peers.training(make(models, job.grids))

    ours = encoder_peers.pack
    if len(set(job.grids)) == 1:
        ours = _one_batch_of_ours
    # The expected features are those of the first: transformers, the exact way for these images.
    first, *others = job.peers.items()
    named = [first, (OURS, ours), *others]
    rivals = [
        Rival(
            name,
            runner(make),
            role="ours" if name == OURS else "peer",
            compiles=compiles(name),
            headline=name in HEADLINES,
            pooled=any(word in name for word in encoder_peers.POOLED),
            full_only=name in job.full_peers,
            weight_bytes=models.weight_bytes,
        )
        for name, make in named
    ]
    if job.group in (FORWARD, "growing"):
        parts = {
            "attention of all layers": encoder_peers.attention_alone,
            "matrix products of all layers": encoder_peers.products_alone,
        }
        rivals += [
            Rival(name, lambda make=make: make(models, job.grids), role="part")
            for name, make in parts.items()
        ]
    return Prepared(rivals)


def _one_batch_of_ours(models: Models, grids: Grids) -> encoder_peers.Encode:
    return encoder_peers.one_batch(models.ours, models, grids)


def bench_encoder(run_case, case):
    run_case(case)
