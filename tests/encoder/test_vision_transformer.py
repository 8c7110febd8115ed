"""DINOv3Encoder against transformers' DINOv3ViTModel, and what it does beyond it."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree
from transformers import DINOv3ViTModel

from hrvlm import DINOv3Encoder, EncoderOutput, PackedEncoderOutput, pack_images
from hrvlm.checkpoints.family import CONFIGS, get_config
from hrvlm.encoder import fused_blocks
from hrvlm.encoder.rope import augmented_coords
from hrvlm_kernels import PackedGrids
from tests.encoder.encoders import FAMILY, config_of, pair_of
from tests.numerics import relative_error

SHAPES = [(32, 48), (64, 16), (16, 16), (48, 80)]


def images_of(shapes, rng):
    return [torch.randn(3, *shape, generator=rng) for shape in shapes]


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 32, 80)])
def test_a_batch_equals_transformers_forward_and_gradients(name, shape, rng):
    theirs, ours = pair_of(name)
    batch, height, width = shape
    x = torch.randn(batch, 3, height, width, generator=rng)
    x_theirs, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = theirs(x_theirs, output_hidden_states=True), ours(x_ours, output_hidden_states=True)
    assert isinstance(b, EncoderOutput)
    assert relative_error(b.last_hidden_state, a.last_hidden_state) <= 1e-5
    assert relative_error(b.pooler_output, a.pooler_output) <= 1e-5
    assert len(a.hidden_states) == len(b.hidden_states)
    for i, j in zip(b.hidden_states, a.hidden_states, strict=True):
        assert i.shape == j.shape and relative_error(i, j) <= 1e-5
        i.retain_grad()
        j.retain_grad()

    cotangent = torch.randn(a.last_hidden_state.shape, generator=rng)
    a.last_hidden_state.backward(cotangent)
    b.last_hidden_state.backward(cotangent)
    assert relative_error(x_ours.grad, x_theirs.grad) <= 1e-5
    for i, j in zip(b.hidden_states, a.hidden_states, strict=True):
        assert relative_error(i.grad, j.grad) <= 1e-5
    gradients = {k: p.grad for k, p in theirs.named_parameters()}
    for key, parameter in ours.named_parameters():
        assert (
            key == UNUSED or relative_error(parameter.grad, theirs_gradient(gradients, key)) <= 1e-5
        ), key


UNUSED = "embeddings.mask_token"


def theirs_gradient(gradients, key):
    """The gradient of transformers' parameters that make up ours."""
    key = key if key.startswith(("embeddings", "norm")) else f"model.{key}"
    if key.endswith("qkv.weight"):
        return torch.cat([gradients[key.replace("qkv", f"{n}_proj")] for n in "qkv"])
    if ".qkv_bias." in key:
        name = key[-len("q_bias")]
        return gradients[key.replace(f"qkv_bias.{name}_bias", f"{name}_proj.bias")]
    if gradients[key] is None:
        return torch.zeros(1)
    return gradients[key]


