"""Small Triton kernels, compiled and run on the machine, against torch."""

import pytest
import torch
import triton
import triton.language as tl

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n)
    b = tl.load(y + i, mask=i < n)
    tl.store(out + i, a + b, mask=i < n)


@triton.jit
def copy_or_seven(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n, other=7.0))


@triton.jit
def row_stats(x, total, peak, where, n, stride, R: tl.constexpr, C: tl.constexpr):
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.arange(0, C)
    mask = (r < n)[:, None] & (c >= 0)[None, :]
    a = tl.load(x + r[:, None] * stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(total + r, tl.sum(a, 1), mask=r < n)
    tl.store(peak + r, tl.max(a, 1), mask=r < n)
    tl.store(where + r, tl.argmax(a, 1), mask=r < n)


@triton.jit
def column_sums(x, out, n, R: tl.constexpr, C: tl.constexpr):
    r = tl.arange(0, R)
    c = tl.arange(0, C)
    acc = tl.zeros([R, C], tl.float32)
    for i in range(0, n, R):
        acc += tl.load(x + (i + r)[:, None] * C + c[None, :], mask=(i + r < n)[:, None], other=0.0)
    tl.store(out + c, tl.sum(acc, 0))


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, P: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    for s in range(0, K, BK):
        m_x = (m < M)[:, None] & (s + k < K)[None, :]
        m_y = (s + k < K)[:, None] & (n < N)[None, :]
        x = tl.load(a + m[:, None] * K + (s + k)[None, :], mask=m_x, other=0.0)
        y = tl.load(b + (s + k)[:, None] * N + n[None, :], mask=m_y, other=0.0)
        acc = tl.dot(x, y, acc, input_precision=P)
    tl.store(c + m[:, None] * N + n[None, :], acc, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def functions(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n, other=1.0)
    tl.store(out + i, tl.exp(a), mask=i < n)
    tl.store(out + n + i, tl.log2(a), mask=i < n)
    tl.store(out + 2 * n + i, tl.sigmoid(a), mask=i < n)
    tl.store(out + 3 * n + i, tl.sqrt_rn(a), mask=i < n)
    tl.store(out + 4 * n + i, tl.rsqrt(a), mask=i < n)
    tl.store(out + 5 * n + i, tl.sin(a), mask=i < n)


@triton.jit
def integers(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n, other=0)
    b = tl.load(y + i, mask=i < n, other=1)
    tl.store(out + i, a // b, mask=i < n)
    tl.store(out + n + i, a % b, mask=i < n)
    tl.store(out + 2 * n + i, a >> (b & 15), mask=i < n)
    tl.store(out + 3 * n + i, tl.umulhi(a.to(tl.uint32), b.to(tl.uint32)).to(tl.int32), mask=i < n)


@triton.jit
def casts(x, brain, half, whole, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(brain + i, a.to(tl.bfloat16), mask=i < n)
    tl.store(half + i, a.to(tl.float16), mask=i < n)
    tl.store(whole + i, a.to(tl.int32), mask=i < n)


@triton.jit
def histogram(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n, other=0)
    tl.atomic_add(out + a, 1.0, mask=i < n)


@triton.jit
def transpose(x, out, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    a = tl.load(x + r[:, None] * C + c[None, :])
    tl.store(out + c[:, None] * R + r[None, :], a.T)


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add(gpu, rng, dtype):
    x, y = torch.randn(2, 1000, generator=rng).to(dtype)
    out = torch.full_like(x, float("nan"))
    add[(8,)](x, y, out, 1000, BLOCK=128)
    assert torch.equal(out, x + y)


def test_masked_copy(gpu, rng):
    x, out = torch.randn(1000, generator=rng), poisoned(1024)
    copy_or_seven[(4,)](x, out, 1000, BLOCK=256)
    assert torch.equal(out, torch.cat((x, torch.full((24,), 7.0))))


@pytest.mark.parametrize("rows, warps", [(4, 4), (1, 8), (2, 1)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_reductions_along_rows(gpu, rng, dtype, rows, warps):
    x = torch.randn(37, 512, generator=rng).to(dtype)
    total, peak, where = poisoned(37), poisoned(37), torch.full((37,), -1, dtype=torch.int32)
    row_stats[(triton.cdiv(37, rows),)](
        x, total, peak, where, 37, 512, R=rows, C=512, num_warps=warps
    )
    exact = x.double()
    assert ((total - exact.sum(1)).abs() <= 1e-6 * exact.abs().sum(1)).all()
    assert torch.equal(peak, x.float().max(1).values)
    assert torch.equal(where.long(), x.float().argmax(1))


def test_reductions_along_columns(gpu, rng):
    x, out = torch.randn(50, 64, generator=rng), poisoned(64)
    column_sums[(1,)](x, out, 50, R=16, C=64)
    assert ((out - x.double().sum(0)).abs() <= 1e-6 * x.double().abs().sum(0)).all()


# Relative to the norm of the product: float32 sums, or operands cut to 10 bits.
LIMITS = {"ieee": 1e-6, "tf32x3": 1e-6, "tf32": 1e-3}
PLAIN = (torch.float32, "ieee")  # on no tensor core
PRECISIONS = [
    (torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), PLAIN,
]  # fmt: skip


@pytest.mark.parametrize("gpu", [80], indirect=True, ids=["sm_80"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype, precision", PRECISIONS, ids=str)
def test_matmul(gpu, rng, dtype, precision, stages):
    """Tiles that reach past the end, and a loop that a pipeline of `stages` overlaps."""
    check_matmul(gpu, rng, dtype, precision, stages)
    (program,) = gpu.programs.values()
    ops = {i.op for i in program.kernel.instructions}
    assert any(op.startswith("mma.sync") for op in ops) == ((dtype, precision) != PLAIN)
    assert any(op.startswith("cp.async") for op in ops) == (stages > 1)


@pytest.mark.parametrize("gpu", [90], indirect=True, ids=["sm_90"])
@pytest.mark.parametrize("stages", [1, 3])
def test_matmul_without_tensor_cores(gpu, rng, stages):
    """float32 on sm_90; test_sm90_kernels.py has its tensor cores."""
    check_matmul(gpu, rng, torch.float32, "ieee", stages)


def check_matmul(gpu, rng, dtype, precision, stages):
    m, n, k = 80, 48, 144
    a = torch.randn(m, k, generator=rng).to(dtype)
    b = torch.randn(k, n, generator=rng).to(dtype)
    c = poisoned(m, n)
    depth = 16 if (dtype, precision) == PLAIN else 32
    matmul[(2, 2)](
        a, b, c, m, n, k, BM=64, BN=32, BK=depth, P=precision, num_warps=4, num_stages=stages
    )
    exact = a.double() @ b.double()
    error = ((c - exact).norm() / exact.norm()).item()
    assert error <= LIMITS[precision]
    if precision == "tf32":
        assert error >= 1e-5  # better would not be tf32


def test_functions(gpu, rng):
    x = torch.rand(200, generator=rng) * 20 + 1e-3
    out = poisoned(6, 200)
    functions[(1,)](x, out, 200, BLOCK=256)
    exact = x.double()
    want = [exact.exp(), exact.log2(), exact.sigmoid(), exact.sqrt(), exact.rsqrt(), exact.sin()]
    error = (out - torch.stack(want)).abs() / torch.stack(want).abs().clamp(min=1e-2)
    assert error.max() <= 2e-6


def test_integers(gpu, rng):
    a = torch.randint(-(2**31), 2**31, (200,), generator=rng, dtype=torch.int64).to(torch.int32)
    b = torch.randint(-1000, 1000, (200,), generator=rng).to(torch.int32)
    b[b == 0] = 3
    out = torch.zeros(4, 200, dtype=torch.int32)
    integers[(1,)](a, b, out, 200, BLOCK=256)
    quotient = torch.div(a, b, rounding_mode="trunc")
    product = [int(x) % 2**32 * (int(y) % 2**32) >> 32 for x, y in zip(a, b, strict=True)]
    want = [quotient, a - quotient * b, a >> (b & 15)]
    assert torch.equal(out[:3], torch.stack(want))
    assert [int(v) % 2**32 for v in out[3]] == product


def test_casts(gpu, rng):
    ties = torch.tensor([1.0 + 2**-8, 1 + 3 * 2**-8, 65504.0, 1e-7])
    x = torch.cat((torch.randn(196, generator=rng) * 100, ties))
    brain, half = poisoned(200, dtype=torch.bfloat16), poisoned(200, dtype=torch.float16)
    whole = torch.zeros(200, dtype=torch.int32)
    casts[(1,)](x, brain, half, whole, 200, BLOCK=256)
    assert torch.equal(brain, x.bfloat16()) and torch.equal(half, x.half())
    assert torch.equal(whole, x.to(torch.int32))


def test_atomics(gpu, rng):
    x, out = torch.randint(0, 10, (500,), generator=rng, dtype=torch.int32), torch.zeros(10)
    histogram[(4,)](x, out, 500, BLOCK=128)
    assert torch.equal(out, torch.bincount(x, minlength=10).float())


@triton.jit
def in_turns(x, out, lock, N: tl.constexpr):
    """Programs add to `out` one after the other, in any order."""
    i = tl.arange(0, N)
    mine = tl.histogram(tl.load(x + tl.program_id(0) * N + i), 16)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    old = tl.atomic_add(out + tl.arange(0, 16), mine)
    tl.store(out + 16 * (tl.program_id(0) + 1) + tl.arange(0, 16), old)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


def test_a_lock_and_a_histogram(gpu, rng):
    """Programs spin until another, further on, lets them: all of them run."""
    gpu.options.max_steps = 5000
    x = torch.randint(0, 16, (4, 128), generator=rng, dtype=torch.int32)
    out, lock = torch.zeros(5, 16, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    in_turns[(4,)](x, out, lock, N=128)
    assert torch.equal(out[0], torch.bincount(x.ravel(), minlength=16).int())
    assert sorted(out[1:].sum(1).tolist()) == [0, 128, 256, 384]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_transpose(gpu, rng, dtype):
    x = torch.randn(64, 32, generator=rng).to(dtype)
    out = torch.full((32, 64), float("nan"), dtype=dtype)
    transpose[(1,)](x, out, R=64, C=32)
    assert torch.equal(out, x.T)
