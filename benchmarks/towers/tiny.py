"""Tiny towers of transformers with random weights, and packed images for each."""

import inspect
from importlib import import_module
from typing import NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import nn

from benchmarks.towers.forms import FORMS

PATCH = 4
GRIDS = ((1, 4, 6), (1, 8, 2), (1, 2, 10))
# Eight images of mixed sizes.
MIXED = tuple((1, h, w) for h, w in ((24, 32), (46, 16), (20, 38), (8, 12), (30, 30), (64, 10)))
MIXED += ((1, 16, 16), (1, 12, 40))

# Under all names that configs have for these; each takes those that it knows.
_SIZES = {
    "depth": 2,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "mlp_ratio": 1,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "projection_hidden_dim": 32,
    "patch_size": PATCH,
    "image_size": 8 * PATCH,
    "max_image_size": 8 * PATCH,
    "max_img_size": 8 * PATCH,
    "window_size": 4 * PATCH,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
    "num_patches": 16,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "insert_layer_id": 0,  # MiniCPM's windows come after this layer
}


class Tiny(NamedTuple):
    """A tower: its title, class, head_dim, the form of its images, options, and its images."""

    title: str
    cls: str
    head_dim: int
    form: str
    options: dict = {}
    grids: tuple = GRIDS
    since: str = "5.17"  # the release of transformers from which on it packs images


ALL = {
    "qwen2_vl": Tiny(
        "Qwen2-VL",
        "Qwen2VisionTransformerPretrainedModel",
        64,
        "pairs of frames",
        {"hidden_size": 32},
    ),
    "qwen2_5_vl": Tiny(
        "Qwen2.5-VL (windows)",
        "Qwen2_5_VisionTransformerPretrainedModel",
        80,
        "pairs of frames",
        {"depth": 4, "fullatt_block_indexes": [1, 3]},
    ),
    "qwen3_vl": Tiny(
        "Qwen3-VL",
        "Qwen3VLVisionModel",
        72,
        "pairs of frames",
        {"depth": 3, "deepstack_visual_indexes": [1]},
    ),
    "qwen3_5": Tiny("Qwen3.5", "Qwen3_5VisionModel", 72, "pairs of frames"),
    "glm4v": Tiny("GLM-4.xV", "Glm4vVisionModel", 64, "pairs of frames"),
    "glm_ocr": Tiny("GLM-OCR", "GlmOcrVisionModel", 64, "pairs of frames"),
    "paddleocr_vl": Tiny("PaddleOCR-VL", "PaddleOCRVisionModel", 72, "batch of squares"),
    "kimi_k25": Tiny("MoonViT (Kimi K2.5)", "Kimi_K25VisionModel", 72, "squares"),
    "ernie4_5_vl_moe": Tiny(
        "Ernie 4.5 VL", "Ernie4_5_VLMoeVisionTransformerPretrainedModel", 80, "rows"
    ),
    "pixtral": Tiny("Pixtral", "PixtralVisionModel", 64, "canvas", {"image_size": 10 * PATCH}),
    # The code of these, beside attention, reads sizes or masks back for itself.
    "hunyuan_vl": Tiny("HunyuanVL", "HunYuanVLVisionTransformer", 72, "rows"),
    "cosmos3_edge": Tiny("Cosmos3 Edge", "Cosmos3EdgeVisionModel", 72, "rows"),
    "video_llama_3": Tiny("VideoLLaMA 3", "VideoLlama3VisionModel", 72, "rows"),
    "minicpmv4_6": Tiny(
        "MiniCPM-V 4.6 (windows)",
        "MiniCPMV4_6VisionModel",
        72,
        "strip",
        grids=((1, 4, 6),) * 3,  # transformers 5.17 joins windows as if all images had one size
    ),
    "radio": Tiny("RADIO (transformers 5.24)", "RadioModel", 80, "rows", since="5.24"),
    "siglip2": Tiny("SigLIP2 NaFlex", "Siglip2VisionModel", 72, "padded rows"),
    "idefics3": Tiny("Idefics3", "Idefics3VisionTransformer", 72, "padded canvas"),
    "smolvlm": Tiny("SmolVLM", "SmolVLMVisionTransformer", 64, "padded canvas"),
}
# Those of the installed transformers.
_RELEASE = Version(transformers.__version__)
TOWERS = {name: tiny for name, tiny in ALL.items() if Version(tiny.since) <= _RELEASE}

# One more layer of towers as wide as those that people run: the tower, its widths with two layers,
# and what gives it the third.
_QWEN_2_5 = {"hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "window_size": 32}
_QWEN_3 = {"hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304}
_QWEN_3 |= {"deepstack_visual_indexes": []}
LAYERS = {
    "Qwen2.5-VL, windows": (
        "qwen2_5_vl",
        _QWEN_2_5 | {"fullatt_block_indexes": [1]},
        {"depth": 3},
    ),
    "Qwen2.5-VL, whole images": (
        "qwen2_5_vl",
        _QWEN_2_5 | {"fullatt_block_indexes": [1, 2]},
        {"depth": 3},
    ),
    "Qwen3-VL": ("qwen3_vl", _QWEN_3, {"depth": 3}),
}


def class_of(model, name):
    """The class of that name."""
    return getattr(import_module(f"transformers.models.{model}.modeling_{model}"), name)


def build(cls, head_dim, implementation="sdpa", **changes):
    """A tower with random weights large enough that every layer matters."""
    config = cls.config_class
    known = inspect.signature(config).parameters
    sizes = {**_SIZES, "hidden_size": 2 * head_dim, "embed_dim": 2 * head_dim}
    options = {key: value for key, value in sizes.items() if key in known} | changes
    if "mlp_ratio" in known and isinstance(known["mlp_ratio"].default, float):
        options["mlp_ratio"] = float(options["mlp_ratio"])  # configs are strict about types
    torch.manual_seed(0)
    tower = cls._from_config(config(**options), attn_implementation=implementation)
    for parameter in tower.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return tower.eval()


def tower_of(name, implementation="sdpa", **changes):
    """The tower of that name in TOWERS."""
    tiny = TOWERS[name]
    cls = class_of(name, tiny.cls)
    return build(cls, tiny.head_dim, implementation, **(tiny.options | changes))


def inputs_of(name, grids=None, seed=1):
    """Keyword arguments of the tower's forward: images of these grids of patches."""
    tiny = TOWERS[name]
    return FORMS[tiny.form](class_of(name, tiny.cls), grids or tiny.grids, PATCH, seed)


def output_of(tower, inputs):
    """What the tower hands on, as one tensor; rows of padding mean nothing, and are left out."""
    out = tower(**inputs)
    for name in ("pixel_attention_mask", "patch_attention_mask"):
        if name in inputs:
            return out.last_hidden_state[inputs[name].flatten(1).bool()]
    pooled = getattr(out, "pooler_output", None)
    return out.last_hidden_state if not isinstance(pooled, torch.Tensor) else pooled


def gradients_of(tower, inputs):
    """Output, and the gradients of the weights, for a random cotangent."""
    tower.zero_grad()
    out = output_of(tower, inputs)
    out.backward(
        torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=out.dtype)
    )
    return out.detach(), {n: p.grad for n, p in tower.named_parameters() if p.grad is not None}
