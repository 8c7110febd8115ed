"""The encoder's last norm, applied by the projector while it shuffles: where, and that it is right.

The language model of the tests is wider than the encoder, as ``choose_route`` wants it.
"""

import copy

import pytest
import torch

from hrvlm.vlm import modality_projector
from tests.kernels.helpers import interpreter_only
from tests.numerics import assert_contraction
from tests.tiny import config_of, model_of, text_config_of, vision_config_of

GRIDS = [(2, 4), (6, 2)]


@pytest.fixture
def calls(monkeypatch):
    """How often the op ran."""
    seen, op = [], modality_projector.layer_norm_pixel_shuffle

    def counted(*args, **kwargs):
        seen.append("op")
        return op(*args, **kwargs)

    monkeypatch.setattr(modality_projector, "layer_norm_pixel_shuffle", counted)
    return seen


def model_on(backend, **changes):
    vision = vision_config_of(num_hidden_layers=1, backend=backend)
    return model_of(config_of(vision, **changes))


def patches_of(model, grids=GRIDS):
    rng = torch.Generator().manual_seed(1)
    size = 3 * model.config.vit_patch_size**2
    return torch.randn(sum(h * w for h, w in grids), size, generator=rng)


def features_of(model, **options):
    options = {"with_last_hidden_state": False} | options
    return model.get_image_features(patches_of(model).to(model.dtype), GRIDS, **options)


def results_of(model):
    """The features, and the gradients of the last block's, the norm's and the projector's."""
    model.zero_grad()
    features = torch.cat(features_of(model).pooler_output)
    cotangent = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (features * cotangent.to(features)).sum().backward()
    encoder = model.vision_encoder
    weights = [encoder.layer[-1].mlp.down_proj.weight, *encoder.norm.parameters()]
    return [features.detach(), *(p.grad.clone() for p in [*weights, *model.MP.parameters()])]


@interpreter_only
@pytest.mark.parametrize("mode", ["plain", "cls", "autocast"])
def test_it_errs_no_more_than_eager(mode, calls):
    append_cls = mode == "cls"
    eager, fused = (model_on(backend, mp_append_cls=append_cls) for backend in ("eager", "triton"))
    oracle = results_of(copy.deepcopy(eager).double())
    eager.vision_encoder.allow_fp16 = fused.vision_encoder.allow_fp16 = True
    with torch.autocast("cpu", dtype=torch.float16, enabled=mode == "autocast"):
        plain = results_of(eager)
        assert calls == []
        got = results_of(fused)
    assert calls == ["op"]
    for a, exact, baseline in zip(got, oracle, plain, strict=True):
        assert a.dtype == baseline.dtype
        assert_contraction(a, exact, baseline)


@interpreter_only
@torch.no_grad()
def test_a_forward_takes_it_and_who_asks_for_the_hidden_state_gets_it(calls):
    model = model_on("triton")
    token, s = model.config.image_token_id, model.config.mp_pixel_shuffle_factor
    count = sum(h * w for h, w in GRIDS) // s**2
    ids = torch.tensor([[5] + [token] * count + [6]])
    model(input_ids=ids, pixel_values=patches_of(model), image_grid_hw=GRIDS)
    assert calls == ["op"]
    assert features_of(model).last_hidden_state is None
    calls.clear()
    asked = features_of(model, with_last_hidden_state=True)
    expected = model.vision_encoder(patches_of(model), grids=GRIDS).packed_last_hidden_state
    assert calls == [] and torch.equal(asked.last_hidden_state, expected)


@interpreter_only
@pytest.mark.parametrize("name", ["vision_encoder", "vision_encoder.norm", "MP"])
@torch.no_grad()
def test_what_has_a_hook_sees_what_it_would_see_on_a_cpu(name, calls):
    model = model_on("triton")
    expected = model.vision_encoder(patches_of(model), grids=GRIDS).packed_last_hidden_state
    seen = []

    def look(module, args, output):
        seen.append(output if name == "vision_encoder.norm" else None)
        if name == "MP":
            seen[-1] = args[0]
        elif name == "vision_encoder":
            seen[-1] = output.packed_last_hidden_state

    with model.get_submodule(name).register_forward_hook(look):
        features_of(model)
    assert calls == [] and len(seen) == 1
    # Without a hook, the norm adds what the folded blocks leave out as it reads, unrounded.
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)


@interpreter_only
@torch.no_grad()
def test_a_projector_with_an_adapter_is_called_with_the_rows(calls):
    model = model_on("triton")
    expected = torch.cat(features_of(model).pooler_output)
    with model.MP.proj.register_forward_hook(lambda module, args, output: 2 * output):
        torch.testing.assert_close(torch.cat(features_of(model).pooler_output), 2 * expected)
    assert calls == ["op"] * 2


@pytest.mark.parametrize("case", ["cpu", "narrow language model", "patches only"])
@torch.no_grad()
def test_where_the_modules_are_called(case, calls, monkeypatch):
    if case == "cpu":
        model = model_on("auto")
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    elif case == "narrow language model":
        text = text_config_of(hidden_size=32, num_attention_heads=4)
        vision = vision_config_of(num_hidden_layers=1, backend="eager")
        model = model_of(config_of(vision, text))
    else:
        model = model_on("eager", mp_handle_special_tokens=False)
    assert features_of(model).last_hidden_state is None and calls == []
