"""The null CUDA driver: Triton's real launchers take our arguments, and TMA our descriptors."""

from contextlib import nullcontext

import pytest
import torch
from triton import knobs

from pretended_gpu import host_time, null_driver

DRIVER = null_driver.install()

from hrvlm_kernels import PackedGrids, swiglu, varlen_attention
from hrvlm_kernels.triton_kernels import swiglu as swiglu_kernels

OPS = host_time.ops()


def test_launches_and_tensor_maps():
    """RoPE's table; a pass that rotates k, as of each image above 256 tokens; and the forward.

    The forward has descriptors of k and v.
    """
    packed = PackedGrids.from_grids([(18, 16)], num_prefix_tokens=5)
    q, k, v = torch.randn(packed.total_tokens, 3, 1, 64).bfloat16().unbind(1)
    launches, maps = DRIVER.launches(), DRIVER.tensor_maps()
    rope = packed.coords, torch.rand(16)
    varlen_attention(q, k, v, packed, rope=rope, backend="triton")
    assert (DRIVER.launches() - launches, DRIVER.tensor_maps() - maps) == (3, 2)


def test_a_tail_of_columns_has_tensor_maps_of_its_own():
    packed = PackedGrids.from_lengths([300])
    q, k, v = torch.randn(300, 3, 1, 72).bfloat16().unbind(1)
    launches, maps = DRIVER.launches(), DRIVER.tensor_maps()
    varlen_attention(q, k, v, packed, backend="triton")
    assert (DRIVER.launches() - launches, DRIVER.tensor_maps() - maps) == (1, 4)


def test_nothing_is_computed():
    gate = torch.randn(8, 64)
    launches = DRIVER.launches()
    swiglu(gate, gate, backend="triton")
    assert DRIVER.launches() == launches + 1


def test_a_bad_tensor_map_is_refused():
    """Rows of 8 bytes in the box."""
    x = torch.randn(64, 64).bfloat16()
    arguments = (x.data_ptr(), 0, 2, 10, [64, 4], [64, 64], [64, 1], 0)
    names = "fill_tma_descriptor_tiled", "fill_tma_descriptor"  # since Triton 3.7, and before
    fill = next(getattr(DRIVER.utils, name) for name in names if hasattr(DRIVER.utils, name))
    with pytest.raises(RuntimeError, match="refused by the null driver"):
        fill(*arguments)


def test_a_bound_kernel_is_launched_as_triton_would():
    """The same variants of the kernel, whatever the types, strides and addresses."""
    kernel = swiglu_kernels.swiglu_forward
    bound = kernel.run
    bound.known.clear()
    rows = torch.randn(9, 130).bfloat16()
    cases = [
        (rows[:8, :64], rows[1:9, 64:128]),  # rows of 130: no multiple of 16, nor aligned
        (rows[:8, :128], rows[:8, :128]),
        (rows.float()[:8, :128], rows.float()[:8, :128]),
        (torch.randn(8, 128).bfloat16(),) * 2,
        (torch.randn(128, 8).bfloat16().T,) * 2,
    ]
    used = []
    compiled_for = kernel.device_caches[DRIVER.get_current_device()][0]
    for way in (host_time.by_triton, nullcontext):
        compiled_for.clear()
        launches = DRIVER.launches()
        with way():
            for gate, up in cases * 2:
                swiglu(gate, up, backend="triton")
        assert DRIVER.launches() == launches + 2 * len(cases)
        used.append(set(compiled_for))
    assert used[0] == used[1]
    assert len(bound.known) == 4  # an unaligned pointer always goes Triton's way


def test_hooks_of_a_profiler_are_called():
    seen = []
    gate = torch.randn(8, 128).bfloat16()
    swiglu(gate, gate, backend="triton")
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        swiglu(gate, gate, backend="triton")
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert [launch.get()["name"] for launch in seen] == ["swiglu_forward"]


def test_a_launch_costs_the_host_a_quarter():
    """Of Triton's way, over all ops; `python -m pretended_gpu.host_time` has the figures."""
    with torch.no_grad():
        times = {name: host_time.measure(run, rounds=9, calls=20) for name, run in OPS.items()}
    assert max(t.ratio for t in times.values()) < 0.5, times
    assert sum(t.now for t in times.values()) < 0.25 * sum(t.before for t in times.values()), times
