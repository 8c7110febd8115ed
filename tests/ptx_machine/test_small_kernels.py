"""Small Triton kernels, compiled and run on the machine, against torch."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n)
    b = tl.load(y + i, mask=i < n)
    tl.store(out + i, a + b, mask=i < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_add(gpu, rng, dtype):
    x, y = torch.randn(2, 1000, generator=rng).to(dtype)
    out = torch.full_like(x, float("nan"))
    add[(8,)](x, y, out, 1000, BLOCK=128)
    assert torch.equal(out, x + y)
