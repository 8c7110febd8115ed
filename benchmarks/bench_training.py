"""A training step on images of mixed shapes: packed, against a batch padded to the largest.

    python -m pytest benchmarks/bench_training.py

Forward, backward and AdamW of a whole VisionLanguageModel, with one image and a short answer a
sample. The padded batch has canvases of one size, the largest height by the largest width, as a
model without packing and masks needs them: encoder, projector and language model work on the
padding too (``patches_padded`` for ``patches``), which also changes the loss, so that the results
are not compared. Weights are random. Samples per second are ``samples`` over the time.
"""

from __future__ import annotations

import torch

from benchmarks.case import OURS, Case, Prepared, Rival
from hrvlm.measuring.encoder import mixed_grids
from hrvlm.vlm.config import VLMConfig
from hrvlm.vlm.placeholders import count_tokens
from hrvlm.vlm.vision_language_model import VisionLanguageModel

SUITE = "training"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUDGET_S = 20

FACTOR, ANSWER, PIXELS = 4, 32, 3 * 16 * 16
IMAGE_ID = 1


def small_config(width: int, layers: int) -> VLMConfig:
    """A model of one width throughout."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
    heads = {"num_attention_heads": width // 64}
    return VLMConfig(
        vision_config={"model_type": "dinov3_vit", "num_register_tokens": 4} | sizes | heads,
        text_config={"model_type": "llama", "vocab_size": 1024, "max_position_embeddings": 32768}
        | sizes
        | heads,
        image_token_id=IMAGE_ID,
        mp_pixel_shuffle_factor=FACTOR,
    )


def whole_tokens(grids):
    """Grids whose sides are multiples of the factor, not empty."""
    return [tuple(max(FACTOR, side // FACTOR * FACTOR) for side in grid) for grid in grids]


def batch_of(grids, device):
    """Random pixels and text; the padding on the right has no labels."""
    rng = torch.Generator().manual_seed(0)
    tokens = count_tokens(grids, FACTOR)
    ids = torch.randint(2, 1024, (len(grids), max(tokens) + ANSWER), generator=rng)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, n in enumerate(tokens):
        ids[row, :n] = IMAGE_ID
        labels[row, n : n + ANSWER] = ids[row, n : n + ANSWER]
        mask[row, : n + ANSWER] = 1
    rows = sum(hp * wp for hp, wp in grids)
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "pixel_values": torch.randn(rows, PIXELS, generator=rng),
    }
    return {k: v.to(device) for k, v in batch.items()} | {"image_grid_hw": grids}


def step_of(config, grids, device):
    """A function that trains one step and returns the loss."""
    torch.manual_seed(0)
    model = VisionLanguageModel(config).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    batch = batch_of(grids, device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return [loss.detach()]

    return step


def cases(settings):
    """One mixed batch: ViT-S-like with a language model of its width; tiny on the CPU, or small."""
    gpu = settings.device.type == "cuda"
    tiny = settings.small or not gpu
    count, width, layers = (8, 64, 2) if tiny else (32, 384, 12)
    if settings.small:
        count = 2
    grids = whole_tokens(mixed_grids(64)[:count])
    if tiny:
        grids = whole_tokens([(hp // 4, wp // 4) for hp, wp in grids])
    canvas = tuple(max(sides) for sides in zip(*grids, strict=True))
    config = small_config(width, layers)

    def prepare():
        device = settings.device
        return Prepared(
            [
                Rival(OURS, lambda: step_of(config, grids, device), role="ours"),
                Rival("padded batch", lambda: step_of(config, [canvas] * count, device)),
            ]
        )

    real, padded = (sum(hp * wp for hp, wp in g) for g in (grids, [canvas] * count))
    yield Case(
        name=f"mixed-{count}",
        group="training step",
        op="encoder",
        parameters={
            "samples": count,
            "patches": real,
            "patches_padded": padded,
            "width": width,
            "layers": layers,
        },
        prepare=prepare,
        dtype=torch.bfloat16 if gpu else torch.float32,
        tolerance=float("inf"),  # the padded model sees its padding
    )


def bench_training(run_case, case):
    run_case(case)
