"""accelerate() on models of transformers: same numbers, same keys, and undone without a trace."""

import copy
import io
import pickle

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_map
from transformers import (
    DINOv3ViTBackbone,
    DINOv3ViTModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.models.dinov3_vit import modeling_dinov3_vit as stock

import hrvlm
from hrvlm import restore
from hrvlm.towers.dinov3 import AcceleratedAttention, RotaryPositions
from tests.encoder.encoders import FAMILY, config_of, pair_of
from tests.numerics import relative_error


def model_of(name="vit", cls=DINOv3ViTModel, **changes):
    """Transformers' model with random weights, none at its initial value."""
    theirs, _ = pair_of(name, **changes)
    if cls is not DINOv3ViTModel:
        model = cls(theirs.config).eval()
        model.load_state_dict(theirs.state_dict())
        return model
    return theirs


def accelerate(model, **options):
    """The same model, accelerated."""
    return hrvlm.accelerate(model, **options).model


def backward(model, x, cotangent, **options):
    """Output, gradient of the pixels, and gradients of the weights by name."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x, **options)
    out.last_hidden_state.backward(cotangent)
    return out, x.grad, {key: p.grad for key, p in model.named_parameters()}


def assert_equal_gradients(mine, theirs, tolerance=1e-5):
    assert mine.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert (mine[key] is None) == (expected is None), key
        assert expected is None or relative_error(mine[key], expected) <= tolerance, key


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("shape", [(1, 64, 64), (4, 32, 80)])
def test_forward_and_gradients_equal_the_stock_model(name, shape, rng):
    model = model_of(name)
    batch, height, width = shape
    x = torch.randn(batch, 3, height, width, generator=rng)
    tokens = model(x).last_hidden_state.shape
    cotangent = torch.randn(tokens, generator=rng)
    a, x_a, gradients_a = backward(model, x, cotangent, output_hidden_states=True)
    accelerate(model)
    b, x_b, gradients_b = backward(model, x, cotangent, output_hidden_states=True)
    assert type(b) is type(a) and b.keys() == a.keys()
    assert relative_error(b.pooler_output, a.pooler_output) <= 1e-5
    assert len(b.hidden_states) == len(a.hidden_states)
    for mine, theirs in zip(b.hidden_states, a.hidden_states, strict=True):
        assert relative_error(mine, theirs) <= 1e-5
    assert relative_error(x_b, x_a) <= 1e-5
    assert_equal_gradients(gradients_b, gradients_a)


def test_masked_patches_and_the_eager_backend(rng):
    model = model_of()
    x = torch.randn(2, 3, 32, 48, generator=rng)
    masked = torch.rand(2, 6, generator=rng) < 0.5
    expected = model(x, bool_masked_pos=masked).last_hidden_state
    for backend in ("eager", "sdpa"):
        out = accelerate(model, backend=backend)(x, bool_masked_pos=masked).last_hidden_state
        assert relative_error(out, expected) <= 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_attention_in_bfloat16_errs_less_than_the_stock_one(seed):
    """Stock DINOv3 rounds cos and sin to the pixels' dtype; sharp attention shows it."""
    rng = torch.Generator().manual_seed(seed)
    model = model_of(num_hidden_layers=1, seed=seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter *= 4 if "q_proj" in key or "k_proj" in key else 1
    model.bfloat16()
    pixels = torch.zeros(2, 3, 128, 256, dtype=torch.bfloat16)
    hidden = torch.randn(2, 5 + 8 * 16, 64, generator=rng).bfloat16()

    @torch.no_grad()
    def attention(model, dtype):
        positions = model.rope_embeddings(pixels.to(dtype))
        layer = model.model.layer[0]
        return layer.attention(hidden.to(dtype), position_embeddings=positions)[0]

    exact = attention(copy.deepcopy(model).double(), torch.float64)
    theirs = relative_error(attention(model, torch.bfloat16), exact)
    ours = attention(accelerate(model), torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) < 0.95 * theirs


class Segmenter(nn.Module):
    """A backbone as part of a larger model."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(sum(backbone.channels), 3, 1)

    def forward(self, x):
        return self.head(torch.cat(self.backbone(x).feature_maps, dim=1))


def test_backbone_inside_a_larger_model(rng):
    backbone = model_of(
        cls=DINOv3ViTBackbone, out_features=["stage1", "stage3"], drop_path_rate=0.1
    )
    model = Segmenter(backbone).eval()
    x = torch.randn(2, 3, 48, 32, generator=rng)
    expected = model(x)
    cotangent = torch.randn(expected.shape, generator=rng)
    expected.backward(cotangent)
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    out = accelerate(model)(x)
    out.backward(cotangent)
    assert relative_error(out, expected) <= 1e-5
    assert_equal_gradients(
        {key: p.grad for key, p in model.named_parameters() if p.grad is not None}, gradients
    )
    maps = model.backbone(x, output_hidden_states=True)
    assert [m.shape for m in maps.feature_maps] == [(2, 64, 3, 2)] * 2
    assert len(maps.hidden_states) == 4


def test_model_of_transformers_on_top_of_a_dinov3_backbone(rng):
    config = UperNetConfig(
        backbone_config=config_of(out_features=["stem", "stage1", "stage2", "stage3"]),
        hidden_size=8,
        use_auxiliary_head=False,
        num_labels=2,
        pool_scales=[1],
    )
    model = UperNetForSemanticSegmentation(config).eval()
    x = torch.randn(1, 3, 32, 48, generator=rng)
    expected = model(x).logits
    assert isinstance(accelerate(model).backbone.model.layer[0].attention, AcceleratedAttention)
    assert relative_error(model(x).logits, expected) <= 1e-5


def test_every_encoder_is_accelerated_and_only_per_instance():
    class Larger(DINOv3ViTModel):
        """Transformers looks for a config class by the type, so a subclass needs nothing else."""

    pair = nn.ModuleDict({"left": Larger(config_of()), "right": DINOv3ViTBackbone(config_of())})
    other = DINOv3ViTModel(config_of())
    accelerate(pair)
    for encoder in pair.values():
        assert all(type(layer.attention) is AcceleratedAttention for layer in encoder.model.layer)
    assert type(other.model.layer[0].attention) is stock.DINOv3ViTAttention


def test_weights_are_shared_and_keys_unchanged_and_restore_leaves_no_trace(tmp_path, rng):
    model = model_of()
    x = torch.randn(2, 3, 32, 32, generator=rng)
    expected = model(x).last_hidden_state
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    structure, attributes = str(model), [sorted(vars(module)) for module in model.modules()]
    model.save_pretrained(tmp_path / "stock")

    report = hrvlm.accelerate(model)
    assert report.model is model
    assert [part.cls for part in report.swapped] == ["DINOv3ViTAttention"]
    assert all(p is parameters[key] for key, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "accelerated")
    for name in ("config.json", "model.safetensors"):
        stored, now = tmp_path / "stock" / name, tmp_path / "accelerated" / name
        assert stored.read_bytes() == now.read_bytes(), name
    with torch.no_grad():
        model.norm.bias.add_(1)
    assert relative_error(model(x).last_hidden_state, expected + 1) <= 1e-5

    assert restore(model) is model
    assert str(model) == structure
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(model(x).last_hidden_state, restore(model)(x).last_hidden_state)
    with torch.no_grad():
        model.norm.bias.sub_(1)
    assert relative_error(model(x).last_hidden_state, expected) <= 1e-6


def test_twice_changes_only_the_options(rng):
    model = model_of()
    x = torch.randn(1, 3, 32, 32, generator=rng)
    once = accelerate(model)(x).last_hidden_state
    assert torch.equal(accelerate(model)(x).last_hidden_state, once)
    accelerate(model, backend="eager")
    assert {layer.attention.backend for layer in model.model.layer} == {"eager"}
    assert type(restore(model).model.layer[0].attention) is stock.DINOv3ViTAttention


def test_copies_pickles_casts_and_saved_weights_work_while_accelerated(rng):
    model = accelerate(model_of())
    x = torch.randn(1, 3, 32, 48, generator=rng)
    expected = model(x).last_hidden_state
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x).last_hidden_state, expected)
        restore(twin)
    assert torch.equal(model(x).last_hidden_state, expected), "restoring a copy touched the model"
    wide = copy.deepcopy(model).to(torch.float64)(x.double()).last_hidden_state
    assert wide.dtype == torch.float64 and relative_error(expected, wide) <= 1e-5
    there_and_back = copy.deepcopy(model).to(torch.bfloat16).to(torch.float32)
    stock_twin = restore(copy.deepcopy(there_and_back))
    stock_twin.rope_embeddings.inv_freq = model.rope_embeddings.inv_freq
    out = there_and_back(x).last_hidden_state
    assert relative_error(out, stock_twin(x).last_hidden_state) <= 1e-5
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = DINOv3ViTModel(model.config).eval()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert relative_error(fresh(x).last_hidden_state, expected) <= 1e-5


def test_forward_hooks_and_wrapped_projections_are_kept(rng):
    model = model_of()
    seen = []
    model.model.layer[1].attention.register_forward_hook(
        lambda *call: seen.append(call[2][0].shape)
    )
    model.model.layer[0].attention.q_proj = nn.Sequential(model.model.layer[0].attention.q_proj)
    x = torch.randn(2, 3, 32, 32, generator=rng)
    expected = model(x).last_hidden_state
    assert relative_error(accelerate(model)(x).last_hidden_state, expected) <= 1e-5
    assert seen == [(2, 9, 64)] * 2


def test_hooks_see_the_shapes_of_the_stock_model(rng):
    x, seen = torch.randn(2, 3, 32, 48, generator=rng), []
    for model in (model_of(), accelerate(model_of())):
        shapes = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(
                    lambda _, inputs, out, name=name, shapes=shapes: shapes.update(
                        {name: (inputs[0].shape, out.shape)}
                    )
                )
        model(x)
        seen.append(shapes)
    assert seen[0] and seen[0] == seen[1]


def test_device_hooks_of_accelerate_call_the_new_attention(rng):
    model = model_of()
    x = torch.randn(1, 3, 32, 32, generator=rng)
    for layer in model.model.layer:
        for module in (layer, layer.attention):
            add_hook_to_module(module, AlignDevicesHook("cpu"))
    expected = model(x).last_hidden_state
    assert relative_error(accelerate(model)(x).last_hidden_state, expected) <= 1e-5
    with pytest.raises(ValueError, match="output_attentions"):
        model(x, output_attentions=True)
    assert torch.equal(restore(model)(x).last_hidden_state, expected)


def test_positions_stay_float32_when_a_layer_input_is_cast(rng):
    """Mixed precision of FSDP maps over the inputs of each layer."""
    model = accelerate(model_of())
    positions = model.rope_embeddings(torch.randn(1, 3, 32, 32, generator=rng))
    cast = tree_map(lambda t: t.bfloat16() if isinstance(t, torch.Tensor) else t, (positions,))[0]
    assert isinstance(cast, RotaryPositions)
    assert cast.coords.dtype == cast.inv_freq.dtype == torch.float32
    assert positions.to("cpu") is positions


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, rng):
    model = accelerate(model_of())
    x = torch.randn(2, 3, 32, 48, generator=rng)
    cotangent = torch.randn(2, 11, 64, generator=rng)
    model.train()
    torch.manual_seed(3)
    _, pixels, gradients = backward(model, x, cotangent)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(3)
    _, again, recomputed = backward(model, x, cotangent)
    assert torch.equal(again, pixels)
    assert_equal_gradients(recomputed, gradients, tolerance=0)


def test_drop_path_draws_as_the_stock_model_does(rng):
    model = model_of(drop_path_rate=0.5, pos_embed_rescale=None).train()
    x = torch.randn(4, 3, 32, 32, generator=rng)
    torch.manual_seed(3)
    expected = model(x).last_hidden_state
    torch.manual_seed(3)
    assert relative_error(accelerate(model)(x).last_hidden_state, expected) <= 1e-5
    assert relative_error(model.eval()(x).last_hidden_state, expected) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_is_augmented_like_the_stock_model_unless_told_not_to(dtype, rng):
    options = {"pos_embed_shift": 0.5, "pos_embed_jitter": 1.5, "pos_embed_rescale": 2.0}
    model = model_of(**options).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    x = torch.randn(2, 3, 32, 48, generator=rng).to(dtype)
    plain = model(x).last_hidden_state
    model.train()
    torch.manual_seed(5)
    augmented = model(x).last_hidden_state
    assert relative_error(augmented, plain) > 2 * tolerance
    accelerate(model)
    torch.manual_seed(5)
    assert relative_error(model(x).last_hidden_state, augmented) <= tolerance
    accelerate(model, rope_augment=False)
    assert relative_error(model(x).last_hidden_state, plain) <= tolerance
    accelerate(model)
    assert relative_error(model.eval()(x).last_hidden_state, plain) <= tolerance


def exported(model, x):
    """A program of `model` for any batch."""
    sizes = {0: Dim("batch", min=1, max=64), 2: 16 * Dim("rows"), 3: 16 * Dim("columns")}
    return torch.export.export(model, (x,), dynamic_shapes=(sizes,)).module()


def traced(model, x):
    """A trace of `model`; not checked, the draws of each run are others."""
    return torch.jit.trace(model, (x,), strict=False, check_trace=False)


def compiled(model, x):
    """One graph of `model`."""
    return torch.compile(model, backend="eager", fullgraph=True)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("graph_of", [exported, traced, compiled])
@pytest.mark.parametrize("drawn", [(None, None, None), (0.5, 1.5, 2.0)])
@torch.no_grad()
def test_a_graph_of_a_model_in_training_draws_as_the_stock_model_does(graph_of, drawn, rng):
    names = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
    model = model_of(num_hidden_layers=1, **dict(zip(names, drawn, strict=True))).train()
    images = [torch.randn(s, generator=rng) for s in ((2, 3, 32, 48), (3, 3, 64, 32))]
    expected = [drawn_from(model, x, seed) for seed, x in enumerate(images)]
    graph = graph_of(accelerate(model), images[0])
    for seed, x in enumerate(images):
        assert relative_error(drawn_from(graph, x, seed), expected[seed]) <= 1e-5


def drawn_from(model, x, seed):
    """The last hidden state of a call, with the draws of a seed."""
    torch.manual_seed(seed)
    return model(x)["last_hidden_state"]


@pytest.mark.parametrize(("height", "width"), [(70, 96), (64, 100), (24, 32)])
def test_sides_that_are_no_multiples_of_the_patch_raise(height, width):
    model = model_of()
    x = torch.zeros(1, 3, height, width)
    with pytest.raises(ValueError, match=f"{height}x{width} pixels are not whole patches of 16x16"):
        accelerate(model)(x)


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_of_no_images_has_no_rows(training):
    model = accelerate(model_of(pos_embed_shift=0.5)).train(training)
    x = torch.zeros(0, 3, 32, 48, requires_grad=True)
    out = model(x)
    assert out.last_hidden_state.shape == (0, 5 + 6, 64) and out.pooler_output.shape == (0, 64)
    out.last_hidden_state.sum().backward()
    assert x.grad.shape == x.shape


def test_attention_weights_masks_and_dropout_are_refused(rng):
    model = accelerate(model_of())
    x = torch.randn(1, 3, 32, 32, generator=rng)
    with pytest.raises(ValueError, match=r"output_attentions.*restore"):
        model(x, output_attentions=True)
    assert model(x, output_attentions=False).attentions is None
    with pytest.raises(ValueError, match="attention_mask"):
        model(x, attention_mask=torch.zeros(1, 1, 9, 9))
    with pytest.raises(TypeError, match="cos and sin"):
        model.model(torch.zeros(1, 9, 64), (torch.zeros(4, 32), torch.zeros(4, 32)))
    restore(model).set_attn_implementation("eager")
    assert len(model(x, output_attentions=True).attentions) == 3
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        accelerate(model)(x)

    dropping = accelerate(DINOv3ViTModel(config_of(attention_dropout=0.5)))
    dropping.eval()(x)
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.5"):
        dropping.train()(x)


def test_what_can_not_be_accelerated_raises_and_changes_nothing():
    with pytest.raises(ValueError, match=r"nothing to swap in Linear: it has no attention"):
        accelerate(nn.Linear(2, 2))
    model = DINOv3ViTModel(config_of())
    with pytest.raises(ValueError, match="got 'fast'"):
        accelerate(model, backend="fast")

    class Windowed(stock.DINOv3ViTAttention):
        pass

    own = DINOv3ViTModel(config_of())
    own.model.layer[2].attention = Windowed(own.config)
    with pytest.raises(ValueError, match=r"model\.layer\.2\.attention: Windowed"):
        accelerate(own)
    model.model.layer[1].attention.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match=r"model\.layer\.1\.attention: its forward was replaced"):
        accelerate(model)
    for encoder in (own, model):
        assert type(encoder.model.layer[0].attention) is stock.DINOv3ViTAttention


def test_a_forward_that_was_replaced_since_is_not_left_to_a_restored_model():
    model = accelerate(DINOv3ViTModel(config_of()))
    attention = model.model.layer[1].attention
    attention.forward = attention.forward
    with pytest.raises(ValueError, match=r"model\.layer\.1\.attention: its forward was replaced"):
        restore(model)
    assert type(model.model.layer[0].attention) is AcceleratedAttention
    del attention.forward
    assert type(restore(model).model.layer[0].attention) is stock.DINOv3ViTAttention


def test_a_loaded_backbone_is_accelerated_on_disk_keys(tmp_path, rng):
    model = accelerate(model_of())
    model.save_pretrained(tmp_path)
    assert "layer.0.attention.q_proj.weight" in load_file(tmp_path / "model.safetensors")
    backbone = accelerate(DINOv3ViTBackbone.from_pretrained(tmp_path, out_indices=[3])).eval()
    x = torch.randn(1, 3, 32, 48, generator=rng)
    expected = model(x).last_hidden_state[:, 5:].mT.unflatten(2, (2, 3))
    assert relative_error(backbone(x).feature_maps[0], expected) <= 1e-5


def test_compiles_to_one_graph_per_size(rng):
    model = accelerate(model_of(num_hidden_layers=1))
    graph = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    for shape in ((2, 3, 32, 48), (1, 3, 64, 32)):
        x = torch.randn(shape, generator=rng)
        out = graph(x).last_hidden_state
        assert relative_error(out, model(x).last_hidden_state) <= 1e-5
