"""int8 weights by torchao, through transformers: near the original, and reloaded as they were."""

import pytest
import torch
from transformers import TorchAoConfig

from hrvlm import VisionLanguageModel
from tests.hrvlm.tiny import model_of, picture, processor_of

torchao = pytest.importorskip("torchao.quantization")

PARTS = {"language": ["vision_encoder", "MP", "lm_head"], "everything": ["lm_head"]}


def weights_in_int8(model):
    return {
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torchao.Int8Tensor)
    }


@pytest.mark.parametrize("kept", PARTS.values(), ids=PARTS)
def test_int8_weights_are_near_and_reload(kept, tmp_path):
    inputs = processor_of()(images=[picture(60, 40)], text="<|image|>say")
    model_of().save_pretrained(tmp_path / "base")
    with torch.no_grad():
        exact = VisionLanguageModel.from_pretrained(tmp_path / "base")(**inputs).logits
        quantized = VisionLanguageModel.from_pretrained(
            tmp_path / "base",
            quantization_config=TorchAoConfig(
                torchao.Int8WeightOnlyConfig(), modules_to_not_convert=kept
            ),
        )
        near = quantized(**inputs).logits
        quantized.save_pretrained(tmp_path / "int8")
        again = VisionLanguageModel.from_pretrained(tmp_path / "int8")
        reloaded = again(**inputs).logits
    # A channel's step is 1/127 of its largest weight; errors of the layers add up.
    assert 0 < (near - exact).norm() / exact.norm() < 0.1
    assert torch.equal(reloaded, near)
    names = weights_in_int8(again)
    assert "decoder.model.layers.0.self_attn.q_proj" in names
    both = {"vision_encoder.layer.0.attention.qkv", "MP.proj"}
    assert both & names == (both if kept == PARTS["everything"] else set())
    size = {
        name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("base", "int8")
    }
    assert size["int8"] < 0.8 * size["base"]
