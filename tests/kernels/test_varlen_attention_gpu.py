"""varlen_attention on a GPU: bfloat16, every tile of the tables, races, waits, other libraries."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from hrvlm_kernels import PackedGrids
from hrvlm_kernels.backends import flash_attn_obstacle
from hrvlm_kernels.flash_attn_interface import flash_attn_varlen_func
from hrvlm_kernels.ops.varlen_attention import varlen_attention
from hrvlm_kernels.triton_kernels import varlen_attention as forward
from hrvlm_kernels.triton_kernels import varlen_attention_backward as backward
from hrvlm_kernels.triton_kernels.tilings import Tiling
from tests.kernels.attention_cases import check, check_kernel, kernel_results, make_case
from tests.kernels.helpers import gradients

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (32, 64, 80, 96, 128)
# Images of 224, 448 and 768 px with 5 prefix tokens, windows, and what is around a tile.
LENGTHS = (201, 789, 2309, 64, 0, 1, 63, 65, 127, 128, 129, 577)
REPEATS = 20
ORDER_TIMEOUT_S = 120


def gpu_case(lengths=LENGTHS, **options):
    options = {"heads": 3, "dtype": torch.bfloat16, "device": DEVICE} | options
    return make_case(lengths, **options)


def same(results, expected):
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_forward_and_backward(head_dim, dtype):
    check_kernel(gpu_case(head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
def test_rope(head_dim, dtype):
    check_kernel(gpu_case(head_dim=head_dim, dtype=dtype, rope=True))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_shared_heads_of_k_and_v(head_dim):
    check_kernel(gpu_case(heads=6, kv_heads=2, head_dim=head_dim))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_smaller_tiles(head_dim, monkeypatch):
    """The entries of the tables for chips with less memory, and for tensors TMA can't load."""
    select_forward, select_backward = forward.select_tilings, backward.select_tilings

    def smallest(*args):
        chosen = select_backward(*args)
        return backward.BackwardTilings(chosen.dq[-1:], chosen.dkdv[-1:])

    monkeypatch.setattr(forward, "select_tilings", lambda *args: select_forward(*args)[-1:])
    monkeypatch.setattr(backward, "select_tilings", smallest)
    check_kernel(gpu_case(head_dim=head_dim))


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_unaligned_tensors(head_dim, rope):
    case = gpu_case(head_dim=head_dim, rope=rope)
    moved = []
    for a in (*case.inputs, *(case.rope or ())):
        room = torch.empty(a.numel() + 1, dtype=a.dtype, device=DEVICE)[1:]
        moved.append(room.view(a.shape).copy_(a))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* does not fit")
        out = varlen_attention(
            *moved[:3], case.packed, rope=tuple(moved[3:]) or None, backend="triton"
        )
    check(case, [out], ["out"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_nothing_leaks_from_a_neighbour(head_dim, bad):
    case = gpu_case((201, 577, 130), head_dim=head_dim)
    clean = kernel_results(case)
    for start, end in ((0, 201), (201, 778), (778, 908)):
        tensors = {}
        for name in "qkvg":
            tensors[name] = torch.full_like(getattr(case, name), bad)
            tensors[name][start:end] = getattr(case, name)[start:end]
        g = tensors.pop("g")
        results = gradients(
            lambda q, k, v: varlen_attention(q, k, v, case.packed), tensors.values(), g
        )
        assert same([a[start:end] for a in results], [a[start:end] for a in clean])


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_repeats_bit_for_bit(head_dim, rope):
    case = gpu_case(heads=8, head_dim=head_dim, rope=rope)
    expected = kernel_results(case)
    for _ in range(REPEATS):
        assert same(kernel_results(case), expected)


def test_one_kernel_forward_and_two_backward(monkeypatch):
    monkeypatch.undo()  # filling what is empty with NaN launches kernels too
    case = gpu_case(head_dim=64)
    kernel_results(case)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        kernel_results(case)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    assert names == [f"varlen_attention_{part}" for part in ("forward", "dq", "dkdv")]


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_short_images_with_rope(head_dim):
    """Up to 256 tokens k is rotated in the kernel, or before it: the same by the rules."""
    case = gpu_case((201, 256, 0, 1, 64, 65), heads=8, head_dim=head_dim, rope=True)
    check_kernel(case)
    mixed = gpu_case((201, 577, 256, 257), heads=8, head_dim=head_dim, rope=True)
    together = check_kernel(mixed)[0]
    parts = (mixed.packed.split(a) for a in (*mixed.inputs, mixed.rope[0], together))
    for q, k, v, coords, out in zip(*parts, strict=True):
        packed = PackedGrids.from_lengths([q.shape[0]], device=DEVICE)
        rope = coords, mixed.rope[1]
        assert torch.equal(varlen_attention(q, k, v, packed, rope=rope), out)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("order", ["plain", "ahead"])
def test_the_orders_of_the_tables(order, head_dim, rope):
    skip_unless_hopper()
    check_order(order, head_dim, rope)


def test_the_gluon_candidate():
    """In a process of its own: one that hangs or breaks the device takes no other test along."""
    skip_unless_hopper()
    calls = [f"check_gluon({head_dim})" for head_dim in (64, 128)]
    code = "\n".join(["from tests.kernels.test_varlen_attention_gpu import check_gluon", *calls])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=ORDER_TIMEOUT_S,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def skip_unless_hopper():
    if torch.version.hip or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the orders differ on sm_90 only")


def check_order(order, head_dim, rope):
    tiling = Tiling(128, 64, 8, 2, order)
    case = gpu_case(head_dim=head_dim, rope=rope)
    out = torch.full_like(case.q, float("nan"))
    lse = torch.full(case.q.shape[:2][::-1], float("nan"), device=DEVICE)
    arguments = case.problem, out, lse, [tiling]
    for short_tilings in ((), None):  # alone, and beside the kernel for short images
        out.fill_(float("nan"))
        forward.forward(*arguments, short_tilings)
        check(case, [out], ["out"])
        assert lse.isfinite().all()
    first = out.clone()
    for _ in range(REPEATS):
        forward.forward(*arguments, None)
        assert torch.equal(out, first)


def check_gluon(head_dim):
    from benchmarks.candidates.varlen_attention_gluon import gluon_attention

    case = gpu_case(head_dim=head_dim)
    for step in (64, 128):
        attend = gluon_attention(case.packed, step)
        first = attend(*case.inputs)
        check(case, [first], ["out"])
        assert all(torch.equal(attend(*case.inputs), first) for _ in range(REPEATS))


@pytest.mark.parametrize("rope", [False, True])
def test_the_host_never_waits_for_the_device(rope):
    case = gpu_case(head_dim=64, rope=rope)
    kernel_results(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel_results(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph():
    case = gpu_case(head_dim=64, rope=True)
    inputs = [a.clone() for a in case.inputs]

    def run():
        return varlen_attention(*inputs, case.packed, rope=case.rope, backend="triton")

    with torch.no_grad():
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        for a in inputs:
            a.mul_(0.5)
        graph.replay()
        assert torch.equal(out, run())


@pytest.mark.parametrize("rope", [False, True])
def test_torch_compile(rope):
    case = gpu_case(head_dim=64, rope=rope)

    def run(q, k, v):
        return varlen_attention(q, k, v, case.packed, rope=case.rope, backend="triton")

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    assert same(gradients(compiled, case.inputs, case.g), gradients(run, case.inputs, case.g))


def test_autocast():
    case = gpu_case(head_dim=64, dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = varlen_attention(*case.inputs, case.packed)
    expected = varlen_attention(*(a.bfloat16() for a in case.inputs), case.packed)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", ["flash_attn", "sdpa", "eager"])
def test_other_backends(backend):
    obstacle = flash_attn_obstacle(torch.device(DEVICE, 0), torch.bfloat16)
    if backend == "flash_attn" and obstacle:
        pytest.skip(obstacle)
    case = gpu_case(head_dim=64)
    check(case, kernel_results(case, backend=backend))


def test_flash_attn_interface():
    case = gpu_case(head_dim=64)
    ends, longest = case.packed.cu_seqlens, case.packed.max_seqlen
    out = flash_attn_varlen_func(*case.inputs, ends, ends, longest, longest)
    assert torch.equal(out, varlen_attention(*case.inputs, case.packed, backend="triton"))


def test_offsets_beyond_int32():
    """Rows 2^26 elements apart: 40 of them are beyond 2^31, in 5.4 GB."""
    case = gpu_case((41,), heads=1, head_dim=64)
    room = torch.zeros(40 * 2**26 + 64, dtype=torch.bfloat16, device=DEVICE)
    expected = kernel_results(case)
    for i in range(3):
        inputs = [a.clone() for a in case.inputs]
        far = torch.as_strided(room, (41, 1, 64), (2**26, 64, 1))
        inputs[i] = far.copy_(inputs[i])
        out = varlen_attention(*inputs, case.packed, backend="triton")
        assert torch.equal(out, expected[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_device_that_is_not_current():
    check_kernel(gpu_case(head_dim=64, device="cuda:1"))
