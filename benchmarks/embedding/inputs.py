"""What the runs are fed with: drawn pictures in a folder, an encoder as a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import DINOv3ViTConfig

from hrvlm.checkpoints.family import CONFIGS
from hrvlm.encoder.vision_transformer import DINOv3Encoder

SEED = 11


def write_pictures(folder: Path, count: int, sides: tuple[int, int], distinct: int) -> None:
    """JPEG files with sides in a range; those beyond `distinct` are links to the first."""
    noise = np.random.default_rng(SEED)
    folder.mkdir(parents=True)
    for i in range(min(count, distinct)):
        height, width = (int(side) for side in noise.integers(*sides, 2, endpoint=True))
        small = Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i:06}.jpg")
    for i in range(distinct, count):
        os.link(folder / f"{i % distinct:06}.jpg", folder / f"{i:06}.jpg")


def write_encoder(folder: Path, name: str = "vits16", **sizes: int) -> None:
    """A model of the family, or a smaller one, with random weights."""
    torch.manual_seed(SEED)
    DINOv3Encoder(DINOv3ViTConfig(**{**CONFIGS[name], **sizes})).save_pretrained(folder)
