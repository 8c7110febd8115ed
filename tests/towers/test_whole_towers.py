"""Every packed tower of the installed transformers, in the ways that people run it."""

import pytest
import torch

import hrvlm
from benchmarks.towers.tiny import gradients_of, output_of
from hrvlm.towers.packed_attention import is_attention
from tests.numerics import relative_error
from tests.towers.attention_classes import attention_classes, number_of_towers
from tests.towers.whole_towers import (
    CLIPS,
    REFUSE_CLIPS,
    build,
    inputs_of,
    whole_towers,
    why_no_clips,
)

THREE_AXES = "its own RoPE since it turns some of a head's channels only"  # MiniMax M3


def float_cast(inputs, dtype):
    return {key: a.to(dtype) if a.is_floating_point() else a for key, a in inputs.items()}


@pytest.mark.parametrize(("model", "name"), whole_towers())
def test_clips_adapters_checkpointing_bfloat16_and_flash(model, name, rope_in_kernels):
    peft = pytest.importorskip("peft")
    tower = build(model, name)
    inputs, grids = inputs_of(tower)
    assert (grids == CLIPS) == (model not in REFUSE_CLIPS)
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
    for key, gradient in gradients.items():  # an attention's by itself are within 1e-6
        assert relative_error(mine[key], gradient) <= 2e-6, key

    tower.bfloat16().eval()
    with torch.no_grad():
        rounded = output_of(tower, float_cast(inputs, torch.bfloat16))
        hrvlm.restore(tower)
        assert relative_error(rounded, output_of(tower, float_cast(inputs, torch.bfloat16))) <= 0.02
    tower.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="runs flash_attention_2 already"):
        hrvlm.accelerate(tower)


@pytest.mark.parametrize(("model", "name"), [t for t in whole_towers() if t[0] in REFUSE_CLIPS])
def test_towers_that_refuse_clips_are_given_none(model, name):
    assert why_no_clips(model, name) == REFUSE_CLIPS[model]


def test_the_table_is_whole():
    """Each model whose attention is packed: 24 of transformers 5.17, more since."""
    models = {model for model, name in attention_classes() if "Audio" not in name}
    assert [model for model, _ in whole_towers()] == sorted(models)
    assert len(models) >= number_of_towers()