@pytest.mark.parametrize("name", FAMILY)
def test_mixed_shapes_equal_transformers_image_by_image(name, rng):
    theirs, ours = pair_of(name)
    images = images_of(SHAPES, rng)
    out = ours(images)
    assert isinstance(out, PackedEncoderOutput)
    p = ours.patch_size
    assert out.grids == tuple((h // p, w // p) for h, w in SHAPES)
    for i, (image, tokens) in enumerate(
        zip(images, out.packed.split(out.packed_last_hidden_state), strict=True)
    ):
        expected = theirs(image[None])
        assert relative_error(tokens, expected.last_hidden_state[0]) <= 1e-5
        assert relative_error(out.cls[i], expected.pooler_output[0]) <= 1e-5


def test_mixed_shapes_have_the_gradients_of_transformers_image_by_image(rng):
    theirs, ours = pair_of("vit_gated")
    images = images_of(SHAPES, rng)
    out = ours(images)
    cotangent = torch.randn(out.packed_last_hidden_state.shape, generator=rng)
    out.packed_last_hidden_state.backward(cotangent)
    for image, part in zip(images, out.packed.split(cotangent), strict=True):
        theirs(image[None]).last_hidden_state.backward(part[None])
    gradients = {k: p.grad for k, p in theirs.named_parameters()}
    for key, parameter in ours.named_parameters():
        assert (
            key == UNUSED or relative_error(parameter.grad, theirs_gradient(gradients, key)) <= 1e-5
        ), key


def test_packed_patches_with_grids_of_every_kind_equal_the_list(rng):
    _, ours = pair_of()
    images = images_of(SHAPES, rng)
    expected = ours(images).packed_last_hidden_state
    patches, grids = pack_images(images, 16)
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=5)
    for given in (grids, torch.tensor(grids), packed, tuple(grids)):
        assert torch.equal(ours(patches, grids=given).packed_last_hidden_state, expected)


def test_views_of_the_packed_output(rng):
    _, ours = pair_of()
    images = images_of(SHAPES[:2], rng)
    out = ours(images, output_prefix_attentions=True)
    segments = out.packed.split(out.packed_last_hidden_state)
    assert torch.equal(out.cls, torch.stack([s[0] for s in segments]))
    assert torch.equal(out.pooler_output, out.cls)
    assert torch.equal(out.registers, torch.stack([s[1:5] for s in segments]))
    assert len(out.patches) == len(out.cls) == len(out.registers) == len(images)
    for patches, tokens in zip(out.patches, segments, strict=True):
        assert torch.equal(patches, tokens[5:])
    assert torch.equal(out.packed_patches, torch.cat(out.patches))
    for features, tokens, (hp, wp) in zip(out.to_maps(), segments, out.grids, strict=True):
        assert features.shape == (64, hp, wp)
        assert torch.equal(features[:, hp - 1, 0], tokens[5 + (hp - 1) * wp])


def test_a_batchs_names_are_not_those_of_a_pack(rng):
    """Whose index is an image there and a token here; the error says where to look."""
    _, ours = pair_of()
    with torch.no_grad():
        out = ours(images_of(SHAPES[:2], rng), output_hidden_states=True)
    for name in ("last_hidden_state", "hidden_states", "prefix_attentions"):
        assert not hasattr(out, name)
        with pytest.raises(AttributeError, match=f"have packed_{name}, .*patches by image"):
            getattr(out, name)
    with pytest.raises(AttributeError, match="'PackedEncoderOutput' object has no attribute 'cl'"):
        _ = out.cl
    for again in (
        copy.deepcopy(out),
        pickle.loads(pickle.dumps(out)),
        pytree.tree_map(lambda x: x, out),
    ):
        assert again.keys() == out.keys() and again.grids == out.grids
        assert all(map(torch.equal, again.patches, out.patches))


def test_compiled_code_reads_the_patches_of_each_image(rng):
    _, ours = pair_of(num_hidden_layers=1)
    patches, grids = pack_images(images_of(SHAPES[:2], rng), 16)
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=5)

    def read(patches):
        out = ours(patches, grids=packed)
        return out.patches, out.packed_patches

    with torch.no_grad():
        (got, rows), (expected, _) = (
            torch.compile(read, backend="eager", fullgraph=True)(patches),
            read(patches),
        )
    assert all(map(torch.equal, got, expected)) and torch.equal(rows, torch.cat(expected))


def test_prefix_attentions_of_a_batch_are_by_image(rng):
    _, ours = pair_of()
    x = torch.randn(2, 3, 32, 48, generator=rng)
    batch = ours(x, output_prefix_attentions=True).prefix_attentions
    packed = ours(list(x), output_prefix_attentions=True)
    for layer, rows in zip(batch, packed.packed_prefix_attentions, strict=True):
        assert torch.equal(layer, torch.stack(rows.split(packed.packed.lengths, dim=-1)))


def test_prefix_attentions_equal_transformers_eager_attention(rng):
    theirs, ours = pair_of()
    theirs.set_attn_implementation("eager")
    images = images_of(SHAPES[:3], rng)
    out = ours(images, output_prefix_attentions=True)
    for i, image in enumerate(images):
        expected = theirs(image[None], output_attentions=True).attentions
        for layer, full in enumerate(expected):
            part = out.packed_prefix_attentions[layer].split(out.packed.lengths, dim=-1)[i]
            torch.testing.assert_close(part, full[0, :, :5].transpose(0, 1), rtol=1e-4, atol=1e-6)
        hp, wp = out.grids[i]
        torch.testing.assert_close(
            out.attention_maps(0)[i],
            expected[0][0, :, :5, 5:].transpose(0, 1).unflatten(-1, (hp, wp)),
        )
    with pytest.raises(ValueError, match="output_prefix_attentions=True"):
        ours(images).attention_maps()


