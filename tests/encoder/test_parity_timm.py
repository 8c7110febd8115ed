"""DINOv3Encoder and DINOv2Encoder against timm's ports, weights moved by convert.py."""

import pytest
import timm
import torch
from transformers import DINOv3ViTModel

from hrvlm import DINOv2Encoder, DINOv3Encoder
from hrvlm.checkpoints.convert import (
    from_transformers,
    infer_config,
    load_into,
    to_transformers,
)
from hrvlm.checkpoints.family import CONFIGS, get_config
from tests.numerics import relative_error

# timm's name of each model of the family: those with a bias of q and v, then those without.
BIASED = {
    "vits16": "vit_small_patch16_dinov3_qkvb",
    "vits16plus": "vit_small_plus_patch16_dinov3_qkvb",
    "vitb16": "vit_base_patch16_dinov3_qkvb",
    "vitl16": "vit_large_patch16_dinov3_qkvb",
    "vith16plus": "vit_huge_plus_patch16_dinov3_qkvb",
}
UNBIASED = {name: timms.removesuffix("_qkvb") for name, timms in BIASED.items()}
UNBIASED["vit7b16"] = "vit_7b_patch16_dinov3"
EUPE = {"vitt16": "vit_tiny_patch16_dinov3_qkvb"}  # its ViT-S and ViT-B are as DINOv3's
SMALL = {"embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 0, "dynamic_img_size": True}
VARIANTS = [
    "vit_small_patch16_dinov3",
    "vit_small_plus_patch16_dinov3_qkvb",
    "vit_7b_patch16_dinov3",
]
UNUSED = {"embeddings.mask_token"}


def pair_of(name, seed=0, **changes):
    """timm's model, small, with random weights, none at its initial value; and ours."""
    theirs = timm.create_model(name, **(SMALL | changes)).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            parameter.normal_(centre, 1.0 if "token" in key else 0.15, generator=rng)
    config = infer_config(theirs.state_dict(), num_attention_heads=theirs.blocks[0].attn.num_heads)
    ours = DINOv3Encoder(config).eval()
    info = load_into(ours, theirs.state_dict())
    assert info.layout == "timm" and info.added == ("embeddings.mask_token",)
    return theirs, ours


def gradients_under_timms_names(ours):
    state = {key: p.grad for key, p in ours.named_parameters()}
    state |= {key: torch.zeros_like(ours.state_dict()[key]) for key in UNUSED}
    return from_transformers(state, "timm")


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 32, 80), (2, 80, 32)])
def test_a_batch_equals_timm_forward_and_gradients(name, shape, rng):
    theirs, ours = pair_of(name)
    batch, height, width = shape
    x = torch.randn(batch, 3, height, width, generator=rng)
    x_theirs, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = theirs.forward_features(x_theirs)
    out = ours(x_ours).last_hidden_state
    assert out.shape == expected.shape
    assert relative_error(out, expected) <= 1e-5
    cotangent = torch.randn(expected.shape, generator=rng)
    expected.backward(cotangent)
    out.backward(cotangent)
    assert relative_error(x_ours.grad, x_theirs.grad) <= 1e-5
    mine = gradients_under_timms_names(ours)
    theirs_by_name = dict(theirs.named_parameters())
    assert mine.keys() == theirs_by_name.keys()
    for key, parameter in theirs_by_name.items():
        assert relative_error(mine[key], parameter.grad) <= 1e-5, key


@pytest.mark.parametrize("name", VARIANTS)
def test_mixed_shapes_equal_timm_image_by_image(name, rng):
    theirs, ours = pair_of(name)
    images = [torch.randn(3, *s, generator=rng) for s in [(32, 48), (64, 16), (16, 16), (48, 80)]]
    packed = ours(images)
    cotangents = [
        torch.randn(part.shape, generator=rng)
        for part in packed.packed.split(packed.packed_last_hidden_state)
    ]
    packed.packed_last_hidden_state.backward(torch.cat(cotangents))
    parts = packed.packed.split(packed.packed_last_hidden_state)
    for image, out, cotangent in zip(images, parts, cotangents, strict=True):
        expected = theirs.forward_features(image[None])[0]
        assert relative_error(out, expected) <= 1e-5
        expected.backward(cotangent)
    mine = gradients_under_timms_names(ours)
    for key, parameter in theirs.named_parameters():
        assert relative_error(mine[key], parameter.grad) <= 1e-5, key


