"""DINOv2Encoder against transformers' models, and what it does beyond them."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Model

from hrvlm import DINOv2Encoder, DINOv3Encoder, EncoderOutput, pack_images
from hrvlm.checkpoints.convert import (
    convert,
    detect_layout,
    from_transformers,
    infer_config,
    load_into,
    to_transformers,
)
from hrvlm.checkpoints.mapping import without_converted_keys
from hrvlm.encoder.vision_transformer import without_mask_token
from hrvlm_kernels import PackedGrids
from hrvlm_kernels.traced_grids import TracedGrids
from tests.checkpoints.states import assert_same
from tests.encoder.dinov2_models import FAMILY, config_of, pair_of
from tests.kernels.helpers import interpreter_only
from tests.numerics import relative_error

# The square of the weights, as many patches in another shape, larger, and smaller.
GRIDS = [(4, 4), (2, 8), (5, 7), (3, 1)]


def images_of(ours, rng, grids=GRIDS):
    p = ours.patch_size
    return [torch.randn(3, hp * p, wp * p, generator=rng) for hp, wp in grids]


@pytest.mark.parametrize("name", FAMILY)
def test_a_batch_equals_transformers_forward_and_gradients(name, rng):
    theirs, ours = pair_of(name)
    for image in images_of(ours, rng)[:3]:
        x = torch.stack([image, image.flip(-1)])
        x_theirs, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
        a, b = theirs(x_theirs, output_hidden_states=True), ours(x_ours, output_hidden_states=True)
        assert isinstance(b, EncoderOutput) and len(a.hidden_states) == len(b.hidden_states)
        assert relative_error(b.pooler_output, a.pooler_output) <= 1e-5
        for i, j in zip(b.hidden_states, a.hidden_states, strict=True):
            assert i.shape == j.shape and relative_error(i, j) <= 1e-5
        cotangent = torch.randn(a.last_hidden_state.shape, generator=rng)
        a.last_hidden_state.backward(cotangent)
        b.last_hidden_state.backward(cotangent)
        assert relative_error(x_ours.grad, x_theirs.grad) <= 1e-5
    zeros = {key: torch.zeros_like(p) for key, p in theirs.named_parameters() if p.grad is None}
    expected = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None} | zeros
    own = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in ours.named_parameters()}
    got = to_transformers(own)
    assert got.keys() == to_transformers(expected).keys() and len(zeros) <= 1
    for key, gradient in to_transformers(expected).items():
        if "key.bias" in key:  # which softmax does not see
            assert max(gradient.abs().max(), got[key].abs().max()) <= 1e-4, key
        elif key not in zeros:
            assert relative_error(got[key], gradient) <= 1e-5, key


@pytest.mark.parametrize("name", FAMILY)
def test_mixed_shapes_equal_transformers_image_by_image(name, rng):
    theirs, ours = pair_of(name)
    images = images_of(ours, rng)
    with torch.no_grad():
        out = ours(images, output_hidden_states=True)
        assert out.grids == tuple(GRIDS)
        for i, image in enumerate(images):
            expected = theirs(image[None], output_hidden_states=True)
            tokens = out.packed.split(out.packed_last_hidden_state)[i]
            assert relative_error(tokens, expected.last_hidden_state[0]) <= 1e-5
            embedded = out.packed.split(out.packed_hidden_states[0])[i]
            assert relative_error(embedded, expected.hidden_states[0][0]) <= 1e-6
            assert relative_error(out.cls[i], expected.pooler_output[0]) <= 1e-5
            assert relative_error(ours([image]).packed_last_hidden_state, tokens) <= 1e-5
    patches, grids = pack_images(images, ours.patch_size)
    layout = PackedGrids.from_grids(grids, num_prefix_tokens=ours.num_prefix_tokens)
    for given in (grids, torch.tensor(grids), layout):
        again = ours(patches, grids=given).packed_last_hidden_state
        assert torch.equal(again, out.packed_last_hidden_state)


@interpreter_only
def test_the_kernels_give_transformers_features_and_gradients(rng):
    """With gradients and without, which are two ways through the blocks."""
    theirs, ours = pair_of("giant_registers", num_hidden_layers=1)
    ours.backend = "triton"
    images = images_of(ours, rng, [(2, 3), (3, 1)])
    with torch.no_grad():
        inferred = ours(images).packed_last_hidden_state
    out = ours(images)
    cotangent = torch.randn(inferred.shape, generator=rng)
    out.packed_last_hidden_state.backward(cotangent)
    for i, (image, part) in enumerate(zip(images, out.packed.split(cotangent), strict=True)):
        expected = theirs(image[None]).last_hidden_state
        expected.backward(part[None])
        for got in (inferred, out.packed_last_hidden_state):
            assert relative_error(out.packed.split(got)[i], expected[0]) <= 1e-5
    gradients = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    own = {key: p.grad for key, p in ours.named_parameters() if p.grad is not None}
    mask = {"embeddings.mask_token": torch.zeros(1, 64)}
    got, expected = to_transformers(own | mask), to_transformers(gradients | mask)
    assert got.keys() == expected.keys()
    for key in [key for key in expected if key not in mask and "key.bias" not in key]:
        assert relative_error(got[key], expected[key]) <= 1e-5, key


def test_the_same_in_bfloat16_and_in_float16(rng):
    """Which DINOv2, unlike DINOv3, has activations for; positions are interpolated in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        theirs, ours = pair_of("registers")
        theirs, ours = theirs.to(dtype), ours.to(dtype)
        x = images_of(ours, rng)[2][None].to(dtype)
        with torch.no_grad():
            a, b = (m(x, output_hidden_states=True).hidden_states[0] for m in (theirs, ours))
            assert b.dtype == dtype and relative_error(b, a) <= torch.finfo(dtype).eps
            assert ours(x).last_hidden_state.isfinite().all()