def test_selected_layers_follow_hidden_states_and_state_their_norm(rng):
    _, ours = pair_of()
    x = torch.randn(2, 3, 32, 48, generator=rng)
    out = ours(x, out_indices=(0, -1, 2), apply_layernorm=False, output_hidden_states=True)
    for got, i in zip(out.selected_hidden_states, (0, 3, 2), strict=True):
        assert torch.equal(got, out.hidden_states[i])
    normed = ours(x, out_indices=(-1,)).selected_hidden_states[0]
    assert torch.equal(normed, out.last_hidden_state)
    assert not torch.equal(out.hidden_states[-1], out.last_hidden_state)
    packed = ours(list(x), out_indices=(2,), apply_layernorm=False)
    torch.testing.assert_close(
        packed.packed_selected_hidden_states[0], out.hidden_states[2].flatten(0, 1)
    )
    assert packed.packed_hidden_states is None
    with pytest.raises(ValueError, match=r"out_indices: 4 is outside -4..3"):
        ours(x, out_indices=(4,))


def test_masked_patches_equal_transformers_for_batch_list_and_packed(rng):
    theirs, ours = pair_of()
    x = torch.randn(2, 3, 32, 48, generator=rng)
    mask = torch.rand(2, 6, generator=rng) < 0.5
    expected = theirs(x, bool_masked_pos=mask).last_hidden_state
    assert not torch.allclose(expected, theirs(x).last_hidden_state)
    assert relative_error(ours(x, mask).last_hidden_state, expected) <= 1e-5
    as_list = ours(list(x), [mask[0], mask[1].view(2, 3)]).packed_last_hidden_state
    assert relative_error(as_list.view_as(expected), expected) <= 1e-5
    with pytest.raises(ValueError, match=r"bool_masked_pos .* \(12\); got torch.bool and 6"):
        ours(x, mask[:1])
    with pytest.raises(ValueError, match="bool_masked_pos must be bool"):
        ours(x, mask.long())


def test_images_do_not_see_each_other_and_order_does_not_matter(rng):
    _, ours = pair_of()
    images = images_of(SHAPES, rng)
    alone = [ours([image]).packed_last_hidden_state for image in images]
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 7):
        out = ours([images[i] for i in order])
        for i, tokens in zip(order, out.packed.split(out.packed_last_hidden_state), strict=True):
            assert relative_error(tokens, alone[i]) <= 1e-6
    grown = [image.clone().requires_grad_() for image in images]
    out = ours(grown)
    cotangent = torch.randn(out.packed_last_hidden_state.shape, generator=rng)
    part = out.packed.split(cotangent)[2]
    out.packed.split(out.packed_last_hidden_state)[2].backward(part)
    assert (
        all((g.grad == 0).all() for i, g in enumerate(grown) if i != 2)
        and (grown[2].grad != 0).any()
    )


def test_bfloat16_errs_no_more_than_transformers():
    """Against float64 on the same bfloat16 weights and pixels.

    Attention is made sharp (q and k of size 4), so that the rounding of the rotated q and k shows
    beside the rounding of the products, which both models share; the mean of four models compares
    more than one draw of it.
    """
    ours_errors, theirs_errors = [], []
    for seed in range(4):
        theirs, ours = pair_of(seed=seed)
        with torch.no_grad():
            for key, parameter in theirs.named_parameters():
                parameter *= 4 if "q_proj" in key or "k_proj" in key else 1
        ours.load_state_dict(theirs.state_dict())
        theirs, ours = theirs.bfloat16(), ours.bfloat16()
        oracle = copy.deepcopy(ours).double()
        oracle.backend = "eager"
        x = torch.randn(2, 3, 128, 256, generator=torch.Generator().manual_seed(seed)).bfloat16()
        with torch.no_grad():
            expected = oracle(x.double()).last_hidden_state
            ours_errors.append(relative_error(ours(x).last_hidden_state, expected))
            theirs_errors.append(relative_error(theirs(x).last_hidden_state, expected))
    assert sum(ours_errors) <= sum(theirs_errors), (ours_errors, theirs_errors)


