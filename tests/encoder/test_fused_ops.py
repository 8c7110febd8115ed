"""The ops that make fewer passes of a block, wherever the encoder runs on the kernels."""

import copy
import gc

import pytest
import torch

from hrvlm.encoder import fused_blocks, layers
from hrvlm_kernels import PackedGrids
from tests.encoder.encoders import pair_of
from tests.kernels.helpers import CountingBackend, interpreter_only
from tests.numerics import assert_contraction, relative_error

IN_A_BLOCK = ("residual_layer_norm", "swiglu")  # by itself
OVER_BLOCKS = (
    "qkv_attention",
    "linear_residual_layer_norm",
    "bias_gelu",
    "shifted_layer_norm",
    "linear_gelu",
    "linear_swiglu",
    "linear_rope_2d",
)
GRIDS = [(2, 3), (1, 1), (4, 1)]
# What the fused ops stand between.
NEIGHBOURS = (
    "attention.qkv.weight",
    "layer_scale1.lambda1",
    "norm2.weight",
    "norm2.bias",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
)


def inputs_of(encoder, grids=GRIDS, *, seed=1, device="cpu", dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    packed = PackedGrids.from_grids(
        grids, num_prefix_tokens=encoder.num_prefix_tokens, device=device
    )
    patches = torch.randn(sum(h * w for h, w in grids), 3 * encoder.patch_size**2, generator=rng)
    cotangent = torch.randn(packed.total_tokens, encoder.config.hidden_size, generator=rng)
    return patches.to(device, dtype), packed, cotangent.to(device, dtype)


def results_of(encoder, patches, packed, cotangent, names=()):
    """The features, selected layers, and the gradients of these weights of block 0, or of all."""
    torch.manual_seed(3)  # of drop path
    encoder.zero_grad()
    out = encoder(patches, grids=packed, out_indices=[0], apply_layernorm=False)
    hidden = out.packed_last_hidden_state
    (hidden * cotangent).sum().backward()
    block = dict(encoder.layer[0].named_parameters())
    weights = [block[name] for name in names] or encoder.parameters()
    gradients = [p.grad.clone() for p in weights if p.grad is not None]
    return [hidden.detach(), *(a.detach() for a in out.packed_selected_hidden_states), *gradients]


@pytest.fixture
def calls(monkeypatch):
    """Names of the fused ops that ran, in order."""
    seen = []

    def counted(name, op):
        return lambda *args, **options: (seen.append(name), op(*args, **options))[1]

    for module, names in ((layers, IN_A_BLOCK), (fused_blocks, OVER_BLOCKS)):
        for name in names:
            monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return seen


def on(backend, encoder):
    encoder.backend = backend
    return encoder


@interpreter_only
@pytest.mark.parametrize(
    "mode", ["training", "autocast", "checkpointing", "drop path", "not gated"]
)
def test_the_kernels_err_no_more_than_eager(mode, calls):
    changes = {"drop_path_rate": 0.5} if mode == "drop path" else {}
    name = "vit" if mode == "not gated" else "vit_gated"
    _, encoder = pair_of(name, num_hidden_layers=1, **changes)
    encoder.train()
    if mode == "checkpointing":
        encoder.gradient_checkpointing_enable()
    patches, packed, cotangent = inputs_of(encoder)
    oracle = results_of(
        on("eager", copy.deepcopy(encoder).double()), patches.double(), packed, cotangent.double()
    )
    encoder.allow_fp16 = True
    with torch.autocast("cpu", dtype=torch.float16, enabled=mode == "autocast"):
        baseline = results_of(on("eager", encoder), patches, packed, cotangent)
        assert calls == []
        got = results_of(on("triton", encoder), patches, packed, cotangent)
    if mode in ("autocast", "checkpointing", "drop path"):
        expected = list(IN_A_BLOCK) * (2 if mode == "checkpointing" else 1)  # run again
    else:
        inner = "bias_gelu" if mode == "not gated" else "swiglu"
        expected = [*OVER_BLOCKS[:2], inner, OVER_BLOCKS[1]]
    assert calls == expected
    for a, exact, plain in zip(got, oracle, baseline, strict=True):
        assert a.dtype == plain.dtype
        assert_contraction(a, exact, plain)


@interpreter_only
@pytest.mark.parametrize("batch", [False, True])
def test_a_gradient_kept_at_a_hidden_state_is_that_of_all_behind_it(batch, calls):
    theirs, encoder = pair_of("vit", num_hidden_layers=2)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 16, 32, generator=rng)
    cotangent = torch.randn(2, 7, 64, generator=rng)
    prefix = "" if batch else "packed_"
    expected = theirs(x, output_hidden_states=True)
    got = on("triton", encoder)(x if batch else list(x), output_hidden_states=True)
    states = got[f"{prefix}hidden_states"]
    for state in (*expected.hidden_states, *states):
        state.retain_grad()
    expected.last_hidden_state.backward(cotangent)
    final = got[f"{prefix}last_hidden_state"]
    final.backward(cotangent.view_as(final))
    assert calls.count("qkv_attention") == 2
    for state, same in zip(states, expected.hidden_states, strict=True):
        assert relative_error(state, same.view_as(state)) <= 1e-5
        assert relative_error(state.grad, same.grad.view_as(state)) <= 1e-5


