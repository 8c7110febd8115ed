"""Patch mergers of other models are pixel_shuffle_linear, the weight's columns in its order.

Against the models' own code, on grids that are not square.
"""

import pytest
import torch
from torch import nn
from transformers import Mistral3Config, PaddleOCRVLConfig
from transformers.models.internvl.modeling_internvl import InternVLModel
from transformers.models.lfm2_vl.modeling_lfm2_vl import Lfm2VlMultiModalProjector
from transformers.models.mistral3.modeling_mistral3 import Mistral3PatchMerger
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRProjector

from hrvlm_kernels import PackedGrids, pixel_shuffle_linear
from tests.numerics import relative_error

CHANNELS, GRIDS = 8, [(2, 6), (4, 2), (6, 4)]


@pytest.fixture
def features(rng):
    return torch.randn(sum(h * w for h, w in GRIDS), CHANNELS, generator=rng)


def shuffled(features, weight, bias=None):
    return pixel_shuffle_linear(features, PackedGrids.from_grids(GRIDS), 2, weight, bias)


def test_mistral3_has_channels_first(features):
    vision = {"model_type": "pixtral", "hidden_size": CHANNELS, "patch_size": 4}
    merger = Mistral3PatchMerger(Mistral3Config(vision_config=vision, spatial_merge_size=2))
    expected = merger(features, 4 * torch.tensor(GRIDS))
    weight = merger.merging_layer.weight
    columns = weight.unflatten(1, (CHANNELS, 4)).transpose(1, 2).flatten(1)
    assert relative_error(shuffled(features, columns), expected) <= 1e-6
    assert relative_error(shuffled(features, weight), expected) > 0.1


def test_paddleocr_vl_is_as_it_is(features):
    vision = {"hidden_size": CHANNELS, "spatial_merge_size": 2}
    text = {"hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}
    projector = PaddleOCRProjector(PaddleOCRVLConfig(vision_config=vision, text_config=text))
    projector.act = projector.linear_2 = nn.Identity()
    expected = projector(features, torch.tensor([(1, h, w) for h, w in GRIDS]))
    linear = projector.linear_1
    out = shuffled(projector.pre_norm(features), linear.weight, linear.bias)
    assert relative_error(out, expected) <= 1e-6


@pytest.mark.parametrize("model", ["InternVL", "LFM2-VL"])
def test_shuffles_of_internvl_and_lfm2_vl_are_as_they_are(model, features, rng):
    weight = torch.randn(12, 4 * CHANNELS, generator=rng)
    parts = []
    for (height, width), image in zip(
        GRIDS, features.split([h * w for h, w in GRIDS]), strict=True
    ):
        image = image.view(1, height, width, CHANNELS)
        if model == "InternVL":
            merged = InternVLModel.pixel_shuffle(None, image)
        else:
            projector = Lfm2VlMultiModalProjector.__new__(Lfm2VlMultiModalProjector)
            vars(projector)["factor"] = 2
            merged = projector.pixel_unshuffle(image)
        parts.append(merged.flatten(0, 2) @ weight.T)
    assert relative_error(shuffled(features, weight), torch.cat(parts)) <= 1e-6


def test_views_of_qwen_are_it_for_tokens_in_blocks(features, rng):
    """Their tokens come block by block, so that four rows are a view; ours come row by row."""
    weight = torch.randn(12, 4 * CHANNELS, generator=rng)
    blocks = [
        image.view(h // 2, 2, w // 2, 2, CHANNELS).transpose(1, 2).reshape(-1, 4 * CHANNELS)
        for (h, w), image in zip(GRIDS, features.split([h * w for h, w in GRIDS]), strict=True)
    ]
    expected = torch.cat(blocks) @ weight.T
    assert relative_error(shuffled(features, weight), expected) <= 1e-6
