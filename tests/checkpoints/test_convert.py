"""Checkpoints of every origin: recognised by keys, equal bit for bit after a round trip, strict."""

import math

import pytest
import torch
from torch import nn
from transformers import DINOv3ViTBackbone, DINOv3ViTModel

from hrvlm import DINOv3Encoder
from hrvlm.checkpoints.convert import (
    detect_layout,
    from_transformers,
    infer_config,
    load_into,
    to_transformers,
)
from hrvlm.checkpoints.family import CONFIGS, get_config
from tests.checkpoints.states import (
    assert_same,
    canonical_of,
    meta_features,
    meta_state,
    periods_of,
)
from tests.encoder.encoders import FAMILY, config_of, pair_of
from tests.numerics import relative_error

LAYOUTS = ("transformers", "transformers_memory", "fused", "meta", "timm")
PATCH = "embeddings.patch_embeddings.weight"
META_PATCH = "patch_embed.proj.weight"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILY)
def test_round_trip_from_transformers_is_bit_equal(name, layout):
    config, tensors = canonical_of(name)
    if layout == "timm" and config.key_bias:
        with pytest.raises(ValueError, match=r"'timm' can't express .* q and k and v"):
            from_transformers(tensors, layout, config)
        return
    there = from_transformers(tensors, layout, config)
    assert detect_layout(there) == layout
    back = to_transformers(there)
    # timm has no mask token: it comes back as transformers initialises it.
    lost = {"embeddings.mask_token"} if layout == "timm" else set()
    assert_same(back, tensors, but=lost)
    for key in lost:
        assert torch.equal(back[key], torch.zeros_like(tensors[key]))
    assert_same(from_transformers(back, layout, config), there)


@pytest.mark.parametrize("mask", ["nan", "one", None])
@pytest.mark.parametrize("name", ["vit", "vit_gated", "vit_7b", "no_registers_no_biases"])
def test_metas_checkpoint_has_metas_features_and_comes_back_bit_equal(name, mask, rng):
    config = config_of(name)
    state = meta_state(config, mask=mask)
    tensors = to_transformers(state)
    assert not [key for key in tensors if "k_proj.bias" in key]
    inferred = infer_config(state)
    assert inferred.to_diff_dict() == config.to_diff_dict()
    x = torch.randn(2, 3, 32, 48, generator=rng)
    expected = meta_features(state, config, x)
    for model in (DINOv3ViTModel(config), DINOv3Encoder(config)):
        info = load_into(model.eval(), state)
        assert (
            info.layout == "meta"
            and info.prefix == ""
            and info.added
            == (() if config.num_register_tokens else ("embeddings.register_tokens",))
        )
        assert relative_error(model(x).last_hidden_state, expected) <= 1e-5
    masks = {f"blocks.{i}.attn.qkv.bias_mask" for i in range(3)} if config.query_bias else set()
    back = from_transformers(tensors, "meta", config)
    assert_same(back, state, but={"rope_embed.periods", *masks})
    assert torch.allclose(back["rope_embed.periods"], state["rope_embed.periods"], rtol=2**-8)
    size = config.hidden_size
    expected_mask = torch.cat([torch.ones(size), torch.zeros(size), torch.ones(size)])
    assert all(torch.equal(back[key], expected_mask) for key in masks)


