"""Every parameter is used through its module's call; kernels read only weights of plain modules."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrizations, prune

from hrvlm.encoder.layers import QKVLinear
from hrvlm.encoder.plain_modules import input_dtype, is_plain
from hrvlm.vlm.modality_projector import ModalityProjector
from tests.encoder.encoders import FAMILY, pair_of
from tests.encoder.kinds import KINDS, OTHERS
from tests.encoder.kinds import pair_of as pair_of_kind
from tests.tiny import config_of, model_of, picture, processor_of, siglip_config_of

IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def silent_modules(model, run):
    """Hooks that do not fire in a training step, of all modules with parameters of their own."""
    owners = {
        name: module
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    assert owners
    silent, handles = set(), []
    for name, module in owners.items():
        for register in (
            module.register_forward_pre_hook,
            module.register_forward_hook,
            module.register_full_backward_hook,
        ):
            key = (name, register.__name__)
            silent.add(key)
            handles.append(register(lambda *_, key=key: silent.discard(key)))
    run().square().sum().backward()
    for handle in handles:
        handle.remove()
    return silent


@pytest.mark.parametrize("name", FAMILY)
def test_hooks_fire_on_every_module_of_the_encoder(name):
    theirs, ours = pair_of(name, num_hidden_layers=2)
    assert silent_modules(theirs, lambda: theirs(IMAGES).last_hidden_state) == set()
    assert silent_modules(ours, lambda: ours(IMAGES).last_hidden_state) == set()


@pytest.mark.parametrize("kind", OTHERS)
def test_hooks_fire_on_every_module_of_both_families_in_eager_and_on_the_kernels(kind):
    _, ours = pair_of_kind(kind, num_hidden_layers=2, num_attention_heads=1)
    assert silent_modules(ours, lambda: ours(IMAGES).last_hidden_state) == set()


@pytest.mark.parametrize("append_cls", [False, True])
def test_hooks_fire_on_every_module_of_the_projector(append_cls):
    projector = ModalityProjector(
        vit_hidden_dim=8,
        lm_hidden_dim=12,
        mp_pixel_shuffle_factor=2,
        num_prefix_tokens=1,
        mp_append_cls=append_cls,
    )
    x = torch.randn(2, 9, 8, requires_grad=True)
    assert silent_modules(projector, lambda: projector(x, 4, 2)) == set()


@pytest.mark.parametrize("vision", ["dinov3", "siglip"])
def test_hooks_fire_on_every_module_of_the_vlm(vision):
    siglip = vision == "siglip"
    config = config_of(siglip_config_of() if siglip else None, mp_append_cls=not siglip)
    model = model_of(config)
    inputs = processor_of(config=config)(images=[picture(32, 32)], text="<|image|>say")
    assert silent_modules(model, lambda: model(**inputs).logits) == set()


def test_what_a_hook_returns_is_what_the_encoder_goes_on_with():
    _, encoder = pair_of()
    expected = encoder(IMAGES).last_hidden_state
    for name in ("embeddings.patch_embeddings", "layer.0.attention.qkv", "layer.0.norm2"):
        module = encoder.get_submodule(name)
        with module.register_forward_hook(lambda module, args, out: 2 * out):
            assert not torch.allclose(encoder(IMAGES).last_hidden_state, expected), name
        with module.register_forward_hook(lambda module, args, out: out.clone()):
            torch.testing.assert_close(encoder(IMAGES).last_hidden_state, expected)


def test_the_patch_embedding_is_the_convolution_of_an_image_too(rng):
    theirs, ours = pair_of()
    image = torch.randn(2, 3, 48, 80, generator=rng)
    expected = theirs.get_input_embeddings()(image)
    assert torch.equal(ours.get_input_embeddings()(image), expected)
    patch = ours.get_input_embeddings()(image[:, :, 16:32, 16:32])
    torch.testing.assert_close(patch, expected[:, :, 1:2, 1:2])


def linear_of(change):
    layer = nn.Linear(4, 3)
    change(layer)
    return layer


def replace_forward(layer):
    layer.forward = layer.forward


def replace_weight(make):
    def change(layer):
        layer.weight = nn.Parameter(make(layer.weight.detach()), requires_grad=False)

    return change


class OwnParameter(nn.Parameter):
    """As bitsandbytes has them."""


NOT_PLAIN = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
    "forward of its own": replace_forward,
    "compiled by itself": lambda layer: layer.compile(backend="eager"),
    "parametrization": parametrizations.weight_norm,
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "integer weight": replace_weight(lambda w: w.to(torch.int8)),
    "float8 weight": replace_weight(lambda w: w.to(torch.float8_e4m3fn)),
    "meta": lambda layer: layer.to("meta"),
    "packed weight": lambda layer: layer.register_parameter("weight", OwnParameter(layer.weight)),
}


@pytest.mark.parametrize("change", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_a_module_with_something_on_it_is_not_plain(change):
    assert is_plain(nn.Linear(4, 3), nn.Linear)
    assert not is_plain(linear_of(change), nn.Linear)


@pytest.mark.parametrize(
    "register",
    [
        torch_modules.register_module_forward_hook,
        torch_modules.register_module_forward_pre_hook,
        torch_modules.register_module_full_backward_hook,
        torch_modules.register_module_full_backward_pre_hook,
    ],
)
def test_no_module_is_plain_under_hooks_for_all(register):
    with register(lambda *_: None):
        assert not is_plain(nn.Linear(4, 3), nn.Linear)
    assert is_plain(nn.Linear(4, 3), nn.Linear)


CALLS = [(kind, name) for kind in (nn.Linear, QKVLinear) for name in ("forward", "_call_impl")]
CALLS += [(nn.Module, "__call__"), (nn.Linear, "__call__")]


@pytest.mark.parametrize(("kind", "name"), CALLS, ids=str)
def test_no_module_is_plain_while_what_its_call_runs_is_replaced(kind, name, monkeypatch):
    layer = QKVLinear(4, 3, bias=False)
    assert is_plain(layer, QKVLinear)
    stock = getattr(kind, name)
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, lambda self, *args: 2 * stock(self, *args))
        assert not is_plain(layer, QKVLinear)
    assert is_plain(layer, QKVLinear)


def test_a_sharded_weight_is_not_plain(mesh_of_one):
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh_of_one))
    assert not is_plain(layer, nn.Linear)


def test_modules_that_are_sharded_by_themselves(mesh_of_one):
    model, inputs = model_of(), processor_of()(images=[picture(60, 40)], text="<|image|>say")
    expected = model(**inputs).logits
    for module in (model.MP.proj, model.vision_encoder.embeddings.patch_embeddings):
        fully_shard(module, mesh=mesh_of_one)
    first, second = model.vision_encoder.layer
    for module in (first.attention.qkv, first.attention.qkv_bias, first.norm2, second):
        fully_shard(module, mesh=mesh_of_one)
    fully_shard(model, mesh=mesh_of_one)
    logits = model(**inputs).logits
    torch.testing.assert_close(logits, expected)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_an_input_takes_the_dtype_of_a_weight_only_if_it_is_one():
    x = torch.zeros(1, 4, dtype=torch.float16)
    assert input_dtype(nn.Linear(4, 3), x) == torch.float32
    for name in ("forward hook", "parametrization", "meta"):
        assert input_dtype(linear_of(NOT_PLAIN[name]), x) == torch.float32
    for name in ("integer weight", "float8 weight", "packed weight", "forward of its own"):
        assert input_dtype(linear_of(NOT_PLAIN[name]), x) == torch.float16
    assert input_dtype(nn.Identity(), x) == torch.float16


class RowScaled(nn.Module):
    """A linear layer in int8 with a scale a row, made from one as quantisers do."""

    def __init__(self, layer):
        super().__init__()
        self.scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        stored = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def test_every_linear_layer_replaced_by_one_in_int8():
    vlm, inputs = model_of(), processor_of()(images=[picture(60, 40)], text="<|image|>say")
    theirs = [pair_of()[0], pair_of_kind("dinov2")[0]]
    ours = [pair_of_kind(kind)[1] for kind in KINDS]
    for model, run in (
        *((model, lambda model: model(IMAGES).last_hidden_state) for model in (*theirs, *ours)),
        (vlm, lambda model: model(**inputs).logits),
    ):
        changed = copy.deepcopy(model)
        for name, module in list(changed.named_modules()):
            if isinstance(module, nn.Linear):
                changed.set_submodule(name, RowScaled(module))
        with torch.no_grad():
            exact, near = run(model), run(changed.to("cpu"))
        # A row's step is 1/127 of its largest weight; errors of the layers add up.
        assert 0 < (near - exact).norm() / exact.norm() < 0.05


def test_a_projector_with_a_bias_uses_it(rng):
    projector = ModalityProjector(vit_hidden_dim=8, lm_hidden_dim=6, mp_pixel_shuffle_factor=2)
    x = torch.randn(1, 16, 8, generator=rng)
    plain = projector(x, 4, 4)
    biased = nn.Linear(32, 6)
    biased.weight = projector.proj.weight
    projector.proj = biased
    torch.testing.assert_close(projector(x, 4, 4), plain + biased.bias)


def test_the_final_norm_can_be_taken_off(rng):
    _, encoder = pair_of()
    states = encoder(IMAGES, output_hidden_states=True).hidden_states
    encoder.norm = nn.Identity()
    assert torch.equal(encoder(IMAGES).last_hidden_state, states[-1])


class Around(nn.Module):
    """What shows nothing of what is in it, but that what it returns is counted."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("kind", ["dinov3", "dinov3 on the kernels"])
