"""Towers of other models as encoders of images of any sizes: what they are given, and in order."""

import copy
from typing import get_type_hints

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import (
    Idefics3VisionConfig,
    Idefics3VisionTransformer,
    PixtralVisionConfig,
    PixtralVisionModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from hrvlm.images.pixels import load_pixels
from hrvlm.images.processor import normalize
from hrvlm.inference.towers import Tower, form_of
from tests.numerics import relative_error
from tests.towers.whole_towers import build, whole_towers

PATCH = 4
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "patch_size": PATCH}
OTHERS = {
    "siglip2": (Siglip2VisionModel, Siglip2VisionConfig(**SMALL, num_patches=16)),
    "pixtral": (PixtralVisionModel, PixtralVisionConfig(**SMALL, image_size=40)),
    "idefics3": (Idefics3VisionTransformer, Idefics3VisionConfig(**SMALL, image_size=40)),
}
# Why others of transformers' towers with grids are none: of some the last state is merged already,
# others are given pixels in forms of their own.
MERGED, OWN = "for 8 patches: not one each", "takes images in no form that is known"
REFUSED = dict.fromkeys(("glm4v", "glm4v_moe", "glm5_next", "glm_ocr"), MERGED)


def picture(height, width, seed=0):
    noise = np.random.default_rng(seed)
    return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))


def stock_of(model, name=None):
    """A tower with weights of its own, and its image processor."""
    if model in OTHERS:
        cls, config = OTHERS[model]
        torch.manual_seed(0)
        module = cls._from_config(config).eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.2)
    else:
        module = build(model, name)
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(model) or IMAGE_PROCESSOR_MAPPING_NAMES["qwen2_vl"]
    processor = getattr(transformers, names["torchvision"])
    known = get_type_hints(processor.valid_kwargs)
    options = {"patch_size": PATCH, "merge_size": 2, "max_num_patches": 64}
    options["temporal_patch_size"] = getattr(module.config, "temporal_patch_size", 1)
    return module, processor(**{k: v for k, v in options.items() if k in known})


def given_by(processor, image):
    """What its image processor makes of an image for the tower, at the size that it has."""
    if "Idefics3" in type(processor).__name__:  # which resizes nevertheless
        return {"pixel_values": pixels_of(processor, image)[None]}
    given = dict(processor(images=[image], do_resize=False, return_tensors="pt"))
    if "image_grid_thw" in given:
        return {"hidden_states": given["pixel_values"], "grid_thw": given["image_grid_thw"]}
    return given


def pixels_of(processor, image):
    return normalize(load_pixels(image), processor.image_mean, processor.image_std)


@pytest.mark.parametrize(("model", "name"), [*whole_towers(), *((m, None) for m in OTHERS)])
def test_tokens_are_those_of_the_stock_tower_row_by_row(model, name):
    module, processor = stock_of(model, name)
    taken = form_of(module) is not None
    assert taken or model not in (*OTHERS, "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
    if model in REFUSED or not taken:
        with pytest.raises(ValueError, match=REFUSED.get(model, OWN)):
            Tower(module)
        return
    stock, tower = copy.deepcopy(module), Tower(module)
    images = [picture(16, 24), picture(32, 8, seed=1), picture(8, 8, seed=2)]
    pixels = [pixels_of(processor, image) for image in images]
    output = tower(pixels, out_indices=[0, 1, -1])
    packed, last = output.packed, output.packed_last_hidden_state
    found = dict(zip((0, 1, -1), output.packed_selected_hidden_states, strict=True)) | {None: last}
    assert packed.grids == ((4, 6), (8, 2), (2, 2)) and packed.num_prefix_tokens == 0
    assert {tuple(hidden.shape) for hidden in found.values()} == {(44, tower.hidden_size)}
    assert tower.num_layers == 2

    changed = pixels[0].clone()
    changed[:, PATCH : 2 * PATCH, 4 * PATCH : 5 * PATCH] += 1.0  # patch (1, 4)
    (embedded,) = tower([changed], out_indices=[0]).packed_selected_hidden_states
    moved = (embedded - found[0][: 4 * 6]).abs().amax(1) > 1e-3
    assert moved.nonzero().tolist() == [[1 * 6 + 4]]

    for i, image in enumerate(images):
        with torch.no_grad():
            out = stock(**given_by(processor, image), output_hidden_states=True)
        count = packed.lengths[i]
        first = out.hidden_states[0].flatten(0, -2)[:count]
        mine = packed.split(found[0])[i]
        rows = torch.cdist(mine, first).argmin(1)  # stock's order is its own
        assert sorted(rows.tolist()) == list(range(count))
        for layer, theirs in (
            (None, out.last_hidden_state),
            (0, out.hidden_states[0]),
            (1, out.hidden_states[1]),
            (-1, out.hidden_states[-1]),
        ):
            mine = packed.split(found[layer])[i]
            assert relative_error(mine, theirs.flatten(0, -2)[:count][rows]) <= 2e-5, layer


def test_alone_and_in_any_pack_the_bits_are_the_same_on_request():
    tower = Tower(stock_of("siglip2")[0], batch_invariant=True)
    images = [torch.randn(3, 16, 24), torch.randn(3, 32, 8)]
    for image, tokens in zip(images, tower(images).patches, strict=True):
        assert torch.equal(tower([image]).packed_last_hidden_state, tokens)


def test_towers_that_are_none():
    siglip = SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=16))
    with pytest.raises(ValueError, match="SiglipVisionModel takes images in no form"):
        Tower(siglip)
