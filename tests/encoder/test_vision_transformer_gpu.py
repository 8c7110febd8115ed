"""The encoder on its Triton kernels: parity, determinism, no syncs, memory, a training step."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DINOv3ViTConfig

from hrvlm import DINOv3Encoder, pack_images
from hrvlm_kernels import PackedGrids
from tests.numerics import assert_contraction

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
# Patch grids: 224, 768 and 1024 px squares, and shapes from 1:4 to 4:1 in one pack.
PACKS = {
    "224": [(14, 14)] * 4,
    "768": [(48, 48)],
    "1024": [(64, 64)],
    "mixed": [(14, 14), (16, 64), (48, 12), (1, 1), (30, 20), (7, 9)],
}


def encoder_of(layers: int = 4, **changes) -> DINOv3Encoder:
    """A ViT-S/16 with few layers and weights at the scale of a trained model."""
    torch.manual_seed(0)
    config = DINOv3ViTConfig(num_register_tokens=4, num_hidden_layers=layers, **changes)
    encoder = DINOv3Encoder(config)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("bias") or "token" in name:
                parameter.normal_(0, 0.1)
    return encoder.to(DEVICE)


def patches_of(grids, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(h * w for h, w in grids), 768, generator=generator).to(DEVICE, dtype)


def run(encoder, patches, packed, cotangent):
    """Output and the gradients of patches and weights."""
    patches = patches.detach().clone().requires_grad_()
    encoder.zero_grad()
    out = encoder(patches, grids=packed).packed_last_hidden_state
    out.backward(cotangent.to(out.dtype))
    return out.detach(), patches.grad, encoder.layer[0].attention.qkv.weight.grad.clone()


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_and_backward_err_no_more_than_eager(pack, dtype):
    packed = PackedGrids.from_grids(PACKS[pack], num_prefix_tokens=5, device=DEVICE)
    encoder = encoder_of().to(dtype)
    patches = patches_of(PACKS[pack], dtype)
    cotangent = torch.randn(
        packed.total_tokens, 384, generator=torch.Generator().manual_seed(2)
    ).to(DEVICE)
    results = {}
    for backend in ("triton", "eager"):
        model = copy.deepcopy(encoder)
        model.backend = backend
        results[backend] = run(model, patches, packed, cotangent)
    oracle = copy.deepcopy(encoder).double()
    oracle.backend = "eager"
    results["oracle"] = run(oracle, patches.double(), packed, cotangent)
    for got, exact, baseline in zip(
        *(results[k] for k in ("triton", "oracle", "eager")), strict=True
    ):
        assert_contraction(got, exact, baseline, packed)


def test_auto_means_triton_and_repeats_bit_for_bit():
    packed = PackedGrids.from_grids(PACKS["mixed"], num_prefix_tokens=5, device=DEVICE)
    encoder, patches = encoder_of().bfloat16(), patches_of(PACKS["mixed"], torch.bfloat16)
    cotangent = torch.randn(packed.total_tokens, 384, device=DEVICE)
    first = run(encoder, patches, packed, cotangent)
    for _ in range(19):
        for a, b in zip(run(encoder, patches, packed, cotangent), first, strict=True):
            assert torch.equal(a, b)
    encoder.backend = "triton"
    for a, b in zip(run(encoder, patches, packed, cotangent), first, strict=True):
        assert torch.equal(a, b)


def test_an_image_has_the_same_features_alone_and_packed():
    encoder = encoder_of().bfloat16().eval()
    images = [torch.randn(3, 16 * h, 16 * w, device=DEVICE).bfloat16() for h, w in PACKS["mixed"]]
    with torch.no_grad():
        out = encoder(images)
        for i, tokens in enumerate(out.packed.split(out.packed_last_hidden_state)):
            alone = encoder([images[i]]).packed_last_hidden_state
            # The GEMMs of torch may pick another algorithm for another number of rows.
            assert (tokens.float() - alone.float()).norm() <= 2e-2 * alone.float().norm()


def test_a_forward_and_backward_never_wait_for_the_device():
    encoder = encoder_of().bfloat16()
    images = [torch.randn(3, 16 * h, 16 * w) for h, w in PACKS["mixed"]]
    patches, grids = pack_images(images, 16)
    patches = patches.to(DEVICE, torch.bfloat16)
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=5, device=DEVICE)
    cotangent = torch.randn(packed.total_tokens, 384, device=DEVICE)
    run(encoder, patches, packed, cotangent)  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = encoder(patches, grids=packed).packed_last_hidden_state
        out.backward(cotangent.to(out.dtype))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()


def test_one_graph_serves_many_packings():
    """But for a single image, since torch.compile takes a size of 1 for a constant."""
    encoder = encoder_of(layers=2).bfloat16().eval()
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for grids in (PACKS["mixed"], [(3, 5), (8, 2)], [(20, 9)] * 3, [(14, 14)], [(30, 20)]):
            packed = PackedGrids.from_grids(grids, num_prefix_tokens=5, device=DEVICE)
            patches = patches_of(grids, torch.bfloat16)
            got = compiled(patches, grids=packed).packed_last_hidden_state
            assert torch.equal(got, encoder(patches, grids=packed).packed_last_hidden_state)
            assert counters["stats"]["unique_graphs"] == 1 + (len(grids) == 1)


def test_memory_of_a_training_step_grows_linearly_with_the_tokens(capsys):
    encoder = encoder_of().bfloat16()
    peaks = []
    for side in (32, 64, 128):
        packed = PackedGrids.from_grids([(side, side)], num_prefix_tokens=5, device=DEVICE)
        patches = patches_of([(side, side)], torch.bfloat16)
        cotangent = torch.randn(packed.total_tokens, 384, device=DEVICE)
        run(encoder, patches, packed, cotangent)
        encoder.zero_grad()  # what is left of the gradients would be taken off the peak
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(encoder, patches, packed, cotangent)
        peaks.append((torch.cuda.max_memory_allocated() - before) / packed.total_tokens)
    with capsys.disabled():
        print("\npeak bytes per token at 512, 1024, 2048 px:", [round(p) for p in peaks])
    assert max(peaks[1:]) <= 1.1 * peaks[0]


def test_amp_training_step_at_768_px_is_finite(capsys):
    encoder = encoder_of(layers=12).train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-4)
    images = [torch.randn(3, 768, 512, device=DEVICE), torch.randn(3, 320, 768, device=DEVICE)]
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = encoder(images)
        target = torch.randn(out.cls.shape, device=DEVICE)
        loss = (
            out.cls.float() - target
        ).square().mean() + out.packed_patches.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        unused = {"embeddings.mask_token"}
        for name, parameter in encoder.named_parameters():
            assert name in unused or parameter.grad.isfinite().all(), name
        optimizer.step()
        assert loss.isfinite()
    with capsys.disabled():
        print(f"\npeak memory of the AMP step: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
