"""pretended_gpu: what it refuses, what it records, and what it counts of the encoder."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pretended_gpu

pretended_gpu.install()

from transformers import DINOv3ViTConfig

import hrvlm
from benchmarks.towers.tiny import inputs_of, output_of, tower_of
from hrvlm import DINOv3Encoder
from hrvlm_kernels import (
    PackedGrids,
    normalize_patchify,
    pixel_shuffle_linear,
    residual_layer_norm,
    swiglu,
    varlen_attention,
)
from pretended_gpu import RECORD, SyncError
from pretended_gpu.tensor_maps import check_tensor_map

SIZES = [(64, 96), (320, 320), (16, 16)]


@pytest.fixture(autouse=True)
def fresh_record():
    RECORD.clear()
    yield
    RECORD.sync_mode, RECORD.captured = "default", None


def small_encoder(**options):
    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        num_register_tokens=4, num_hidden_layers=2, hidden_size=128, intermediate_size=256,
        num_attention_heads=2, **options,
    )  # fmt: skip
    return DINOv3Encoder(config).eval()


def test_it_says_that_it_is_a_gpu():
    x = torch.randn(3, device="cuda")
    assert x.device == torch.device("cuda", 0) and x.is_cuda and not x.is_cpu
    assert (x + 1).device == x.device and x[1:].device == x.device
    assert x.cpu().device.type == "cpu"
    assert torch.cuda.get_device_capability() == (9, 0)
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_tensors_of_two_devices_raise():
    x = torch.randn(4, device="cuda")
    for run in (lambda: x + torch.ones(4), lambda: torch.cat([x, torch.ones(4)])):
        with pytest.raises(RuntimeError, match="same device, but found at least two"):
            run()
    assert torch.equal((x + torch.tensor(1.0)).cpu(), x.cpu() + 1)  # a scalar on the host may


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.copy_(torch.ones(4)),
        lambda x: torch.ones(4).to("cuda"),
        lambda x: torch.tensor([1, 2], device="cuda"),
        lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64, device="cuda")),
    ],
)
def test_what_waits_for_the_device_is_seen(wait):
    x = torch.randn(4, device="cuda")
    RECORD.clear()
    wait(x)
    assert [place.partition(":")[0] for _, place in RECORD.syncs][:1] == ["test_pretended.py"]
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(SyncError, match=r"synchronizing CUDA operation .* at test_pretended\.py"):
        wait(x)
    torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(SyncError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        wait(x)


def test_pageable_memory_is_seen_and_pinned_memory_is_not():
    torch.ones(8).to("cuda", non_blocking=True)
    assert RECORD.uploads == ["torch.float32 (8,)"] and not RECORD.syncs
    RECORD.clear()
    torch.ones(8).pin_memory().to("cuda", non_blocking=True)
    torch.zeros(8, pin_memory=True)[2:].to("cuda", non_blocking=True)
    assert not RECORD.uploads and not RECORD.syncs


def test_the_encoder_never_waits():
    """Features and gradients are the CPU's; nothing in a forward or backward asks for a size."""
    encoder, images = small_encoder(), [torch.randn(3, *size) for size in SIZES]
    expected = encoder(images).packed_patches
    expected.square().mean().backward()
    grads = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encoder.zero_grad()
    encoder.to("cuda")
    uploaded = [image.to("cuda") for image in images]
    RECORD.clear()
    torch.cuda.set_sync_debug_mode("error")
    out = encoder(uploaded).packed_patches
    out.square().mean().backward()
    torch.cuda.set_sync_debug_mode("default")
    assert not RECORD.syncs and not RECORD.uploads
    torch.testing.assert_close(out.detach().cpu(), expected.detach(), rtol=1e-4, atol=1e-4)
    got = [p.grad.cpu() for p in encoder.parameters() if p.grad is not None]
    for a, b in zip(got, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_every_op_runs_its_launcher_and_has_numbers():
    packed = PackedGrids.from_grids([(4, 8), (20, 16)], num_prefix_tokens=5, device="cuda")
    t = packed.total_tokens

    def leaf(*shape):
        return torch.randn(*shape, device="cuda").requires_grad_()

    q, k, v = (leaf(t, 2, 32) for _ in range(3))
    rope = packed.coords, torch.rand(8, device="cuda")
    x, scale, weight, bias = leaf(t, 64), leaf(64), leaf(64), leaf(64)
    outs = [
        varlen_attention(q, k, v, packed, rope=rope),
        pixel_shuffle_linear(x, packed, 4, leaf(24, 1024), leaf(24)),
        *residual_layer_norm(x, leaf(t, 64), scale, weight, bias),
        swiglu(x, leaf(t, 64)),
    ]
    torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])
    bytes_ = torch.randint(256, (1, 3, 32, 16), dtype=torch.uint8).to("cuda")
    outs.append(normalize_patchify(bytes_, 16, [0.5] * 3, [0.5] * 3)[0])
    grads = [a.grad for a in (q, k, v, x, scale, weight, bias)]
    assert all(a.cpu().isfinite().all() for a in (*outs, *grads))
    assert len({launch.kernel for launch in RECORD.launches}) >= 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"address": 8}, "multiple of 16"),
        ({"strides": [96, 2]}, "last stride"),
        ({"strides": [100, 1]}, "bytes must be"),
        ({"strides": [32, 1]}, "bytes must be"),
        ({"box": [512, 64]}, "512 is not 1 to 256"),
        ({"box": [64, 4]}, "row of 8 bytes"),
        ({"shape": [0, 64]}, "0 is not 1 to"),
        ({"swizzle": 2}, "swizzle 2"),
    ],
)
def test_tensor_maps(change, message):
    good = {
        "address": 4096, "swizzle": 3, "itemsize": 2, "box": [64, 64], "shape": [200, 64],
        "strides": [192, 1],
    }  # fmt: skip
    check_tensor_map(**good)
    with pytest.raises(ValueError, match=message):
        check_tensor_map(**good | change)


