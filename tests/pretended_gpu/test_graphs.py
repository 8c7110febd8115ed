"""CUDA graphs on the pretended GPU: nothing waits or is compiled anew, weights are renewed."""

import os
import random
import warnings

import pytest
import torch

import pretended_gpu

pretended_gpu.install()

from transformers import DINOv3ViTConfig

from hrvlm import DINOv3Encoder
from pretended_gpu import RECORD

COUNT = int(os.environ.get("MIXES", "150"))  # 1,000 take ten seconds of a core


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        num_register_tokens=4, num_hidden_layers=2, hidden_size=64, intermediate_size=128,
        num_attention_heads=2, patch_size=2,
    )  # fmt: skip
    return DINOv3Encoder(config).eval().to("cuda")


def batches(count, *, most):
    rng = random.Random(0)
    for _ in range(count):
        grids = [(rng.randint(1, 6), rng.randint(1, 6)) for _ in range(rng.randint(1, most))]
        yield torch.randn(sum(h * w for h, w in grids), 12).pin_memory(), grids


def memory_of(a):
    return a.data_on_cpu.untyped_storage().nbytes()


def allocated():
    """Bytes of each allocation since it was asked before."""
    sizes = sorted(allocation.bytes for allocation in RECORD.allocations)
    RECORD.allocations.clear()
    return sizes


def test_many_mixes_are_one_key_for_each_capacity(encoder):
    graphed = encoder.graphed(capacities=[(60, 3), (200, 6)])
    kernels = dict(RECORD.kernels)
    RECORD.clear()
    torch.cuda.set_sync_debug_mode("error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for patches, grids in batches(COUNT, most=4):
            with RECORD.counting():
                out = graphed(patches, grids=grids)
            returned = out.packed_last_hidden_state, out.pooler_output, out.packed.cu_seqlens
            assert allocated() == sorted(map(memory_of, returned))
            assert out.packed_last_hidden_state.shape == (
                sum(5 + h * w for h, w in grids), 64,
            )  # fmt: skip
    torch.cuda.set_sync_debug_mode("default")
    assert not RECORD.syncs and not RECORD.uploads
    assert RECORD.kernels == kernels
    assert [launch.kernel for launch in RECORD.launches] == ["graph replay"] * COUNT
    assert 0.1 < graphed.empty_rows < 0.7


def test_a_replay_allocates_its_results(encoder):
    """And the layout, unless it is given; an eager batch allocates much more."""
    graphed = encoder.graphed(capacities=[(60, 3)])
    ((patches, grids),) = batches(1, most=1)
    packed = graphed(patches, grids=grids).packed
    allocated()
    with RECORD.counting():
        out = graphed(patches, grids=packed)
    results = out.packed_last_hidden_state, out.pooler_output
    assert allocated() == sorted(map(memory_of, results))
    with RECORD.counting(), torch.no_grad():
        encoder(patches.to("cuda", non_blocking=True), grids=packed)
    assert len(allocated()) > 10


def test_a_batch_that_fits_no_capacity_runs_eagerly_and_says_so(encoder):
    graphed = encoder.graphed(capacities=[(60, 3)])
    patches, grids = torch.randn(64, 12).pin_memory(), [(8, 8)]
    with pytest.warns(UserWarning, match=r"69 tokens of 1 images fit no capacity \(60 tokens of 3"):
        out = graphed(patches, grids=grids)
    with torch.no_grad():
        expected = encoder(patches.to("cuda"), grids=grids)
    assert torch.equal(out.packed_last_hidden_state.cpu(), expected.packed_last_hidden_state.cpu())
    assert graphed.empty_rows == 0


@pytest.mark.parametrize("options", [{"sizes": [[(4, 6)]]}, {"capacities": [(60, 3)]}])
def test_what_a_graph_reads_follows_the_weights(encoder, options):
    """In place, in the block and behind it; also when the encoder has dropped its own copy."""
    graphed = encoder.graphed(**options)
    recordings = graphed._recordings
    held = next(iter(recordings.values() if isinstance(recordings, dict) else recordings)).folded
    tensors = [[a for a in folded[2:] if a is not None] for _, folded in held._blocks]
    addresses = [[a.data_ptr() for a in block] for block in tensors]
    images = torch.randn(1, 3, 4, 6).to("cuda", non_blocking=True)
    encoder.eval()
    with torch.no_grad():
        encoder.layer[0].layer_scale1.lambda1.mul_(2)
        encoder.layer[1].attention.qkv_bias.v_bias.add_(1)
    graphed(images)
    fresh = DINOv3Encoder(encoder.config).eval().to("cuda")
    fresh.load_state_dict(encoder.state_dict())
    expected = fresh.graphed(**options)._recordings
    expected = next(iter(expected.values() if isinstance(expected, dict) else expected)).folded
    for ours, theirs in zip(held._blocks, expected._blocks, strict=True):
        for a, b in zip(ours[1][2:], theirs[1][2:], strict=True):
            assert torch.equal(a.cpu(), b.cpu())
    joined = [pair[1].cpu() for pair in held._biases], [pair[1].cpu() for pair in expected._biases]
    assert all(torch.equal(a, b) for a, b in zip(*joined, strict=True))
    assert [[a.data_ptr() for a in block] for block in tensors] == addresses
    other = torch.nn.Parameter(torch.zeros(64, 128).to("cuda"), requires_grad=False)
    encoder.layer[0].mlp.down_proj.weight = other
    with pytest.raises(RuntimeError, match="moved or replaced since the graphs were captured"):
        graphed(images)