@interpreter_only
@pytest.mark.parametrize("name", ["layer_scale1", "norm2", "mlp.act_fn"])
def test_a_module_with_a_hook_is_called(name, calls):
    _, encoder = pair_of("vit_gated", num_hidden_layers=1)
    patches, packed, _ = inputs_of(encoder)
    seen = []
    module = encoder.layer[0].get_submodule(name)
    with module.register_forward_hook(lambda *_: seen.append(name)), torch.no_grad():
        on("triton", encoder)(patches, grids=packed)
    assert seen == [name]
    norm = "shifted_layer_norm"
    in_one = [norm, "linear_rope_2d", norm, norm]
    assert calls == (in_one if name == "mlp.act_fn" else ["swiglu"])


def features_of(encoder, patches, packed):
    """All hidden states, the last one with and without the norm."""
    with torch.inference_mode():
        out = encoder(patches, grids=packed, output_hidden_states=True)
        plain = encoder(patches, grids=packed, final_norm=False)
    return [out.packed_last_hidden_state, plain.packed_last_hidden_state, *out.packed_hidden_states]


@interpreter_only
@pytest.mark.parametrize("name", ["vit", "vit_gated"])
def test_folded_weights_err_no_more_than_eager(name, calls):
    _, encoder = pair_of(name, num_hidden_layers=1)
    patches, packed, _ = inputs_of(encoder, GRIDS[:2])
    before = patches.clone()
    oracle = features_of(on("eager", copy.deepcopy(encoder).double()), patches.double(), packed)
    baseline = features_of(on("eager", encoder), patches, packed)
    got = features_of(on("triton", encoder), patches, packed)
    for a, exact, plain in zip(got, oracle, baseline, strict=True):
        assert_contraction(a, exact, plain)
    assert calls.count("shifted_layer_norm") == 5
    assert calls.count("linear_gelu" if name == "vit" else "linear_swiglu") == 2
    assert calls.count("linear_rope_2d") == 2
    assert torch.equal(patches, before)


@interpreter_only
def test_q_and_k_of_images_of_any_size_are_rotated_in_the_product(monkeypatch):
    """Forward and backward, with an image of more than 256 tokens: attention rotates nothing."""
    from hrvlm_kernels.triton_kernels import attention_tiles

    turned = []
    monkeypatch.setattr(attention_tiles, "rotated", lambda *args: turned.append(args))
    _, encoder = pair_of("vit", num_hidden_layers=1)
    inputs = inputs_of(encoder, [(2, 3), (16, 17)])
    oracle, baseline = (
        results_of(on("eager", module), *(a.to(dtype) for a in inputs[:1]), inputs[1], inputs[2])
        + features_of(module, inputs[0].to(dtype), inputs[1])
        for module, dtype in (
            (copy.deepcopy(encoder).double(), torch.float64), (encoder, torch.float32)
        )
    )  # fmt: skip
    got = results_of(on("triton", encoder), *inputs) + features_of(encoder, *inputs[:2])
    for a, exact, plain in zip(got, oracle, baseline, strict=True):
        assert_contraction(a, exact, plain)
    assert not turned


