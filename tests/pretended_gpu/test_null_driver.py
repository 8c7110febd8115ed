"""The null CUDA driver: Triton's real launchers take our arguments, and TMA our descriptors."""

import pytest
import torch

from pretended_gpu import null_driver

DRIVER = null_driver.install()

from hrvlm_kernels import PackedGrids, swiglu, varlen_attention


def test_launches_and_tensor_maps():
    """An image above 256 tokens: a pass that rotates k, and a forward with descriptors of k, v."""
    packed = PackedGrids.from_grids([(18, 16)], num_prefix_tokens=5)
    q, k, v = torch.randn(packed.total_tokens, 3, 1, 64).bfloat16().unbind(1)
    launches, maps = DRIVER.launches(), DRIVER.tensor_maps()
    rope = packed.coords, torch.rand(16)
    varlen_attention(q, k, v, packed, rope=rope, backend="triton")
    assert (DRIVER.launches() - launches, DRIVER.tensor_maps() - maps) == (2, 2)


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
