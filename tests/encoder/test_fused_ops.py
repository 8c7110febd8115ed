"""The encoder with its fused ops, which are off by default: the same features, in fewer passes."""

import copy

import pytest
import torch

from hrvlm.encoder import layers
from hrvlm.encoder.layers import FUSED_OPS
from hrvlm_kernels import PackedGrids
from tests.encoder.encoders import pair_of
from tests.kernels.helpers import CountingBackend, interpreter_only
from tests.numerics import assert_contraction

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
    out = encoder(patches, grids=packed, out_indices=[1, -1], apply_layernorm=False)
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

    for name in FUSED_OPS:
        monkeypatch.setattr(layers, name, counted(name, getattr(layers, name)))
    return seen


@pytest.mark.parametrize(
    "mode", ["training", "autocast", "checkpointing", "drop path", "not gated"]
)
def test_on_the_torch_path_nothing_changes_but_the_route(mode, calls):
    changes = {"drop_path_rate": 0.5} if mode == "drop path" else {}
    _, encoder = pair_of("vit" if mode == "not gated" else "vit_gated", **changes)
    encoder.train()
    if mode == "checkpointing":
        encoder.gradient_checkpointing_enable()
    given = inputs_of(encoder)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        expected = results_of(encoder, *given)
        assert calls == []
        got = results_of(encoder._fuse(*FUSED_OPS), *given)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    wanted = {"drop path": ["swiglu"] * 3, "not gated": ["residual_layer_norm"] * 3}
    in_order = [*FUSED_OPS] * 3 if mode != "checkpointing" else [*FUSED_OPS] * 6  # run again
    assert calls == wanted.get(mode, in_order)


@interpreter_only
def test_the_kernels_err_no_more_than_eager(calls):
    _, encoder = pair_of("vit_gated", num_hidden_layers=1)
    given = inputs_of(encoder)
    encoder.backend = "eager"
    baseline = results_of(encoder, *given)
    patches, packed, cotangent = given
    oracle = results_of(
        copy.deepcopy(encoder).double(), patches.double(), packed, cotangent.double()
    )
    encoder.backend = "triton"
    got = results_of(encoder._fuse(*FUSED_OPS), *given)
    assert calls == [*FUSED_OPS]
    for a, exact, plain in zip(got, oracle, baseline, strict=True):
        assert_contraction(a, exact, plain)


def test_one_graph_for_torch_compile():
    _, encoder = pair_of("vit_gated", num_hidden_layers=1)
    encoder._fuse(*FUSED_OPS).requires_grad_(False)
    patches, packed, _ = inputs_of(encoder)
    backend = CountingBackend()
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    expected = encoder(patches, grids=packed).packed_last_hidden_state
    torch.testing.assert_close(compiled(patches, grids=packed).packed_last_hidden_state, expected)
    assert backend.graphs == 1


def test_names_are_checked():
    _, encoder = pair_of(num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"some of \('residual_layer_norm', 'swiglu'\)"):
        encoder._fuse("swigloo")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ops", [FUSED_OPS[:1], FUSED_OPS[1:], FUSED_OPS], ids="-".join)
def test_on_a_gpu(ops, dtype):
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
        model = copy.deepcopy(encoder)
        model.backend = backend
        model._fuse(*ops if backend == "triton" else ())
        results[backend] = results_of(model, patches, packed, cotangent, NEIGHBOURS)
    wide = copy.deepcopy(encoder).double()
    wide.backend = "eager"
    oracle = results_of(wide, patches.double(), packed, cotangent.double(), NEIGHBOURS)
    for got, exact, plain in zip(results["triton"], oracle, results["eager"], strict=True):
        assert_contraction(got, exact, plain)