def test_moving_the_image_by_one_patch_changes_the_attention(rng):
    """The shift test: the same content elsewhere on the true grid scores differently."""
    _, ours = pair_of()
    canvas = torch.zeros(3, 64, 96)
    canvas[:, 16:32, 16:32] = torch.randn(3, 16, 16, generator=rng)
    moved = canvas.roll(16, dims=2)
    first, second = ours([canvas, moved], output_prefix_attentions=True).attention_maps(0)
    same_patch = (first[0, :, 1, 1], second[0, :, 1, 2])
    assert (same_patch[0] - same_patch[1]).abs().max() > 1e-4
    for layer in ours.layer:
        layer.attention.rope_theta = None
    first, second = ours([canvas, moved], output_prefix_attentions=True).attention_maps(0)
    torch.testing.assert_close(first[0, :, 1, 1], second[0, :, 1, 2])


def test_use_rope_false_in_the_config_turns_rotation_off(rng):
    config = config_of()
    config.use_rope = False
    x = torch.randn(1, 3, 32, 48, generator=rng)
    encoder = DINOv3Encoder(config).eval()
    swapped = torch.cat((x[..., 16:32], x[..., :16], x[..., 32:]), dim=-1)
    torch.testing.assert_close(encoder(x).pooler_output, encoder(swapped).pooler_output)


def test_frequencies_survive_casts_deepcopy_and_the_meta_device(tmp_path, rng):
    _, ours = pair_of()
    x = torch.randn(1, 3, 48, 80, generator=rng)
    # bfloat16 weights to begin with, so that the round trip through bfloat16 changes nothing else.
    ours = ours.bfloat16().float()
    expected = ours(x).last_hidden_state
    assert torch.equal(ours.to(torch.bfloat16).to(torch.float32)(x).last_hidden_state, expected)
    assert torch.equal(copy.deepcopy(ours)(x).last_hidden_state, expected)
    with torch.device("meta"):
        hollow = DINOv3Encoder(ours.config).eval()
    hollow.load_state_dict(ours.state_dict(), assign=True)
    assert torch.equal(hollow(x).last_hidden_state, expected)
    ours.save_pretrained(tmp_path)
    assert torch.equal(DINOv3Encoder.from_pretrained(tmp_path)(x).last_hidden_state, expected)
    assert not [name for name, _ in ours.named_buffers()]


@pytest.mark.parametrize("name", FAMILY)
def test_save_and_load_are_bit_equal_both_ways_with_transformers(name, tmp_path):
    theirs, ours = pair_of(name)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    back, report = DINOv3ViTModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    for key, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    loaded, report = DINOv3Encoder.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values())
    again = DINOv3Encoder.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    for key, value in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_of_the_family_has_the_parameters_of_transformers(name):
    config = get_config(name)
    with torch.device("meta"):
        theirs, ours = DINOv3ViTModel(config), DINOv3Encoder(config)
    loaded = ours.load_state_dict(theirs.state_dict(), assign=True)
    assert not loaded.missing_keys and not loaded.unexpected_keys
    assert ours.num_parameters() == theirs.num_parameters()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_of_the_family_equals_transformers_in_two_blocks(name, rng):
    """The true head_dim and options with two blocks; H+ and 7B with two of their heads."""
    config = get_config(name, num_hidden_layers=2)
    if config.hidden_size > 1024:
        shrink = config.hidden_size // (2 * config.hidden_size // config.num_attention_heads)
        config.hidden_size //= shrink
        config.intermediate_size //= shrink
        config.num_attention_heads //= shrink
    theirs = DINOv3ViTModel(config).eval()
    ours = DINOv3Encoder(config).eval()
    ours.load_state_dict(theirs.state_dict())
    images = images_of([(32, 64), (48, 16)], rng)
    out = ours(images)
    for image, tokens in zip(images, out.packed.split(out.packed_last_hidden_state), strict=True):
        assert relative_error(tokens, theirs(image[None]).last_hidden_state[0]) <= 1e-5


def test_load_state_dict_takes_the_keys_of_transformers_files_without_strictness(tmp_path):
    """Trainer resumes with strict=False and raw keys: nothing may be skipped."""
    from safetensors.torch import load_file

    theirs, ours = pair_of("key_bias")
    theirs.save_pretrained(tmp_path)
    fresh = DINOv3Encoder(ours.config)
    result = fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    for key, value in ours.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


