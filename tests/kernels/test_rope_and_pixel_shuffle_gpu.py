"""rope_2d, pixel_shuffle_linear, layer_norm_pixel_shuffle on a GPU: bfloat16, races, launches."""

import pytest
import torch

from hrvlm_kernels import PackedGrids
from hrvlm_kernels.ops.layer_norm_pixel_shuffle import layer_norm_pixel_shuffle
from hrvlm_kernels.ops.pixel_shuffle_linear import pixel_shuffle_linear
from hrvlm_kernels.ops.rope_2d import rope_2d, rope_2d_
from tests.kernels import test_layer_norm_pixel_shuffle as norm
from tests.kernels import test_pixel_shuffle_linear as shuffle
from tests.kernels import test_rope_2d as rope
from tests.kernels.helpers import gradients

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Token grids at factor 4: one image of 1024 px, one of 224 px rounded to 256, and wide and tall.
TOKEN_GRIDS = {"one": [(16, 16)], "mixed": [(4, 4), (16, 16), (3, 24), (1, 1), (20, 5)]}
PATCH_GRIDS = [(14, 14), (64, 64), (12, 96), (1, 1), (512, 2)]
REPEATS = 20


def launches(run):
    """Names of what the device executes during ``run()``."""
    run()  # compile first
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type.name == "CUDA"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
def test_rope_2d(head_dim, dtype):
    for check in (rope.check_forward, rope.check_backward):
        check(head_dim, dtype, grids=PATCH_GRIDS, prefix=5, heads=16, device=DEVICE)


def rope_inputs(dtype=torch.bfloat16):
    packed = PackedGrids.from_grids(PATCH_GRIDS, num_prefix_tokens=5, device=DEVICE)
    qkv = rope.make_qkv(packed, 64, dtype, torch.Generator().manual_seed(0), heads=16)
    return qkv, packed.coords, rope.frequencies(64).to(DEVICE)


def test_rope_2d_is_one_kernel(monkeypatch):
    monkeypatch.undo()  # filling what is empty with NaN launches kernels too
    qkv, *positions = rope_inputs()
    assert launches(lambda: rope_2d(qkv[:, 0], qkv[:, 1], *positions)) == ["rope_2d"]
    assert launches(lambda: rope_2d_(qkv[:, 0], qkv[:, 1], *positions)) == ["rope_2d"]


def test_rope_2d_repeats_bit_for_bit_in_and_out_of_place():
    qkv, *positions = rope_inputs()
    expected = torch.stack(rope_2d(qkv[:, 0], qkv[:, 1], *positions))
    for _ in range(REPEATS):
        copy = qkv.clone()
        rope_2d_(copy[:, 0], copy[:, 1], *positions)
        assert torch.equal(copy[:, :2].transpose(0, 1), expected)
        assert torch.equal(copy[:, 2], qkv[:, 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grids", TOKEN_GRIDS)
@pytest.mark.parametrize(("channels", "features"), [(384, 576), (1024, 1024), (48, 130)])
def test_pixel_shuffle_linear(channels, features, grids, dtype):
    options = {"prefix": 5, "grids": TOKEN_GRIDS[grids], "device": DEVICE}
    shuffle.check_all(4, channels, features, dtype, **options)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_pixel_shuffle_linear_other_factors(factor):
    options = {"prefix": 5, "grids": TOKEN_GRIDS["mixed"], "device": DEVICE}
    shuffle.check_all(factor, 384, 256, torch.bfloat16, **options)


def shuffle_inputs(grids, channels=1024, features=1024):
    packed = shuffle.pack(4, TOKEN_GRIDS[grids], 5, DEVICE)
    rng = torch.Generator().manual_seed(0)
    return packed, *shuffle.make_inputs(packed, 4, channels, features, torch.bfloat16, rng)


@pytest.mark.parametrize("grids", TOKEN_GRIDS)
def test_pixel_shuffle_linear_repeats_bit_for_bit(grids):
    packed, *inputs, cotangent = shuffle_inputs(grids)

    def run(x, weight, bias):
        return pixel_shuffle_linear(x, packed, 4, weight, bias, backend="triton")

    expected = gradients(run, inputs, cotangent)
    for _ in range(REPEATS):
        for a, b in zip(gradients(run, inputs, cotangent), expected, strict=True):
            assert torch.equal(a, b)


def test_pixel_shuffle_linear_copies_nothing(monkeypatch):
    monkeypatch.undo()  # filling what is empty with NaN launches kernels too
    packed, x, weight, bias, _ = shuffle_inputs("mixed", channels=384, features=4096)
    with torch.no_grad():
        names = launches(lambda: pixel_shuffle_linear(x, packed, 4, weight, bias))
    assert set(names) <= {"pixel_shuffle_linear_forward", "pixel_shuffle_linear_add_parts"}
    assert names.count("pixel_shuffle_linear_forward") == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [384, 768, 1024, 1280, 4096, 8192])
def test_layer_norm_pixel_shuffle(channels, dtype):
    options = {"prefix": 5, "grids": TOKEN_GRIDS["mixed"], "device": DEVICE}
    norm.check_all(4, channels, dtype, **options)


def test_layer_norm_pixel_shuffle_repeats_bit_for_bit():
    packed = norm.pack(4, TOKEN_GRIDS["mixed"], 5, DEVICE)
    rng = torch.Generator().manual_seed(0)
    *inputs, cotangent = norm.make_inputs(packed, 4, 1024, torch.bfloat16, rng)
    expected = gradients(norm.run(packed, 4), inputs, cotangent)
    for _ in range(REPEATS):
        got = gradients(norm.run(packed, 4), inputs, cotangent)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


def test_the_host_never_waits_for_the_device():
    qkv, *positions = rope_inputs()
    packed, x, weight, bias, cotangent = shuffle_inputs("mixed", channels=64, features=64)

    def run():
        rope_2d(qkv[:, 0], qkv[:, 1], *positions)
        gradients(
            lambda x, weight, bias: pixel_shuffle_linear(x, packed, 4, weight, bias),
            (x, weight, bias),
            cotangent,
        )
        layer_norm_pixel_shuffle(x, packed, 4, weight[0, :64], bias)

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_device_that_is_not_current():
    other = torch.device("cuda", 1)
    rope.check_forward(64, torch.bfloat16, device=other)
    shuffle.check_all(2, 48, 33, torch.bfloat16, device=other)
    norm.check_all(2, 48, torch.bfloat16, device=other)