def test_masked_patches_equal_transformers(rng):
    theirs, ours = pair_of("registers")
    x = torch.stack(images_of(ours, rng, [(4, 4)] * 2))
    mask = torch.rand(2, 16, generator=rng) < 0.5
    expected, got = theirs(x, bool_masked_pos=mask), ours(x, bool_masked_pos=mask)
    assert relative_error(got.last_hidden_state, expected.last_hidden_state) <= 1e-5
    _, without = pair_of("bare")
    with pytest.raises(ValueError, match=r"bool_masked_pos: config\.use_mask_token is False"):
        without(x, bool_masked_pos=mask)
    assert not without_mask_token(ours).embeddings.mask_token.requires_grad
    assert without_mask_token(without) is without


def test_all_that_the_other_encoder_gives(rng):
    _, ours = pair_of("registers", num_hidden_layers=3)
    images = images_of(ours, rng)
    with torch.no_grad():
        out = ours(images, out_indices=(1, -1), output_prefix_attentions=True)
        middle = ours.get_intermediate_layers(images, n=[0, 2], return_class_token=True)
        eager = DINOv2Encoder(ours.config, backend="eager").eval()
        eager.load_state_dict(ours.state_dict())
        difference = eager(images).packed_last_hidden_state - out.packed_last_hidden_state
    assert difference.abs().max() <= 1e-5
    assert torch.equal(out.packed_selected_hidden_states[1], out.packed_last_hidden_state)
    assert torch.equal(middle[1][1], out.cls) and middle[0][1].shape == (4, 64)
    assert [m.shape for m in out.attention_maps(0)] == [(5, 2, hp, wp) for hp, wp in GRIDS]
    assert out.registers.shape == (4, 4, 64)


def test_drop_path_drops_whole_images_and_checkpointing_changes_nothing(rng):
    _, ours = pair_of("plain")
    images = images_of(ours, rng, [(2, 2)] * 8)
    expected = ours(images).packed_last_hidden_state
    _, dropping = pair_of("plain", drop_path_rate=0.5)
    torch.manual_seed(0)
    got = dropping.train()(images).packed_last_hidden_state
    assert relative_error(dropping.eval()(images).packed_last_hidden_state, expected) == 0
    changed = [not torch.equal(a, b) for a, b in zip(got.chunk(8), expected.chunk(8), strict=True)]
    assert any(changed)
    ours.train().gradient_checkpointing_enable()
    out = ours(images).packed_last_hidden_state
    out.backward(torch.ones_like(out))
    checkpointed = ours.embeddings.position_embeddings.grad.clone()
    ours.zero_grad()
    ours.gradient_checkpointing_disable()
    out = ours(images).packed_last_hidden_state
    out.backward(torch.ones_like(out))
    assert torch.equal(checkpointed, ours.embeddings.position_embeddings.grad)


def test_what_it_has_not_is_refused(rng):
    _, ours = pair_of()
    with pytest.raises(ValueError, match="DINOv2Encoder has learned positions, and no RoPE"):
        ours(images_of(ours, rng), rope_augment=True)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        with pytest.raises(ValueError, match=rf"config\.{name} must be 0"):
            DINOv2Encoder(config_of(**{name: 0.1}))
    with pytest.raises(ValueError, match=r"config\.image_size must be square"):
        DINOv2Encoder(config_of(image_size=[28, 56]))
    with pytest.raises(ValueError, match="expected at least one patch"):
        DINOv2Encoder(config_of(image_size=7))
    with pytest.raises(ValueError, match=r"image 0.*14"):
        ours([torch.zeros(3, 28, 30)])


@pytest.mark.parametrize("name", FAMILY)
def test_loading_and_saving_are_transformers_own_both_ways(name, tmp_path, rng):
    theirs, ours = pair_of(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = [tmp_path / who / "model.safetensors" for who in ("theirs", "ours")]
    assert_same(*map(load_file, files))
    loaded = DINOv2Encoder.from_pretrained(tmp_path / "theirs").eval()
    assert type(loaded.config) is FAMILY[name][0]
    loaded.save_pretrained(tmp_path / "again")
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), load_file(files[0]))
    back = FAMILY[name][1].from_pretrained(tmp_path / "ours").eval()
    assert_same(back.state_dict(), theirs.state_dict())
    assert_same(loaded.state_dict(), ours.state_dict())


