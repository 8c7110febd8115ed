"""Towers that mask padded images: as stock where there is an image, no padding in the layers."""

import pytest
import torch
from torch import nn
from transformers import (
    Idefics3VisionConfig,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)
from transformers.models.idefics2 import modeling_idefics2
from transformers.models.idefics3 import modeling_idefics3
from transformers.models.smolvlm import modeling_smolvlm

import hrvlm
from tests.numerics import relative_error

SIZES = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "patch_size": 4}
VALID = torch.zeros(3, 12, dtype=torch.long)
for image, length in enumerate((6, 12, 4)):
    VALID[image, :length] = 1


def siglip2():
    model = Siglip2VisionModel(Siglip2VisionConfig(**SIZES, num_patches=16))
    shapes = torch.tensor([[2, 3], [3, 4], [4, 1]])
    call = {"pixel_values": torch.randn(3, 12, 48), "spatial_shapes": shapes}
    return model, call | {"pixel_attention_mask": VALID}


def idefics3(home=modeling_idefics3, name="Idefics3"):
    config = getattr(home, f"{name}VisionConfig", Idefics3VisionConfig)(**SIZES, image_size=16)
    model = getattr(home, f"{name}VisionTransformer")(config)
    mask = torch.zeros(3, 3, 4, dtype=torch.bool)
    for image, (height, width) in enumerate(((2, 3), (3, 4), (3, 1))):
        mask[image, :height, :width] = True
    return model, {"pixel_values": torch.randn(3, 3, 12, 16), "patch_attention_mask": mask}


TOWERS = {"siglip2": siglip2, "idefics3": idefics3}
TOWERS["idefics2"] = lambda: idefics3(modeling_idefics2, "Idefics2")
TOWERS["smolvlm"] = lambda: idefics3(modeling_smolvlm, "SmolVLM")


@pytest.fixture(params=TOWERS)
def tower(request):
    torch.manual_seed(0)
    model, call = TOWERS[request.param]()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.eval(), call


def results(model, call):
    """Valid rows, what is pooled, and the gradients of the weights."""
    model.zero_grad()
    out = model(**call)
    mask = call.get("pixel_attention_mask", call.get("patch_attention_mask")).flatten(1).bool()
    kept = [out.last_hidden_state[mask], *([out.pooler_output] if "pooler_output" in out else [])]
    rng = torch.Generator().manual_seed(1)
    torch.autograd.backward(kept, [torch.randn(part.shape, generator=rng) for part in kept])
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return kept, gradients, out.last_hidden_state[~mask]


def test_equals_stock_and_is_undone(tower):
    model, call = tower
    expected, gradients, _ = results(model, call)
    structure, keys = str(model), list(model.state_dict())
    seen = []
    model.encoder.layers[1].register_forward_hook(lambda _, args, out: seen.append(out.shape))
    report = hrvlm.accelerate(model)
    assert len(report.swapped) == 1 and not report.left_alone
    tokens = int(call.get("pixel_attention_mask", call.get("patch_attention_mask")).sum())
    for _ in range(2):
        kept, mine, padded = results(model, call)
        assert seen.pop() == (1, tokens, 64)
        for out, stock in zip(kept, expected, strict=True):
            assert relative_error(out, stock) <= 1e-6
        assert mine.keys() == gradients.keys()
        for name, gradient in gradients.items():
            if name.endswith("k_proj.bias"):  # softmax does not see it: zero but for rounding
                assert max(mine[name].norm(), gradient.norm()) <= 1e-5, name
            else:
                assert relative_error(mine[name], gradient) <= 1e-6, name
        assert torch.equal(padded, model.post_layernorm.bias.expand_as(padded))
        hrvlm.accelerate(model)
    assert str(model) == structure and list(model.state_dict()) == keys
    hrvlm.restore(model)
    again, _, _ = results(model, call)
    assert all(torch.equal(out, stock) for out, stock in zip(again, expected, strict=True))


def test_one_attention_with_a_forward_of_its_own_leaves_the_whole_tower_alone(tower):
    model, call = tower
    expected, _, _ = results(model, call)
    attention = model.encoder.layers[1].self_attn
    attention.forward = attention.forward
    with pytest.raises(ValueError, match="nothing to swap"):
        hrvlm.accelerate(model)
    again, _, _ = results(model, call)
    assert all(torch.equal(out, stock) for out, stock in zip(again, expected, strict=True))


def test_hidden_states_have_their_padding(tower):
    model, call = tower
    expected = model(**call, output_hidden_states=True).hidden_states
    mask = call.get("pixel_attention_mask", call.get("patch_attention_mask")).flatten(1).bool()
    hrvlm.accelerate(model)
    for return_dict in (True, False):
        out = model(**call, output_hidden_states=True, return_dict=return_dict)
        states = out.hidden_states if return_dict else out[-1]
        assert len(states) == len(expected) == 3
        for state, stock in zip(states, expected, strict=True):
            assert relative_error(state[mask], stock[mask]) <= 1e-6
            assert not state[~mask].any()


@pytest.mark.parametrize("is_valid", [(0, 0, 0), (0, 1, 0)])
def test_images_that_are_all_padding(tower, is_valid):
    model, call = tower
    (name,) = [name for name in call if name.endswith("mask")]
    valid = torch.tensor(is_valid, dtype=torch.bool)
    call[name] = call[name] * valid.view(-1, *[1] * (call[name].ndim - 1))
    with torch.no_grad():
        expected = model(**call, output_hidden_states=True)
        hrvlm.accelerate(model)
        out = model(**call, output_hidden_states=True)
    assert out.keys() == expected.keys() and len(out.hidden_states) == 3
    assert out.last_hidden_state.shape == expected.last_hidden_state.shape
    assert all(a.isfinite().all() for a in (out.last_hidden_state, *out.hidden_states))
    mask = call[name].flatten(1).bool()
    kept, stock = out.last_hidden_state[mask], expected.last_hidden_state[mask]
    assert (kept - stock).norm() <= 1e-6 * stock.norm()


def test_by_the_kernels():
    torch.manual_seed(0)
    model, call = siglip2()
    expected, _, _ = results(model.eval(), call)
    hrvlm.accelerate(model, backend="triton")
    kept, _, _ = results(model, call)
    for out, stock in zip(kept, expected, strict=True):
        assert relative_error(out, stock) <= 1e-6


def test_lfm2_vl_by_its_siglip2():
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "layer_types": ["full_attention"]}
    vision = {**SIZES, "model_type": "siglip2_vision_model", "num_patches": 16}
    config = Lfm2VlConfig(
        vision_config=vision, text_config=text, image_token_id=63, downsample_factor=1
    )
    torch.manual_seed(0)
    model = Lfm2VlForConditionalGeneration(config).eval()
    _, call = siglip2()
    tokens = int(call["pixel_attention_mask"].sum())
    call["input_ids"] = torch.tensor([[1, *[63] * tokens, 2]])
    (tower,) = [m for m in model.modules() if isinstance(m, Siglip2VisionModel)]
    seen = []
    tower.encoder.layers[1].register_forward_hook(lambda _, args, out: seen.append(out.shape))
    tower.register_forward_hook(lambda _, args, out: seen.append(out.last_hidden_state.shape))
    with torch.no_grad():
        expected = model(**call).logits
        report = hrvlm.accelerate(model)
        assert [part.cls for part in report.swapped] == ["Siglip2Attention"]
        assert relative_error(model(**call).logits, expected) <= 1e-6
    assert seen == [(3, 12, 64), (3, 12, 64), (1, tokens, 64), (3, 12, 64)]
