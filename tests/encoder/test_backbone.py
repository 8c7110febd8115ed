"""Features of several layers, for heads that want more: the backbone, and Meta's method."""

import copy

import pytest
import timm
import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    DINOv3ViTBackbone,
    DPTConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.models.dpt.modeling_dpt import DPTDepthEstimationHead, DPTNeck

from hrvlm import DINOv3Backbone, DINOv3BackboneConfig, DINOv3Encoder
from hrvlm.checkpoints.convert import load_into
from tests.encoder.encoders import config_of, pair_of
from tests.tiny import randomize


def backbones_of(**changes):
    """Transformers' backbone and ours with equal weights."""
    config = config_of(**changes)
    theirs = randomize(DINOv3ViTBackbone(config)).eval()
    ours = DINOv3Backbone(DINOv3BackboneConfig(**config.to_dict() | {"model_type": "x"})).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("apply_layernorm", [True, False])
@pytest.mark.parametrize("reshape", [True, False])
def test_feature_maps_are_those_of_transformers(apply_layernorm, reshape, rng):
    theirs, ours = backbones_of(
        out_features=["stem", "stage2", "stage3"],
        apply_layernorm=apply_layernorm,
        reshape_hidden_states=reshape,
        return_class_token=True,
    )
    images = torch.randn(2, 3, 32, 64, generator=rng)
    want, got = (m(images, output_hidden_states=True) for m in (theirs, ours))
    assert len(got.feature_maps) == len(got.cls_tokens) == 3
    for field in ("feature_maps", "cls_tokens", "hidden_states"):
        for ours_, theirs_ in zip(got[field], want[field], strict=True):
            close(ours_, theirs_)
    close(got.last_hidden_state, want.last_hidden_state)
    assert ours(images).hidden_states is None
    for name in ("stage_names", "out_features", "out_indices", "channels", "num_features"):
        assert getattr(ours, name) == getattr(theirs, name), name
    close(ours(images, return_dict=False)[0][0], got.feature_maps[0])


def test_images_of_several_sizes_have_the_maps_that_they_have_alone(rng):
    _, ours = backbones_of(out_indices=[1, 3], return_class_token=True)
    images = [torch.randn(3, h, w, generator=rng) for h, w in ((32, 64), (16, 16), (48, 32))]
    out = ours(images)
    for i, image in enumerate(images):
        alone = ours(image[None])
        for stage in range(2):
            close(out.feature_maps[stage][i], alone.feature_maps[stage][0])
            close(out.cls_tokens[stage][i], alone.cls_tokens[stage][0])


def test_what_a_backbone_has_not_is_named(rng):
    _, ours = backbones_of()
    images = torch.randn(1, 3, 32, 32, generator=rng)
    with pytest.raises(ValueError, match="output_attentions=True"):
        ours(images, output_attentions=True)
    with pytest.raises(TypeError, match="out_indicez"):
        ours(images, out_indicez=[1])


def test_the_auto_class_makes_it_from_its_config_and_files_go_both_ways(tmp_path, rng):
    theirs, ours = backbones_of(out_features=["stage1"])
    assert type(AutoBackbone.from_config(ours.config)) is DINOv3Backbone
    images = torch.randn(1, 3, 32, 48, generator=rng)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    config = AutoConfig.from_pretrained(tmp_path / "ours")
    assert type(config) is DINOv3BackboneConfig and config.out_features == ["stage1"]
    for folder in ("theirs", "ours"):
        loaded = DINOv3Backbone.from_pretrained(tmp_path / folder).eval()
        assert torch.equal(loaded(images).feature_maps[0], ours(images).feature_maps[0])
        assert type(loaded.config) is DINOv3BackboneConfig
    file = tmp_path / "theirs" / "model.safetensors"
    heads = {"num_attention_heads": ours.config.num_attention_heads}
    of_file = DINOv3Backbone.from_pretrained(file, out_features=["stage2"], **heads)
    assert of_file.out_features == ["stage2"] and len(of_file(images).feature_maps) == 1
    assert DINOv3Backbone.from_pretrained(file, out_indices=[0, 1], **heads).out_indices == [0, 1]
    with pytest.raises(TypeError, match="out_featurez"):
        DINOv3Backbone.from_pretrained(file, out_featurez=["stage2"])
    encoder = DINOv3Encoder.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(encoder(images).last_hidden_state, ours(images).last_hidden_state)
    again = DINOv3ViTBackbone.from_pretrained(tmp_path / "ours", config=theirs.config).eval()
    assert torch.equal(again(images).feature_maps[0], theirs(images).feature_maps[0])


def test_upernet_segments_with_it_as_with_transformers_backbone(tmp_path, rng):
    def upernet(config):
        heads = {"hidden_size": 16, "auxiliary_channels": 8, "num_labels": 5, "pool_scales": [1, 2]}
        return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=config, **heads)).eval()

    stock = config_of(out_indices=[1, 2, 3])
    theirs = randomize(upernet(stock))
    model = upernet(DINOv3BackboneConfig(**stock.to_dict() | {"model_type": "x"}))
    assert type(model.backbone) is DINOv3Backbone
    model.load_state_dict(theirs.state_dict())
    images, labels = torch.randn(2, 3, 64, 96, generator=rng), torch.zeros(2, 64, 96).long()
    out = model(images, labels=labels)
    scale = out.logits.abs().max()
    close(out.logits / scale, theirs(images).logits / scale)
    out.loss.backward()
    assert model.backbone.layer[0].attention.qkv.weight.grad.any()
    model.save_pretrained(tmp_path)
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    # Once, beside other work, not the same bits; the cause was not found in 60 more tries.
    close(loaded(images).logits / scale, model(images).logits / scale)