@pytest.mark.parametrize("layout", ["transformers_memory", "fused", "meta", "timm"])
@pytest.mark.parametrize("name", ["plain", "giant_registers"])
def test_every_layout_comes_back_bit_equal(name, layout, tmp_path):
    theirs, ours = pair_of(name)
    stored = to_transformers(theirs.state_dict())
    state = from_transformers(stored, layout)
    assert detect_layout(state) == layout
    # timm has no mask token, and with registers the position of CLS is in its token.
    changed = {"embeddings.mask_token"} if layout == "timm" else set()
    if layout == "timm" and "registers" in name:
        changed |= {"embeddings.cls_token", "embeddings.position_embeddings"}
    wrapped = {f"teacher.backbone.{key}": value for key, value in state.items()}
    assert_same(to_transformers(wrapped), stored, but=changed)
    config = infer_config(state, num_attention_heads=2)
    assert config.to_diff_dict() == ours.config.to_diff_dict()
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    info = convert(path, tmp_path / "converted", num_attention_heads=2)
    assert info.layout == layout and info.left_out == ()
    model = FAMILY[name][1].from_pretrained(tmp_path / "converted").eval()
    x = torch.randn(1, 3, 5 * ours.patch_size, 3 * ours.patch_size)
    from_file = DINOv2Encoder.from_pretrained(path, num_attention_heads=2).eval()
    for encoder in (model, from_file):
        error = relative_error(encoder(x).last_hidden_state, ours(x).last_hidden_state)
        assert error <= 1e-5
    _, other = pair_of(name, seed=1)
    load_into(other, state)
    assert_same(other.state_dict(), ours.state_dict(), but=changed)


def test_shards_that_are_loaded_one_by_one_fill_every_weight(tmp_path):
    """As Trainer resumes, which compares the keys of files with those of the model by itself."""
    _, ours = pair_of("giant_registers")
    _, other = pair_of("giant_registers", seed=1)
    ours.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = [load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert len(shards) > 2
    stored, wanted = {key for shard in shards for key in shard}, {*other.state_dict()}
    assert without_converted_keys(wanted - stored, stored - wanted) == ([], [])
    assert without_converted_keys(wanted - stored, {"layernorm.bias"})[0] != []
    for shard in shards:
        other.load_state_dict(shard, strict=False)
    assert_same(other.state_dict(), ours.state_dict())


def test_blocks_in_chunks_are_read():
    theirs, _ = pair_of("registers")
    state = from_transformers(theirs.state_dict(), "meta")
    chunked = {key.replace("blocks.", "blocks.0."): value for key, value in state.items()}
    assert_same(to_transformers(chunked), to_transformers(state))


def test_weights_that_do_not_fit_raise_under_the_names_of_files(tmp_path):
    theirs, _ = pair_of("giant")
    state = to_transformers(theirs.state_dict())
    for key in ("encoder.layer.1.mlp.weights_in.weight", "layernorm.bias"):
        del state[key]
    del state["encoder.layer.0.attention.attention.key.weight"]
    state["encoder.layer.0.extra"] = torch.zeros(1)
    theirs.save_pretrained(tmp_path / "model", state_dict=state)
    with pytest.raises(ValueError) as caught:
        DINOv2Encoder.from_pretrained(tmp_path / "model")
    told = str(caught.value)
    assert (
        "missing (3): encoder.layer.0.attention.attention.key.weight, "
        "encoder.layer.1.mlp.weights_in.weight, layernorm.bias" in told
    )
    assert "unexpected (1): encoder.layer.0.extra" in told


def test_weights_of_the_other_family_are_told(tmp_path):
    theirs, _ = pair_of()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights of dinov2, which are not those of a DINOv3Enc"):
        DINOv3Encoder.from_pretrained(tmp_path / "weights.pth")
    with pytest.raises(TypeError, match="no fields of Dinov2Config: rope_theta"):
        convert(tmp_path / "weights.pth", tmp_path / "x", rope_theta=1.0)
    with pytest.raises(ValueError, match=r"hidden_size 96 is not one of DINOv2's, .*pass num_att"):
        infer_config(Dinov2Model(config_of(hidden_size=96)).state_dict())
    state = theirs.state_dict()
    state["embeddings.position_embeddings"] = state["embeddings.position_embeddings"][:, :-1]
    with pytest.raises(ValueError, match=r"position embeddings \[1, 16, 64\]: expected \[1, 1 \+"):
        to_transformers(state)


@pytest.mark.parametrize("name", ["plain", "registers"])
def test_positions_in_a_graph_are_those_outside(name, rng):
    """Weights of every number of the square, where sizes are numbers of the input to come."""
    embeddings = pair_of(name)[1].embeddings
    grids = [(4, 4), (1, 1), (13, 2), (3, 5), (2, 9), (1, 7), (4, 6)]
    patches = torch.randn(sum(hp * wp for hp, wp in grids), 64, generator=rng)
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=1)
    traced = TracedGrids.from_tensor(torch.tensor(grids), len(patches), num_prefix_tokens=1)
    expected = embeddings.placed(patches, packed)
    torch.testing.assert_close(embeddings.placed(patches, traced), expected, rtol=0, atol=1e-5)
