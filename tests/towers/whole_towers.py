"""Tiny towers of the installed transformers: one for each model whose attention is packed."""

import inspect
from functools import cache

import torch

from benchmarks.towers import tiny
from benchmarks.towers.forms import FORMS, PACKED
from tests.towers.attention_classes import attention_classes, models_of_images

CLIPS = ((2, 4, 2), (2, 2, 6))
FRAMES = ((1, 4, 2), (1, 4, 2), (1, 2, 6), (1, 2, 6))  # the same, a row for each
ONE_SIZE = ((1, 4, 4), (1, 4, 4))  # all that MiniCPM-V of transformers 5.17 takes

# Towers whose code takes no row of several frames, and why nobody gives them one.
FRAME_BY_FRAME = "their model gives them a row for each frame of a clip"
NO_VIDEO = "their model takes no video"
NO_FRAMES = "their sizes are heights and widths"
REFUSE_CLIPS = {
    "glm4v": FRAME_BY_FRAME,
    "glm4v_moe": FRAME_BY_FRAME,
    "glm_image": NO_VIDEO,
    "hunyuan_vl": NO_VIDEO,
    "minicpm_ocr": NO_FRAMES,
    "minicpmv4_6": NO_FRAMES,
    "minicpmv4_7": NO_FRAMES,
    "radio": NO_FRAMES,
}


@cache
def whole_towers():
    """(model, class) for the outermost model of each file that is given images, but no text."""
    models = sorted({model for model, name in attention_classes() if "Audio" not in name})
    return [(model, name) for model in models for name in models_of_images(model)[-1:]]


def build(model, name):
    """A tower with random weights large enough that every layer matters."""
    options = {}
    if model == "lfm3_vl":  # whose first layers have no attention
        options["layer_types"] = ["conv", "full_attention"]
    if model == "dots3_note":  # has options for each of more layers than these
        options |= {"per_layer_config": {}, "adapter_in_dim": 64}
    return tiny.build(tiny.class_of(model, name), 32, **options)


def inputs_of(tower):
    """Keyword arguments for two clips, or for their frames; and the grids that these have."""
    for grids in (CLIPS, FRAMES, ONE_SIZE):
        for form in PACKED:
            given = FORMS[form](type(tower), grids, tiny.PATCH, 1)
            try:
                with torch.no_grad():
                    tower(**given)
            except (IndexError, RuntimeError, ValueError):
                continue
            return given, grids
    raise AssertionError(f"{type(tower).__name__} takes patches in no form known here")


def why_no_clips(model, name):
    """What the code of a model says about clips, as in REFUSE_CLIPS; None if nothing."""
    cls = tiny.class_of(model, name)
    if not any(size.endswith("thw") for size in inspect.signature(cls.forward).parameters):
        return NO_FRAMES
    home = vars(inspect.getmodule(cls)).values()
    video = [c.get_video_features for c in home if hasattr(c, "get_video_features")]
    if not video:
        return NO_VIDEO
    return FRAME_BY_FRAME if "repeat_interleave(" in inspect.getsource(video[0]) else None
