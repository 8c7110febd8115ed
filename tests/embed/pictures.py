"""Folders of small pictures, some of them broken, and tiny encoders as checkpoints."""

import json

import numpy as np
import torch
from PIL import Image
from transformers import DINOv3ViTConfig

from hrvlm import DINOv3Encoder, get_image_processor

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def write_pictures(folder, count, broken_every=20, sides=(16, 64)):
    """PNG files with sides in a range, at two depths; returns the names of the broken ones."""
    noise = np.random.default_rng(7)
    (folder / "deep" / "er").mkdir(parents=True)
    broken = []
    for i in range(count):
        height, width = noise.integers(*sides, 2)
        name = f"{'deep/er/' if i % 3 else ''}{i:04}.png"
        pixels = noise.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / name, compress_level=1)
        if i % broken_every == 0:
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[: len(content) // 2])
            broken.append(name)
    return sorted(broken)


def write_model(folder, seed=0):
    """A tiny encoder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = DINOv3Encoder(
            DINOv3ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                num_register_tokens=4,
            )
        )
    encoder.save_pretrained(folder)
    means = {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(means))
    return encoder.eval()


def processor_of(max_img_size):
    """What images go through on their way to that encoder."""
    return get_image_processor(
        max_img_size, pixel_shuffle_factor=1, allow_upscale=False, image_mean=MEAN, image_std=STD
    )