def test_backend_is_an_argument_a_config_field_and_checked(tmp_path):
    _, ours = pair_of()
    ours.save_pretrained(tmp_path)
    assert DINOv3Encoder.from_pretrained(tmp_path).backend == "auto"
    assert DINOv3Encoder.from_pretrained(tmp_path, backend="eager").backend == "eager"
    config = config_of()
    config.backend = "sdpa"
    assert DINOv3Encoder(config).backend == "sdpa"
    with pytest.raises(ValueError, match="got 'fast'"):
        DINOv3Encoder(config, backend="fast")


def test_eager_and_sdpa_backends_agree(rng):
    _, ours = pair_of()
    images = images_of(SHAPES, rng)
    expected = ours(images).packed_last_hidden_state
    ours.backend = "eager"
    assert relative_error(ours(images).packed_last_hidden_state, expected) <= 1e-6


def test_gradient_checkpointing_gives_the_same_gradients(rng):
    _, ours = pair_of()
    images = images_of(SHAPES, rng)
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(ours).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            calls = []
            model.layer[1].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        out = model(images).packed_last_hidden_state
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(5)))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(calls) == 2, "the block was not run again in the backward pass"
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_frozen_encoder_stays_in_eval_and_keeps_no_graph(rng):
    _, ours = pair_of(drop_path_rate=0.5)
    x = torch.randn(2, 3, 32, 32, generator=rng)
    ours.freeze()
    wrapper = torch.nn.ModuleDict({"encoder": ours}).train()
    assert not ours.training and not any(m.training for m in ours.modules()) and wrapper.training
    first = ours(x)
    assert not first.last_hidden_state.requires_grad
    assert torch.equal(first.last_hidden_state, ours(x).last_hidden_state)
    ours.embeddings.mask_token.requires_grad_(False)
    ours.unfreeze().train()
    assert all(p.requires_grad for p in ours.parameters())
    ours.embeddings.mask_token.requires_grad_(False)
    ours.freeze().freeze().unfreeze().train()
    assert [n for n, p in ours.named_parameters() if not p.requires_grad] == [UNUSED]
    assert ours.training and ours(x).last_hidden_state.requires_grad


def test_rope_augmentation_acts_only_when_asked_for(rng):
    _, ours = pair_of(pos_embed_rescale=2.0, pos_embed_shift=0.3, pos_embed_jitter=1.5)
    images = images_of(SHAPES[:2], rng)
    ours.train()
    assert torch.equal(ours(images).packed_last_hidden_state, ours(images).packed_last_hidden_state)
    torch.manual_seed(0)
    augmented = ours(images, rope_augment=True).packed_last_hidden_state
    assert relative_error(augmented, ours(images).packed_last_hidden_state) > 1e-3
    assert (
        relative_error(augmented, ours(images, rope_augment=True).packed_last_hidden_state) > 1e-3
    )
    torch.manual_seed(0)
    assert torch.equal(augmented, ours(images, rope_augment=True).packed_last_hidden_state)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches of the interpreter")
@pytest.mark.parametrize("augment", [False, True])
def test_all_layers_read_one_table_of_rotations(augment, rng, monkeypatch):
    """As if each had computed its own; of drawn coordinates too."""
    from hrvlm_kernels.triton_kernels import attention_tiles, rope_2d

    drawn = {"pos_embed_shift": 0.5, "pos_embed_rescale": 2.0}
    config = config_of(num_hidden_layers=2, num_attention_heads=4, **drawn)
    encoder = DINOv3Encoder(config, allow_fp16=True, backend="triton").half().eval()
    images = [image.half() for image in images_of([(32, 48), (16, 16)], rng)]
    written, write = [], rope_2d.write_table
    for module in (rope_2d, attention_tiles):
        noted = lambda *args: (written.append(args[2].shape), write(*args))  # noqa: E731
        monkeypatch.setattr(module, "write_table", noted)

    def run():
        written.clear()
        torch.manual_seed(0)
        with torch.no_grad():
            return encoder(images, rope_augment=augment).packed_last_hidden_state

    shared = run()
    assert written == [(17, 16)]
    monkeypatch.setattr(type(encoder.layer[0].attention), "with_rope_table", lambda s, p, *a: p)
    assert torch.equal(run(), shared) and len(written) == 2


