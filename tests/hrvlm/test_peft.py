"""LoRA by PEFT on all three parts: the fused qkv of the encoder, the projector, the LM."""

import pytest
import torch

from hrvlm import VisionLanguageModel
from tests.hrvlm.tiny import config_of, model_of, picture, processor_of

peft = pytest.importorskip("peft")

TARGETS = ["qkv", "o_proj", "up_proj", "down_proj", "proj", "q_proj", "k_proj", "v_proj"]


def inputs_of(config):
    images = [picture(60, 40), picture(16, 64, seed=1)]
    return processor_of(config=config)(images=images, text="<|image|>and<|image|>say")


def logits_of(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("append_cls", [False, True])
def test_adapters_of_all_parts_learn_reload_and_merge(append_cls, tmp_path):
    config = config_of(mp_append_cls=append_cls)
    model, inputs = model_of(config), inputs_of(config)
    model.save_pretrained(tmp_path / "base")
    before = logits_of(model, inputs)
    targets = TARGETS + ["cls_proj"] * append_cls
    # Not the usual start from zero, so that every adapter matters at once.
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, lora)
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    for part in ("vision_encoder.layer.0.attention.qkv", "MP.proj", "decoder.model.layers.0"):
        assert any(part in name for name in trained), part
    for name, parameter in trained.items():
        assert "lora_" in name and parameter.grad.abs().max() > 0, name

    after = logits_of(adapted, inputs)
    assert (after - before).abs().max() > 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = VisionLanguageModel.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(logits_of(again, inputs), after)

    merged = again.merge_and_unload()
    assert type(merged) is VisionLanguageModel
    torch.testing.assert_close(logits_of(merged, inputs), after, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = VisionLanguageModel.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(loaded, inputs), logits_of(merged, inputs))


def test_an_adapter_of_the_projector_alone_changes_the_image_features_only():
    config = config_of()
    model, inputs = model_of(config), inputs_of(config)
    text = processor_of(config=config)(text="say")
    before, said = logits_of(model, inputs), logits_of(model, text)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["MP.proj"], init_lora_weights=False)
    )
    assert (logits_of(adapted, inputs) - before).abs().max() > 0.01
    assert torch.equal(logits_of(adapted, text), said)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits_of(adapted, inputs), before, rtol=0, atol=1e-4)