def test_cls_pooling_and_packed_gated_mlps_equal_timm(rng):
    """swiglu_align_to=0 gives timm's GluMlp, whose gate and value share one matrix."""
    name = "vit_small_plus_patch16_dinov3_qkvb"
    theirs, ours = pair_of(name, swiglu_align_to=0, global_pool="token")
    assert theirs.state_dict()["blocks.0.mlp.fc1.weight"].shape == (512, 64)
    assert ours.config.use_gated_mlp and ours.config.intermediate_size == 256
    x = torch.randn(2, 3, 48, 32, generator=rng)
    assert relative_error(ours(x).pooler_output, theirs(x)) <= 1e-5


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3_qkvb", "vit_7b_patch16_dinov3"])
def test_weights_go_to_timm_and_back_bit_equal(name, rng):
    theirs, ours = pair_of(name)
    fresh = timm.create_model(name, **SMALL).eval()
    load_into(fresh, ours.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key
    x = torch.randn(1, 3, 32, 48, generator=rng)
    assert torch.equal(fresh(x), theirs(x))


@pytest.mark.parametrize(("name", "timms"), [*BIASED.items(), *UNBIASED.items(), *EUPE.items()])
def test_the_family_has_the_sizes_that_timm_has(name, timms):
    assert UNBIASED.keys() | EUPE.keys() == CONFIGS.keys()
    changes = {} if timms.endswith("_qkvb") else {"query_bias": False, "value_bias": False}
    config = get_config(name, **changes)
    with torch.device("meta"):
        theirs = timm.create_model(timms, num_classes=0)
        stock = DINOv3ViTModel(config).state_dict()
    state = to_transformers(theirs.state_dict())
    expected = to_transformers(stock)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
    assert theirs.blocks[0].attn.num_heads == config.num_attention_heads
    assert theirs.norm.eps == config.layer_norm_eps
    assert infer_config(theirs.state_dict()).to_dict() == config.to_dict()


def test_eupe_runs_from_a_file_of_metas(tmp_path, rng):
    """With what its distillation leaves in the file."""
    theirs, ours = pair_of(EUPE["vitt16"], embed_dim=192, num_heads=3, depth=2)
    state = from_transformers(to_transformers(ours.state_dict()), "meta", ours.config)
    state |= {"projectors.dinov3.0.weight": torch.ones(4, 192)}
    state |= {f"local_cls_norm.{leaf}": torch.ones(192) for leaf in ("weight", "bias")}
    torch.save(state, tmp_path / "eupe_vitt16.pth")
    encoder = DINOv3Encoder.from_pretrained(tmp_path / "eupe_vitt16.pth").eval()
    images = [torch.randn(3, *shape, generator=rng) for shape in [(32, 48), (64, 16)]]
    with torch.no_grad():
        out = encoder(images)
        parts = out.packed.split(out.packed_last_hidden_state)
        for image, part in zip(images, parts, strict=True):
            assert relative_error(part, theirs.forward_features(image[None])[0]) <= 1e-5


DINOV2 = [
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_giant_patch14_dinov2",
]


@pytest.mark.parametrize("name", DINOV2)
def test_dinov2_equals_timm_in_the_square_of_its_weights(name, rng):
    """In others timm interpolates with antialiasing, as transformers does with registers only."""
    small = {"embed_dim": 96, "depth": 2, "num_heads": 2, "img_size": 56, "num_classes": 0}
    theirs = timm.create_model(name, **small).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            parameter.normal_(centre, 0.15, generator=rng)
    ours = DINOv2Encoder(infer_config(theirs.state_dict(), num_attention_heads=2)).eval()
    info = load_into(ours, theirs.state_dict())
    assert info.layout == "timm" and info.added == ("embeddings.mask_token",)
    x = torch.randn(2, 3, 56, 56, generator=rng)
    assert relative_error(ours(x).last_hidden_state, theirs.forward_features(x)) <= 1e-5
    fresh = timm.create_model(name, **small).eval()
    load_into(fresh, ours.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key