@torch.no_grad()
def test_a_replay_does_again_what_was_captured():
    """Ops of torch and of hrvlm_kernels, in place and out of it, through views."""
    x, rows = torch.randn(4, 6, device="cuda"), torch.zeros(4, 6, device="cuda")

    def run():
        gated = swiglu(x[:, :3].contiguous(), x[:, 3:].contiguous())
        rows[:, 3:].add_(1)
        return gated.sum(1) + rows[0, 3]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    x.mul_(2)
    RECORD.clear()
    graph.replay()
    assert [launch.kernel for launch in RECORD.launches] == ["graph replay"]
    assert rows[2, 3].item() == 3 and torch.equal(out + 1, run())


def test_a_profile_of_the_device_names_what_it_starts():
    x, weight, bias = (torch.randn(*shape, device="cuda") for shape in ((4, 8), (8, 8), (8,)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        swiglu(torch.nn.functional.linear(x[:2], weight, bias), x[2:])
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    assert names == ["aten::addmm", "swiglu_forward"]


def test_inference_mode_is_of_results_and_not_of_views():
    weight = torch.nn.Parameter(torch.randn(4, 4, device="cuda"))
    with torch.inference_mode():
        view, result = weight[1:].T, weight + 1
        of_result = result[1:]
    assert not view.is_inference() and result.is_inference() and of_result.is_inference()
    (view * weight[1:].T).sum().backward()
    assert torch.equal(weight.grad[1:], weight.detach()[1:])  # none through the view


def test_a_thread_has_the_gpu_too():
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda n: torch.ones(n, device="cuda").add_(1), (2, 3)))
    assert [a.tolist() for a in made] == [[2, 2], [2, 2, 2]]
    assert all(a.is_cuda for a in made)


def test_it_comes_before_the_kernels_package():
    with pytest.raises(RuntimeError, match="real GPU"):
        pretended_gpu.install()


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_an_accelerated_tower_waits_once_for_grids_on_the_device(where):
    tower, inputs = tower_of("qwen2_5_vl").cuda(), inputs_of("qwen2_5_vl")
    on_device = {name: value.cuda() for name, value in inputs.items()}
    fresh = on_device | {"grid_thw": inputs["grid_thw"].to(where)}
    with torch.no_grad():
        expected = output_of(tower, on_device).cpu()
        assert len(RECORD.syncs) > 4
        hrvlm.accelerate(tower)
        RECORD.clear()
        out = output_of(tower, fresh)
    assert len(RECORD.syncs) == (where == "cuda"), RECORD.syncs
    assert not RECORD.uploads
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_the_device_waits_for_as_long_as_the_host_queues():
    """Between what empties the cache and the first event, so that small ops are not timed late."""
    from hrvlm.measuring.timing import take_turns

    x = torch.ones(4, device="cuda")

    def slow():
        time.sleep(0.02)
        x.add_(1)

    RECORD.waits.clear()
    rivals = {"fast": lambda: x.add_(1), "slow": slow}
    timings = take_turns(rivals, torch.device("cuda"), min_rounds=2, max_rounds=2, budget_s=0)
    _, calibration, *waits = RECORD.waits
    assert len(waits) == 4 and calibration > 1e6
    assert min(waits[1], waits[2]) > 3 * max(waits[0], waits[3]) > 0
    assert all(len(timing.seconds) == 2 for timing in timings.values())