def test_augmented_coordinates_keep_prefix_tokens_at_the_origin_and_the_limits():
    _, ours = pair_of(pos_embed_rescale=2.0, pos_embed_shift=None, pos_embed_jitter=None)
    packed = PackedGrids.from_grids([(4, 6), (3, 3)], num_prefix_tokens=5)
    for _ in range(20):
        coords = augmented_coords(packed, ours.config)
        ratios = []
        for new, old in zip(packed.split(coords), packed.split(packed.coords), strict=True):
            assert (new[:5] == 0).all()
            moved = old[5:].abs() > 0.01
            ratio = new[5:][moved] / old[5:][moved]
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
            ratios.append(ratio[0].item())
        assert all(0.5 <= r <= 2.0 for r in ratios) and ratios[0] != ratios[1]


def test_positions_survive_a_cast_of_every_float_input(rng):
    """FSDP's mixed precision maps over the inputs of a layer and casts the float tensors."""
    _, ours = pair_of()
    packed = PackedGrids.from_grids([(4, 6), (3, 3)], num_prefix_tokens=5)
    cast = pytree.tree_map(lambda a: a.bfloat16() if a.is_floating_point() else a, packed)
    x = torch.randn(packed.total_tokens, 64, generator=rng)
    assert torch.equal(ours.layer[0](x, cast), ours.layer[0](x, packed))


def test_stochastic_depth_drops_whole_images_in_training_only(rng):
    _, ours = pair_of(drop_path_rate=0.5, num_hidden_layers=1)
    images = images_of([(16, 16)] * 8 + [(32, 16)] * 8, rng)
    embeddings = ours(images, output_hidden_states=True).packed_hidden_states[0]
    ours.train()
    torch.manual_seed(1)
    out = ours(images, output_hidden_states=True).packed_hidden_states[-1]
    lengths = [5 + (i.shape[1] // 16) * (i.shape[2] // 16) for i in images]
    untouched = [
        torch.equal(a, b)
        for a, b in zip(out.split(lengths), embeddings.split(lengths), strict=True)
    ]
    assert 0 < sum(untouched) < len(images)


def test_float16_raises_unless_forced(rng):
    theirs, ours = pair_of()
    x = torch.randn(1, 3, 32, 32, generator=rng)
    with pytest.raises(ValueError, match=r"float16: .* bfloat16 or float32, or allow_fp16=True"):
        copy.deepcopy(ours).half()(x)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match="float16"):
        ours(x)
    forced = DINOv3Encoder(ours.config, allow_fp16=True)
    forced.load_state_dict(theirs.state_dict())
    assert forced.half().eval()(x).last_hidden_state.dtype == torch.float16
    ours.config.allow_fp16 = True
    with torch.autocast("cpu", dtype=torch.float16):
        ours(x)
    ours.half()(x)


def test_autocast_runs_in_bfloat16_and_stays_close(rng):
    _, ours = pair_of()
    images = images_of(SHAPES, rng)
    expected = ours(images).packed_last_hidden_state
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(images).packed_last_hidden_state
    assert 1e-5 < relative_error(out, expected) < 3e-2


def test_an_empty_batch_is_an_empty_output():
    _, ours = pair_of()
    out = ours(torch.zeros(0, 3, 32, 48))
    assert out.pooler_output.shape == (0, 64)


def test_return_dict_false_gives_a_tuple(rng):
    theirs, ours = pair_of()
    x = torch.randn(1, 3, 32, 32, generator=rng)
    a, b = theirs(x, return_dict=False), ours(x, return_dict=False)
    assert isinstance(b, tuple) and len(a) == len(b) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(1, 3, 70, 96)), "70x96 pixels .* patch size 16"),
        (lambda m: m([torch.zeros(3, 32, 32), torch.zeros(3, 32, 33)]), "image 1: 32x33"),
        (lambda m: m(torch.zeros(3, 32, 32)), r"\[B, 3, H, W\]"),
        (lambda m: m(torch.zeros(4, 768)), "grids is needed"),
        (
            lambda m: m(torch.zeros(5, 768), grids=[(2, 2)]),
            r"\(5, 768\) patches for grids that need \(4, 768\)",
        ),
        (lambda m: m(torch.zeros(4, 700), grids=[(2, 2)]), "patch size 16"),
        (lambda m: m(torch.zeros(4, 768), grids=[(2, 2), (0, 1)]), "image 1: a patch grid"),
        (
            lambda m: m(torch.zeros(4, 768), grids=PackedGrids.from_grids([(2, 2)])),
            "0 prefix tokens, this model has 5",
        ),
        (lambda m: m(torch.zeros(1, 3, 32, 32), grids=[(2, 2)]), "grids goes with packed patches"),
        (lambda m: m([]), "empty"),
        (
            lambda m: m(torch.zeros(1, 4, 32, 32)),
            r"pixel_values: expected \[B, 3, H, W\], got \(1, 4, 32, 32\)",
        ),
    ],
)
def test_bad_inputs_raise_and_say_what_was_expected(call, message):
    _, ours = pair_of()
    with pytest.raises(ValueError, match=message):
        call(ours)


