"""Vision towers of transformers that a vision-language model takes as its encoder.

Which these are, and how images go in, is decided by what a tower's forward takes, not by its name:

    PADDED   pixel_values, pixel_attention_mask, spatial_shapes   patches, padded to one number
    MASKED   pixel_values, patch_attention_mask                   images, padded to one size
    SIZED    pixel_values, image_sizes                            images on a canvas, their sizes
    MERGED   hidden_states, grid_thw                              patches of all images, in blocks

PADDED is SigLIP2 NaFlex, which LFM2-VL has; MASKED Idefics 2 and 3 and SmolVLM; SIZED Pixtral, as
in Mistral 3 and LightOnOCR; MERGED Qwen2-VL to Qwen3.5, GLM-4.xV, GLM-OCR and others, which make
one token of a block of patches by a merger of their own. And SigLIP, for squares of one size.
"""

from __future__ import annotations

import inspect
import re
from enum import Enum
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SIGLIP = "siglip_vision_model"
_SUFFIX = re.compile(r"_vision(_model|_encoder)?$")
_SUFFIXES = ("_vision", "_vision_model", "_vision_encoder", "")


class Form(Enum):
    """How a tower takes images: what its forward takes beside keywords that all have."""

    PADDED = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    MASKED = ("pixel_values", "patch_attention_mask")
    SIZED = ("pixel_values", "image_sizes")
    MERGED = ("hidden_states", "grid_thw")
    SQUARES = ("pixel_values", "interpolate_pos_encoding")


def tower_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of the tower with this config; None if it is none of those above."""
    kind: Any = type(config)
    found = _tower(kind)
    return found and found[0]


def tower_form(config: PreTrainedConfig) -> Form | None:
    """How the tower with this config takes images; None likewise."""
    kind: Any = type(config)
    found = _tower(kind)
    return found and found[1]


@lru_cache
def _tower(config_class: type[PreTrainedConfig]) -> tuple[type[PreTrainedModel], Form] | None:
    from transformers import PreTrainedModel

    try:
        home = import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return None
    for cls in reversed(list(vars(home).values())):  # the outermost is the last
        if not (inspect.isclass(cls) and issubclass(cls, PreTrainedModel)):
            continue
        if cls.config_class is config_class and (form := _form(cls, config_class)):
            return cls, form
    return None


def _form(cls: type[PreTrainedModel], config_class: Any) -> Form | None:
    """How `cls` takes images.

    A tower that merges has the width of what comes out in its config; one without, as Ernie's, has
    its merger elsewhere.
    """
    takes = list(inspect.signature(cls.forward).parameters)[1:]
    form = next((form for form in Form if tuple(takes[: len(form.value)]) == form.value), None)
    merges = hasattr(config_class, "out_hidden_size") or hasattr(config_class, "embed_dim")
    if form is Form.MERGED and not merges:
        return None
    return None if form is Form.SQUARES and config_class.model_type != _SIGLIP else form


def architecture_name(model_type: str) -> str:
    """What an encoder is called: "qwen2_5_vl" for a ``qwen2_5_vl_vision``."""
    return _SUFFIX.sub("", model_type)


def config_class_of(architecture: str) -> type[PreTrainedConfig] | None:
    """The config of the tower called so; None if there is none."""
    # Here, since VLMConfig, which comes to need this module, is registered when that is imported.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for suffix in _SUFFIXES:
        if (name := architecture + suffix) in CONFIG_MAPPING:
            kind: Any = CONFIG_MAPPING[name]
            if _tower(kind):
                return kind
    return None


def merged_patches(config: PreTrainedConfig) -> int:
    """Side, in patches, of the blocks that the tower with this config merges; 1 if none."""
    return config.spatial_merge_size if tower_form(config) is Form.MERGED else 1


def leave_out(config: PreTrainedConfig) -> bool:
    """Change a config to a tower without what a projector does not get; whether that is any.

    The pooling head of SigLIP, and the features that Qwen3-VL puts into layers of its own language
    model: their weights would have no gradients.
    """
    fields: Any = vars(config)
    before = fields.get("vision_use_head", True), fields.get("deepstack_visual_indexes")
    if architecture_name(config.model_type) in ("siglip", "siglip2"):
        config.vision_use_head = False
    if before[1]:
        config.deepstack_visual_indexes = []
    return before != (fields.get("vision_use_head", True), fields.get("deepstack_visual_indexes"))


# Keys of what leave_out leaves out, and of what a checkpoint of both towers of SigLIP has besides.
LEFT_OUT = ("vision_model.head.", "head.", "deepstack_merger_list.", "merger_list.")
OF_TWO_TOWERS = ("text_model.", "logit_scale", "logit_bias")