@interpreter_only
def test_a_changed_weight_is_folded_again():
    """Changed in place, loaded, or with other data."""
    _, encoder = pair_of("vit", num_hidden_layers=2)
    patches, packed, _ = inputs_of(encoder, GRIDS[:1])

    def check():
        with torch.no_grad():
            got, expected = (
                on(backend, encoder)(patches, grids=packed).packed_last_hidden_state
                for backend in ("triton", "eager")
            )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    check()
    for key in ("attention.o_proj.weight", "mlp.down_proj.bias", "layer_scale2.lambda1"):
        with torch.no_grad():
            encoder.layer[0].get_parameter(key).add_(0.5)
        check()
    encoder.layer[0].attention.qkv_bias.v_bias.detach().add_(1)
    weight = encoder.layer[1].mlp.down_proj.weight
    weight.data = weight.data * 1.5
    check()
    encoder.load_state_dict({k: v * 0.9 for k, v in encoder.state_dict().items()})
    check()


@interpreter_only
@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_that_is_merged_between_two_inferences_is_folded(safe):
    """Merging writes through ``.data``: the weight is the same tensor, of the same version."""
    peft = pytest.importorskip("peft")
    _, encoder = pair_of("vit", num_hidden_layers=2)
    patches, packed, _ = inputs_of(encoder, GRIDS[:1])

    def features(backend, model):
        with torch.no_grad():
            return on(backend, model)(patches, grids=packed).packed_last_hidden_state

    before = features("triton", encoder)
    options = {"target_modules": ["o_proj", "down_proj"], "init_lora_weights": False}
    adapted = peft.get_peft_model(encoder, peft.LoraConfig(r=2, **options))
    merged = adapted.merge_and_unload(safe_merge=safe)
    assert merged is encoder
    got = features("triton", encoder)
    torch.testing.assert_close(got, features("eager", encoder), rtol=1e-4, atol=1e-5)
    assert (got - before).abs().max() > 0.1


@interpreter_only
def test_folded_weights_are_dropped():
    """By train(), by moving, by loading, and with the encoder; they are not copied along."""
    models = [pair_of("vit", num_hidden_layers=2)[1]]
    patches, packed, _ = inputs_of(models[0], GRIDS[:1])
    gc.collect()  # the models of other tests
    count = len(fused_blocks._folded)

    def fold():
        with torch.no_grad():
            on("triton", models[0])(patches, grids=packed)
        assert len(fused_blocks._folded) == count + 2

    for drop in (
        lambda model: model.eval(),
        lambda model: model.float(),
        lambda model: model.load_state_dict(model.state_dict()),
    ):
        fold()
        drop(models[0])
        assert len(fused_blocks._folded) == count
    fold()
    copied = copy.deepcopy(models[0])
    assert len(fused_blocks._folded) == count + 2
    assert not any("fold" in name for name in vars(copied.layer[0]))
    models.clear()
    gc.collect()
    assert len(fused_blocks._folded) == count


@interpreter_only
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_one_graph_for_torch_compile(backend):
    _, encoder = pair_of("vit_gated", num_hidden_layers=1)
    on(backend, encoder).requires_grad_(False)
    patches, packed, _ = inputs_of(encoder)
    counting = CountingBackend()
    compiled = torch.compile(encoder, fullgraph=True, backend=counting)
    expected = encoder(patches, grids=packed).packed_last_hidden_state
    torch.testing.assert_close(compiled(patches, grids=packed).packed_last_hidden_state, expected)
    assert counting.graphs == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu(dtype):
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
    _, encoder = pair_of("vit_gated", **sizes)
    with torch.no_grad():  # at the scale of a trained model
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.15)
    encoder = encoder.to("cuda", dtype).train()
    grids = [(14, 14), (16, 64), (1, 1), (7, 9)]
    patches, packed, cotangent = inputs_of(encoder, grids, device="cuda", dtype=dtype)
    results = {}
    for backend in ("eager", "triton"):
        results[backend] = results_of(
            on(backend, copy.deepcopy(encoder)), patches, packed, cotangent, NEIGHBOURS
        )
    wide = on("eager", copy.deepcopy(encoder).double())
    oracle = results_of(wide, patches.double(), packed, cotangent.double(), NEIGHBOURS)
    for got, exact, plain in zip(results["triton"], oracle, results["eager"], strict=True):
        assert_contraction(got, exact, plain)