def test_attention_dropout_is_refused():
    with pytest.raises(ValueError, match="attention_dropout"):
        DINOv3Encoder(config_of(attention_dropout=0.1))


def test_forward_reads_no_size_from_the_tensors(rng, monkeypatch):
    """With a PackedGrids nothing in a forward may ask for a value on the device."""
    _, ours = pair_of()
    patches, grids = pack_images(images_of(SHAPES, rng), 16)
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=5)

    def refuse(*_):
        raise AssertionError("a forward read a value back from the device")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    out = ours(patches, grids=packed)
    monkeypatch.undo()
    assert out.packed_last_hidden_state.isfinite().all()


def test_one_graph_serves_many_packings(rng, monkeypatch):
    """But for a single image, since torch.compile takes a size of 1 for a constant.

    A graph runs the blocks one by one, to the bits; the fused ones round at other places.
    """
    encoder = DINOv3Encoder(config_of(num_hidden_layers=1)).eval()
    encoder.backend = "triton"
    graphs = []

    def backend(module, inputs):
        graphs.append(module.graph)
        return aot_eager(module, inputs)

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(encoder, backend=backend, fullgraph=True, dynamic=True)
    # In the first pack no two numbers agree (images, tiles, where tables begin): they would be one.
    for grids in ([(11, 13), (9, 16), (3, 7)], [(3, 5), (8, 2)], [(4, 4)] * 5, [(14, 14)]):
        packed = PackedGrids.from_grids(grids, num_prefix_tokens=encoder.num_prefix_tokens)
        patches = torch.randn(len(packed.patch_rows()), 3 * encoder.patch_size**2, generator=rng)
        with torch.no_grad():
            got, fused = (f(patches, grids=packed) for f in (compiled, encoder))
            with monkeypatch.context() as patch:
                patch.setattr(fused_blocks, "can_run", lambda *_: False)
                expected = encoder(patches, grids=packed)
        assert got.grids == tuple(grids)
        assert torch.equal(got.packed_last_hidden_state, expected.packed_last_hidden_state)
        assert relative_error(fused.packed_last_hidden_state, got.packed_last_hidden_state) <= 1e-5
        assert counters["stats"]["unique_graphs"] == 1 + (len(grids) == 1)
    # RoPE's frequencies are at hand: made in the graph, they would be copied in every forward.
    assert not any("pow" in str(node.target) for graph in graphs for node in graph.nodes)


@pytest.mark.parametrize(
    "fields", [{"num_attention_heads": 5}, {"num_attention_heads": 32}, {"num_register_tokens": -1}]
)
def test_sizes_that_make_no_encoder_are_named(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=rf"config.{name}={value}: expected"):
        DINOv3Encoder(config_of(**fields))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "pixel_values: expected a list of tensors.*got NoneType"),
        ("a.png", "pixel_values: expected a list of tensors.*got str"),
        (Image.new("RGB", (32, 32)), "pixel_values: expected a list of tensors.*got Image"),
        ([torch.zeros(3, 32, 32), Image.new("RGB", (32, 32))], "image 1: expected a tensor, got"),
        (np.zeros((1, 3, 32, 32)), "image 0: expected a tensor, got ndarray"),
    ],
    ids=["None", "path", "picture", "second", "array"],
)
def test_what_is_no_tensor_is_named(images, message):
    _, ours = pair_of()
    with pytest.raises(TypeError, match=message):
        ours(images)
