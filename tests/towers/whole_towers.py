"""Tiny towers of the installed transformers: one for each model whose attention is packed."""

import inspect
from functools import cache
from importlib import import_module

import torch
from torch import nn

from tests.towers.attention_classes import attention_classes, classes_with_grids

# Under all names that configs have for these; each takes those that it knows.
_SIZES = {
    "depth": 2,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "embed_dim": 64,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "mlp_ratio": 1,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "patch_size": 4,
    "image_size": 32,
    "max_image_size": 32,
    "window_size": 16,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
}
IMAGES = ((1, 4, 6), (1, 8, 2))
CLIPS = ((2, 4, 2), (2, 2, 6))


@cache
def whole_towers():
    """(model, class) for the outermost model of each file that is given grids, but no text."""
    models = sorted({model for model, name in attention_classes() if "Audio" not in name})
    last = ((model, classes_with_grids(model)[-1:]) for model in models)
    return [(model, name) for model, names in last for name in names]


def build(model, name):
    """A tower with random weights large enough that every layer matters."""
    home = import_module(f"transformers.models.{model}.modeling_{model}")
    cls = getattr(home, name)
    config = cls.config_class
    known = inspect.signature(config).parameters
    torch.manual_seed(0)
    options = {key: value for key, value in _SIZES.items() if key in known}
    if "conv_kernel_size" in known:  # LFM3, whose first layers have no attention
        options["layer_types"] = ["conv", "full_attention"]
    if name == "Dots3NoteVisionModel":  # has options for each of more layers than these
        options |= {"per_layer_config": {}, "adapter_in_dim": 64}
    tower = cls._from_config(config(**options), attn_implementation="sdpa").eval()
    for parameter in tower.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return tower


def inputs_of(tower):
    """Keyword arguments for two clips of two frames; for two images where it takes no clips."""
    for grids in (CLIPS, IMAGES):
        for given in _forms(tower, grids):
            try:
                with torch.no_grad():
                    tower(**given)
            except (IndexError, RuntimeError, ValueError):
                continue
            return given
    raise AssertionError(f"{type(tower).__name__} takes patches in no form known here")


def _forms(tower, grids):
    names = inspect.signature(tower.forward).parameters
    grids = torch.tensor(grids)
    rest = {"grid_thw": grids}
    if "merge_sizes" in names:
        rest["merge_sizes"] = torch.full((len(grids),), 2)
    patches = "hidden_states" if "hidden_states" in names else "pixel_values"
    for channels in (3, 6):  # of one frame, of two
        rng = torch.Generator().manual_seed(1)
        flat = torch.randn(int(grids.prod(1).sum()), channels * 16, generator=rng)
        square = flat.unflatten(1, (channels, 4, 4))
        for form in (flat, square, square[None]):
            yield {patches: form, **rest}
