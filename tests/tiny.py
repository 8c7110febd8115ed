"""Tiny random models and tokenizers for the tests of the vision-language model, made in code."""

import numpy as np
import torch
from PIL import Image
from transformers import DINOv3ViTConfig, LlamaConfig, PreTrainedTokenizerFast, SiglipVisionConfig

from hrvlm.images.transformers_processor import VLMImageProcessorPil
from hrvlm.reader.model import byte_backend
from hrvlm.vlm.config import VLMConfig
from hrvlm.vlm.processors import VLMProcessor
from hrvlm.vlm.tokenizer import IMAGE_TOKEN
from hrvlm.vlm.vision_language_model import VisionLanguageModel

PATCH, FACTOR = 8, 2
BYTES = 256
SPECIAL = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"]


def tokenizer_of(image_token: str | None = IMAGE_TOKEN, grid_tokens: int = 0, **options):
    """A byte-level tokenizer with left padding, the image token last but the grid tokens."""
    named = {} if image_token is None else {"image_token": image_token}
    named |= {
        f"r{i}c{j}": f"<row_{i}_col_{j}>"
        for i in range(1, grid_tokens + 1)
        for j in range(1, grid_tokens + 1)
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_backend(SPECIAL),
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        extra_special_tokens=named,
        **options,
    )


def vision_config_of(**changes) -> DINOv3ViTConfig:
    fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_register_tokens": 4,
        "patch_size": PATCH,
    }
    return DINOv3ViTConfig(**(fields | changes))


def siglip_config_of(**changes) -> SiglipVisionConfig:
    fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": PATCH,
        "image_size": 32,
    }
    return SiglipVisionConfig(**(fields | changes))


def text_config_of(**changes) -> LlamaConfig:
    fields = {
        "vocab_size": len(SPECIAL) + BYTES + 1,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return LlamaConfig(**(fields | changes))


def config_of(vision=None, text=None, **changes) -> VLMConfig:
    fields = {
        "image_token_id": len(SPECIAL) + BYTES,
        "mp_pixel_shuffle_factor": FACTOR,
        "max_img_size": 64,
    }
    return VLMConfig(
        vision_config=vision or vision_config_of(),
        text_config=text or text_config_of(),
        **(fields | changes),
    )


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights far from their initial values, so that every one of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(centre, 0.2, generator=generator)
    return model


def model_of(config: VLMConfig | None = None, seed: int = 0, **changes) -> VisionLanguageModel:
    return randomize(VisionLanguageModel(config or config_of(**changes)), seed).eval()


def processor_of(tokenizer=None, config: VLMConfig | None = None, **changes) -> VLMProcessor:
    config = config or config_of()
    options = {
        "patch_size": config.vit_patch_size,
        "pixel_shuffle_factor": config.mp_pixel_shuffle_factor,
        "max_img_size": config.max_img_size,
        "allow_upscale": False,
    }
    return VLMProcessor(
        VLMImageProcessorPil(**(options | changes)),
        tokenizer or tokenizer_of(),
        append_cls=config.mp_append_cls,
        square_size=config.square_size,
    )


def images_of(grids, rng, patch: int = PATCH) -> torch.Tensor:
    """Packed random patches for the patch grids."""
    rows = sum(hp * wp for hp, wp in grids)
    return torch.randn(rows, 3 * patch * patch, generator=rng)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