# Meta's method


def metas(encoder, x, n, *, reshape, return_class_token, return_extra_tokens, norm):
    """Their rule on hidden states: vision_transformer.py of DINOv3, get_intermediate_layers."""
    states = encoder(x, output_hidden_states=True).hidden_states[1:]
    blocks = range(len(states) - n, len(states)) if isinstance(n, int) else n
    outputs = [states[i] for i in range(len(states)) if i in blocks]
    outputs = [encoder.norm(o) for o in outputs] if norm else outputs
    cls, extra = [o[:, 0] for o in outputs], [o[:, 1:5] for o in outputs]
    outputs = [o[:, 5:] for o in outputs]
    if reshape:
        b, _, h, w = x.shape
        outputs = [o.reshape(b, h // 16, w // 16, -1).permute(0, 3, 1, 2) for o in outputs]
    if return_class_token and return_extra_tokens:
        return tuple(zip(outputs, cls, extra, strict=True))
    if return_class_token or return_extra_tokens:
        return tuple(zip(outputs, cls if return_class_token else extra, strict=True))
    return tuple(outputs)


@pytest.mark.parametrize("n", [1, 2, [0, 2]])
@pytest.mark.parametrize("returned", [(False, False), (True, False), (False, True), (True, True)])
def test_intermediate_layers_are_as_metas(n, returned, rng):
    _, encoder = pair_of()
    x = torch.randn(2, 3, 32, 48, generator=rng)
    flags = dict(zip(("return_class_token", "return_extra_tokens"), returned, strict=True))
    for reshape in (False, True):
        for norm in (False, True):
            options = flags | {"reshape": reshape, "norm": norm}
            got, want = (
                encoder.get_intermediate_layers(x, n, **options),
                metas(encoder, x, n, **options),
            )
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_intermediate_layers_are_as_timms(rng):
    torch.manual_seed(0)
    theirs = timm.create_model("vit_small_patch16_dinov3_qkvb", pretrained=False, depth=3).eval()
    randomize(theirs)
    encoder = DINOv3Encoder(
        config_of(hidden_size=384, intermediate_size=1536, num_attention_heads=6)
    ).eval()
    load_into(encoder, copy.deepcopy(theirs.state_dict()))
    x = torch.randn(1, 3, 32, 48, generator=rng)
    for n in (2, [0, -1]):
        want = theirs.forward_intermediates(
            x, n, return_prefix_tokens=True, output_fmt="NCHW", intermediates_only=True
        )
        got = encoder.get_intermediate_layers(
            x, n, reshape=True, return_class_token=True, return_extra_tokens=True, norm=False
        )
        for (maps, cls, extra), (their_maps, prefix) in zip(got, want, strict=True):
            scale = their_maps.abs().max()
            close(maps / scale, their_maps / scale)
            close(torch.cat((cls[:, None], extra), 1) / scale, prefix / scale)


def test_intermediate_layers_of_several_sizes_are_by_image(rng):
    _, encoder = pair_of()
    images = [torch.randn(3, h, w, generator=rng) for h, w in ((32, 48), (16, 16))]
    options = {"reshape": True, "return_class_token": True, "return_extra_tokens": True}
    packed = encoder.get_intermediate_layers(images, 2, **options)
    for i, image in enumerate(images):
        for own, of_all in zip(
            encoder.get_intermediate_layers(image[None], 2, **options), packed, strict=True
        ):
            for alone, together in zip(own, of_all, strict=True):
                close(together[i], alone[0])


@pytest.mark.parametrize("n", [0, 4, [3], [-4]])
def test_a_block_that_is_not_there_is_named(n):
    _, encoder = pair_of()
    with pytest.raises(ValueError, match="expected 1 to 3 blocks" if isinstance(n, int) else "-3"):
        encoder.get_intermediate_layers(torch.zeros(1, 3, 32, 32), n)


def test_a_dpt_neck_and_head_predict_depth_from_intermediate_layers(rng):
    _, encoder = pair_of()
    config = DPTConfig(
        backbone_config=config_of(),
        neck_hidden_sizes=[8, 8, 16],
        fusion_hidden_size=8,
        reassemble_factors=[2, 1, 0.5],
        backbone_out_indices=[0, 1, 2],
        readout_type="project",
        head_in_index=-1,
    )
    neck, head = randomize(DPTNeck(config)).eval(), randomize(DPTDepthEstimationHead(config)).eval()
    images = torch.randn(2, 3, 64, 96, generator=rng)
    layers = encoder.get_intermediate_layers(images, [0, 1, 2], return_class_token=True)
    tokens = [torch.cat((cls[:, None], patches), 1) for patches, cls in layers]
    depth = head(neck(tokens, 4, 6))
    assert depth.shape == (2, 32, 48)
    depth.sum().backward()
    assert encoder.layer[0].attention.qkv.weight.grad.any()