def test_the_key_bias_is_kept_only_where_it_counts():
    config = config_of()
    for mask, k_bias in (("nan", 0.5), ("one", 0.5), (None, 0.0), (None, math.nan)):
        tensors = to_transformers(meta_state(config, mask=mask, k_bias=k_bias))
        assert not [key for key in tensors if key.endswith("k_proj.bias")], (mask, k_bias)
    state = meta_state(config, mask=None)
    state["blocks.1.attn.qkv.bias"][64:128] = torch.arange(64.0)
    state["blocks.2.attn.qkv.bias"][64:128] = math.nan
    tensors = to_transformers(state)
    kept = [tensors[f"layer.{i}.attention.k_proj.bias"] for i in range(3)]
    zeros = torch.zeros(64)
    assert all(map(torch.equal, kept, (zeros, torch.arange(64.0), zeros)))
    assert infer_config(state).key_bias
    back = from_transformers(tensors, "meta", config)
    assert torch.equal(back["blocks.1.attn.qkv.bias"], state["blocks.1.attn.qkv.bias"])
    assert not [key for key in back if key.endswith("bias_mask")]
    # A model that says it has a bias of k keeps it, zero or not.
    _, stored = canonical_of("key_bias")
    stored |= {key: torch.zeros_like(v) for key, v in stored.items() if "k_proj.bias" in key}
    assert_same(to_transformers(from_transformers(stored, "fused")), stored)


def test_norms_of_training_are_left_out_and_one_that_counts_is_refused():
    state = meta_state(config_of())
    extra = {"local_cls_norm.weight": torch.ones(64), "local_cls_norm.bias": torch.ones(64)}
    extra["projectors.dinov3.0.weight"] = torch.ones(4, 64)  # of EUPE's distillation
    same = {"cls_norm.weight": state["norm.weight"], "cls_norm.bias": state["norm.bias"]}
    info = load_into(DINOv3Encoder(config_of()), state | extra | same)
    assert {*extra, *same} <= set(info.left_out)
    assert "local_cls_norm.weight" in str(info)
    with pytest.raises(ValueError, match=r"cls_norm\.weight differs .*untie_cls_and_patch_norms"):
        to_transformers(state | {"cls_norm.weight": 2 * state["norm.weight"]})


def test_other_forms_of_timm_are_read():
    """GluMlp with one fc1 (gate first), unfused q, k and v, and a classifier on top."""
    _, tensors = canonical_of("vit_gated")
    expected = tensors | {"embeddings.mask_token": torch.zeros(1, 1, 64)}
    state = from_transformers(tensors, "timm")
    packed = {key: value for key, value in state.items() if ".fc1_" not in key}
    for i in range(3):
        for leaf in ("weight", "bias"):
            parts = [state[f"blocks.{i}.mlp.fc1_{part}.{leaf}"] for part in "gx"]
            packed[f"blocks.{i}.mlp.fc1.{leaf}"] = torch.cat(parts)
        q, k, v = packed.pop(f"blocks.{i}.attn.qkv.weight").chunk(3)
        packed |= {f"blocks.{i}.attn.q_proj.weight": q, f"blocks.{i}.attn.k_proj.weight": k}
        packed |= {f"blocks.{i}.attn.v_proj.weight": v}
        for n in "qv":
            packed[f"blocks.{i}.attn.{n}_proj.bias"] = packed.pop(f"blocks.{i}.attn.{n}_bias")
    packed |= {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}
    assert_same(to_transformers(packed), expected)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "backbone.",
        "teacher.backbone.",
        "student.",
        "model.",
        "vision_encoder.",
        "vision_tower.",
        "encoder.",
        "_orig_mod.",
        "module.model.vision_model.encoder._fsdp_wrapped_module.",
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefixes_and_other_modules_are_looked_through(prefix, layout):
    config, tensors = canonical_of()
    state = from_transformers(tensors, layout, config)
    wrapped = {prefix + key: value for key, value in state.items()}
    wrapped = {
        key.replace("blocks.1.", "blocks.1._orig_mod.").replace(
            "layer.1.", "layer.1._checkpoint_wrapped_module."
        ): value
        for key, value in wrapped.items()
    }
    others = {} if prefix == "_orig_mod." else {"lm.embed_tokens.weight": torch.zeros(2, 2)}
    assert detect_layout(wrapped) == layout
    assert_same(to_transformers(wrapped | others), to_transformers(state))


