"""Every packed tower of the installed transformers, in the ways that people run it."""

import pytest
import torch

import hrvlm
from benchmarks.towers.tiny import gradients_of, output_of
from hrvlm.towers.packed_attention import is_attention
from tests.numerics import relative_error
from tests.towers.whole_towers import build, inputs_of, whole_towers

THREE_AXES = "its own RoPE since it turns some of a head's channels only"  # MiniMax M3


def float_cast(inputs, dtype):
    return {key: a.to(dtype) if a.is_floating_point() else a for key, a in inputs.items()}


@pytest.mark.parametrize(("model", "name"), whole_towers())
def test_clips_adapters_checkpointing_bfloat16_and_flash(model, name, rope_in_kernels):
    peft = pytest.importorskip("peft")
    tower = build(model, name)
    inputs = inputs_of(tower)
    attention = [n for n, m in tower.named_modules() if is_attention(type(m))]
    linear = [
        f"{name}.{inner}"
        for name in attention
        for inner, m in tower.get_submodule(name).named_modules()
        if type(m) is torch.nn.Linear
    ]
    options = {"r": 2, "lora_alpha": 1, "init_lora_weights": False}
    torch.manual_seed(3)
    adapted = peft.get_peft_model(tower, peft.LoraConfig(target_modules=linear, **options)).train()
    expected, gradients = gradients_of(adapted, inputs)
    report = hrvlm.accelerate(adapted)
    assert not report.left_alone and len(report.swapped) == 1
    assert report.swapped[0].rope in ("", "RoPE in the kernels", THREE_AXES)
    tower.gradient_checkpointing_enable({"use_reentrant": False})
    out, mine = gradients_of(adapted, inputs)
    assert relative_error(out, expected) <= 1e-6
    assert mine.keys() == gradients.keys() and any("lora_A" in key for key in mine)
    for key, gradient in gradients.items():
        assert (mine[key] - gradient).norm() <= 5e-6 * max(gradient.norm().item(), 1e-3), key

    tower.bfloat16().eval()
    with torch.no_grad():
        rounded = output_of(tower, float_cast(inputs, torch.bfloat16))
        hrvlm.restore(tower)
        assert relative_error(rounded, output_of(tower, float_cast(inputs, torch.bfloat16))) <= 0.02
    tower.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="runs flash_attention_2 already"):
        hrvlm.accelerate(tower)


def test_the_table_is_whole():
    """21 models of transformers 5.17; MiniCPM-V's tower is given sizes, not grids."""
    assert len(whole_towers()) >= 21
