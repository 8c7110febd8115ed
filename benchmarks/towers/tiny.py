"""Tiny towers of transformers with random weights, and packed images for each."""

from importlib import import_module

import torch
from torch import nn

PATCH = 4
GRIDS = ((1, 4, 6), (1, 8, 2), (1, 2, 10))
# Eight images of mixed sizes.
MIXED = tuple((1, h, w) for h, w in ((24, 32), (46, 16), (20, 38), (8, 12), (30, 30), (64, 10)))
MIXED += ((1, 16, 16), (1, 12, 40))

# model: (class of the tower, of its config, options of the config, channels of a patch)
_QWEN = {"patch_size": PATCH, "num_heads": 2}
_GLM = {
    **_QWEN,
    "depth": 2,
    "hidden_size": 128,
    "out_hidden_size": 64,
    "intermediate_size": 96,
    "image_size": 32,
}
_TEMPORAL = (2 * 3 * PATCH**2,)
_SINGLE = (3, PATCH, PATCH)
TOWERS = {
    "qwen2_vl": (
        "Qwen2VisionTransformerPretrainedModel",
        "Qwen2VLVisionConfig",
        {**_QWEN, "depth": 2, "embed_dim": 128, "hidden_size": 32, "mlp_ratio": 1},
        _TEMPORAL,
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VisionTransformerPretrainedModel",
        "Qwen2_5_VLVisionConfig",
        {
            **_QWEN,
            "depth": 4,
            "hidden_size": 160,
            "intermediate_size": 96,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1, 3],
        },
        _TEMPORAL,
    ),
    "qwen3_vl": (
        "Qwen3VLVisionModel",
        "Qwen3VLVisionConfig",
        {
            **_QWEN,
            "depth": 3,
            "hidden_size": 144,
            "intermediate_size": 96,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [1],
        },
        _TEMPORAL,
    ),
    "glm4v": (
        "Glm4vVisionModel",
        "Glm4vVisionConfig",
        _GLM,
        _TEMPORAL,
    ),
    "glm_ocr": (
        "GlmOcrVisionModel",
        "GlmOcrVisionConfig",
        _GLM,
        _TEMPORAL,
    ),
    "paddleocr_vl": (
        "PaddleOCRVisionModel",
        "PaddleOCRVisionConfig",
        {
            "num_hidden_layers": 2,
            "hidden_size": 144,
            "num_attention_heads": 2,
            "intermediate_size": 96,
            "patch_size": PATCH,
            "image_size": 32,
        },
        _SINGLE,
    ),
    "kimi_k25": (
        "Kimi_K25VisionModel",
        "Kimi_K25VisionConfig",
        {
            "num_hidden_layers": 2,
            "hidden_size": 144,
            "num_attention_heads": 2,
            "intermediate_size": 96,
            "patch_size": PATCH,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
        },
        _SINGLE,
    ),
    "pixtral": (
        "PixtralVisionModel",
        "PixtralVisionConfig",
        {
            "num_hidden_layers": 2,
            "hidden_size": 128,
            "num_attention_heads": 2,
            "intermediate_size": 96,
            "patch_size": PATCH,
            "image_size": 40,
        },
        (),
    ),
}

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


def tower_of(name, implementation="sdpa", **changes):
    """A tower with random weights large enough that every layer matters."""
    home = import_module(f"transformers.models.{name}.modeling_{name}")
    cls, config, options, _ = TOWERS[name]
    torch.manual_seed(0)
    tower = getattr(home, cls)._from_config(
        getattr(home, config)(**(options | changes)), attn_implementation=implementation
    )
    for parameter in tower.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return tower.eval()


def inputs_of(name, grids=GRIDS, seed=1):
    """Keyword arguments of the tower's forward: patches of all images, and their grids."""
    grids = torch.tensor(grids)
    rng = torch.Generator().manual_seed(seed)
    if name == "pixtral":  # images on a canvas, and their sizes
        sizes = PATCH * grids[:, 1:]
        canvas = torch.randn(len(grids), 3, *sizes.amax(0).tolist(), generator=rng)
        return {"pixel_values": canvas, "image_sizes": sizes}
    patches = torch.randn(
        int(grids.prod(1).sum()),
        *TOWERS[name][3],
        generator=rng,
    )
    if name == "paddleocr_vl":
        return {"pixel_values": patches[None], "grid_thw": grids}
    return {"hidden_states" if name != "kimi_k25" else "pixel_values": patches, "grid_thw": grids}


def output_of(tower, inputs):
    """What the tower hands on, as one tensor."""
    out = tower(**inputs)
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