def test_containers_and_training_states():
    _, tensors = canonical_of()
    teacher = from_transformers(tensors, "meta", config_of())
    student = {key: torch.zeros_like(value) for key, value in teacher.items()}
    state = {
        "epoch": 3,
        "args": {"lr": 0.1},
        "student": {f"module.backbone.{key}": value for key, value in student.items()},
        "teacher": {f"backbone.{key}": value for key, value in teacher.items()}
        | {"dino_head.last_layer.weight": torch.zeros(4, 4)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
    }
    assert_same(to_transformers(state), tensors)
    assert_same(to_transformers({"model": teacher}), tensors)
    info = load_into(DINOv3Encoder(config_of()), state)
    assert info.prefix == "teacher.backbone."
    assert "teacher.dino_head.last_layer.weight" in info.left_out
    two = {f"{side}.{key}": value for side in ("left", "right") for key, value in tensors.items()}
    with pytest.raises(
        ValueError, match=r"several encoders, under the prefixes 'left\.', 'right\.'"
    ):
        to_transformers(two)


def test_what_is_no_dinov3_checkpoint_says_so():
    with pytest.raises(ValueError, match=r"not the checkpoint of a DINOv3 or DINOv2.*patch_emb"):
        detect_layout(["vision_model.embeddings.patch_embedding.weight"])
    with pytest.raises(ValueError, match="none of the keys of either"):
        detect_layout([META_PATCH, "blocks.0.attn.qkv.weight"])
    with pytest.raises(ValueError, match="keys of both"):
        detect_layout([META_PATCH, "storage_tokens", "blocks.0.gamma_1"])
    with pytest.raises(ValueError, match=r"layout must be one of transformers, .* got 'jax'"):
        to_transformers({}, layout="jax")
    with pytest.raises(ValueError, match="got 'jax'"):
        from_transformers({}, "jax")
    _, tensors = canonical_of()
    # Positions make a DINOv2 of it, whose registers have another name.
    with pytest.raises(ValueError, match=r"unexpected \(1\): storage_tokens"):
        to_transformers(meta_state(config_of()) | {"pos_embed": torch.zeros(1, 5, 64)})
    with pytest.raises(
        ValueError, match=r"expected a weight \[C, channels, p, p\], got \[64, 768\]"
    ):
        to_transformers(tensors | {PATCH: tensors[PATCH].flatten(1)})


def test_the_report_groups_layers():
    _, tensors = canonical_of(num_hidden_layers=12)
    for i in range(12):
        del tensors[f"layer.{i}.norm1.weight"]
        tensors[f"layer.{i}.mlp.down_proj.weight"] = torch.zeros(64, 95)
    for i in (0, 1, 2, 5):
        del tensors[f"layer.{i}.attention.o_proj.weight"]
        tensors[f"layer.{i}.attention.relative.weight"] = torch.zeros(1)
    del tensors["norm.bias"]
    with pytest.raises(ValueError) as caught:
        to_transformers(tensors)
    assert str(caught.value).splitlines() == [
        "checkpoint in the transformers layout, under transformers' keys:",
        "missing (17): norm.bias, layer.{0..11}.norm1.weight (12), "
        "layer.{0..2,5}.attention.o_proj.weight (4)",
        "unexpected (4): layer.{0..2,5}.attention.relative.weight (4)",
        "shape [64, 95] instead of [64, 96] (12): layer.{0..11}.mlp.down_proj.weight (12)",
    ]


def test_a_gap_in_the_layers_is_missing_keys():
    _, tensors = canonical_of()
    short = {key: value for key, value in tensors.items() if not key.startswith("layer.1.")}
    with pytest.raises(ValueError, match=r"layer\.1\.norm1\.weight"):
        to_transformers(short)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_the_family_are_inferred_from_shapes(name):
    config = get_config(name)
    with torch.device("meta"):
        state = DINOv3ViTModel(config).state_dict()
    assert infer_config(state).to_dict() == config.to_dict()


def test_inferred_configs_take_overrides_and_refuse_to_guess():
    _, tensors = canonical_of()  # hidden size 64, two heads: not in the family
    with pytest.raises(
        ValueError, match=r"hidden_size 64 is not in the family .* num_attention_heads"
    ):
        infer_config(tensors)
    assert infer_config(tensors, num_attention_heads=2, rope_theta=50.0).rope_theta == 50.0
    with pytest.raises(TypeError, match="no fields of DINOv3ViTConfig: heads"):
        infer_config(tensors, heads=2)
    with pytest.raises(ValueError, match="name must be one of vitt16, vits16, "):
        get_config("vitg14")
    assert get_config("vits16", image_size=512).image_size == 512

    theta = infer_config(meta_state(config_of("patch_8")) | periods_of(50.0))
    assert theta.rope_theta == 50.0 and theta.num_attention_heads == 2
    linear = {"rope_embed.periods": torch.linspace(1, 8, 8)}
    with pytest.raises(ValueError, match=r"not exact powers of one rope_theta .*: pass rope_theta"):
        infer_config(meta_state(config_of()) | linear)
    assert infer_config(meta_state(config_of()) | linear, rope_theta=7.0).rope_theta == 7.0


@pytest.mark.parametrize("source", LAYOUTS)
def test_load_into_every_model(source, rng):
    theirs, _ = pair_of()
    x = torch.randn(1, 3, 32, 48, generator=rng)
    expected = theirs(x).last_hidden_state
    state = from_transformers(theirs.state_dict(), source, theirs.config)
    with torch.device("meta"):
        hollow = DINOv3Encoder(theirs.config)
    models = [DINOv3ViTModel(theirs.config), DINOv3Encoder(theirs.config), hollow]
    for model in (*models, torch.compile(DINOv3ViTModel(theirs.config))):
        assert load_into(model, state).layout == source
        out = getattr(model, "_orig_mod", model).eval()(x).last_hidden_state
        assert relative_error(out, expected) <= 1e-5
    backbone = DINOv3ViTBackbone(theirs.config).eval()
    load_into(backbone, state)
    assert_same(backbone.state_dict(), theirs.state_dict(), but=_lost(source))
    assert_same(to_transformers(models[1].state_dict()), to_transformers(state))


def _lost(layout):
    return {"embeddings.mask_token"} if layout == "timm" else set()


def test_load_into_is_all_or_nothing():
    _, tensors = canonical_of()
    model = DINOv3Encoder(config_of(num_hidden_layers=4, query_bias=False))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = r"\(transformers layout\) does not fit.*\nmissing \(14\).*\nunexpected \(3\)"
    with pytest.raises(ValueError, match=message):
        load_into(model, tensors)
    assert_same(model.state_dict(), before)
    holder = nn.ModuleDict({"vision_encoder": DINOv3Encoder(config_of())})
    with pytest.raises(ValueError, match="its encoder is 'vision_encoder'; pass that part"):
        load_into(holder, tensors)


class MetaModel(nn.Module):
    """Holds the parameters and buffers of Meta's model under its names."""

    def __init__(self, state):
        super().__init__()
        for key, value in state.items():
            *path, leaf = key.split(".")
            module = self
            for name in path:
                if name not in module._modules:
                    module.add_module(name, nn.Module())
                module = module._modules[name]
            module.register_buffer(leaf, torch.full_like(value, math.nan))


@pytest.mark.parametrize("mask", ["nan", None])
def test_load_into_metas_model(mask):
    theirs, _ = pair_of()
    model = MetaModel(meta_state(theirs.config, mask=mask))
    model.rope_embed.periods.copy_(periods_of(100.0)["rope_embed.periods"])
    load_into(model, theirs.state_dict())
    loaded = model.state_dict()
    assert not any(value.isnan().any() for value in loaded.values())
    assert_same(to_transformers(loaded), canonical_of()[1])