def test_any_module_may_be_wrapped_in_another(kind):
    _, encoder = pair_of_kind(kind, num_hidden_layers=2, num_attention_heads=1)
    expected = encoder(IMAGES).last_hidden_state.detach()
    names = [name for name, module in encoder.named_modules() if name and name != "layer"]
    if kind != "dinov3":  # one by one takes long in the interpreter
        names = ["layer.0", "layer.1.attention"]
    for name in names:
        parent, _, last = name.rpartition(".")
        parent, inner = encoder.get_submodule(parent), encoder.get_submodule(name)
        wrapped = Around(inner)
        setattr(parent, last, wrapped)
        torch.testing.assert_close(encoder(IMAGES).last_hidden_state, expected, msg=name)
        assert wrapped.calls, name
        setattr(parent, last, inner)


def test_attention_maps_of_a_sharded_encoder(mesh_of_one):
    _, encoder = pair_of(num_hidden_layers=2)
    expected = encoder(IMAGES, output_prefix_attentions=True)
    for layer in encoder.layer:
        fully_shard(layer, mesh=mesh_of_one)
    maps = fully_shard(encoder, mesh=mesh_of_one)(IMAGES, output_prefix_attentions=True)
    torch.testing.assert_close(maps.prefix_attentions, expected.prefix_attentions)
    torch.testing.assert_close(maps.last_hidden_state, expected.last_hidden_state)


def test_the_keys_that_the_biases_had_still_load():
    _, encoder = pair_of("key_bias")
    state = {key.replace("qkv_bias.", "qkv."): value for key, value in encoder.state_dict().items()}
    assert "layer.0.attention.qkv.k_bias" in state
    _, again = pair_of("key_bias", seed=1)
    again.load_state_dict(state)
    for key, value in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
