"""Triton's code for sm_90: wgmma from all kinds of operands, TMA, stmatrix; edits of its PTX."""

import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import ptx_machine
from hrvlm_kernels.triton_kernels.launch import triton_release
from ptx_machine import ExecutionError, UnknownInstructionError
from ptx_machine.proxies import CP_ASYNC_NOTE
from tests.ptx_machine.handmade import dump, registers_in, registers_out, run

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def gpu():
    """The machine of sm_90, with room for the maps that kernels make."""

    def room(size, alignment, stream):
        whole = torch.empty(size + alignment, dtype=torch.int8)
        return whole[-whole.data_ptr() % alignment :][:size]

    triton.set_allocator(room)
    return ptx_machine.install(90)


def clean(gpu, notes=()):
    """No finding, and no note but these."""
    assert not gpu.report, gpu.report
    assert set(gpu.report.notes) <= set(notes), gpu.report.notes


def quarters(rng, *shape, dtype=BF16):
    """Numbers of which sums of products are exact."""
    return (torch.randint(-16, 17, shape, generator=rng) / 4).to(dtype)


@triton.jit
def matmul(
    a, b, c, M, N, K, sam, sak, sbk, sbn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    for s in range(0, K, BK):
        left = (m < M)[:, None] & (s + k < K)[None, :]
        right = (s + k < K)[:, None] & (n < N)[None, :]
        x = tl.load(a + m[:, None] * sam + (s + k)[None, :] * sak, mask=left, other=0.0)
        y = tl.load(b + (s + k)[:, None] * sbk + n[None, :] * sbn, mask=right, other=0.0)
        acc = tl.dot(x, y, acc, input_precision="tf32")
    tl.store(c + m[:, None] * N + n[None, :], acc, mask=(m < M)[:, None] & (n < N)[None, :])


def run_matmul(rng, dtype, stages, shape=(100, 80, 208), warps=4, ta=False, tb=False):
    """Whether A B is exact."""
    m, n, k = shape
    a, b = quarters(rng, m, k, dtype=dtype), quarters(rng, k, n, dtype=dtype)
    a = a.T.contiguous().T if ta else a
    b = b.T.contiguous().T if tb else b
    c = torch.full((m, n), float("nan"))
    bm, bn = 16 * warps, 64
    matmul[(-(-m // bm), -(-n // bn))](
        a, b, c, m, n, k, *a.stride(), *b.stride(),
        BM=bm, BN=bn, BK=32 if dtype == F32 else 64, num_stages=stages, num_warps=warps,
    )  # fmt: skip
    return torch.equal(c.double(), a.double() @ b.double())


def is_slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "dtype, stages",
    [(BF16, 1), (BF16, 3), (F32, 2), is_slow(BF16, 4), is_slow(F16, 4), is_slow(F32, 4)],
    ids=str,
)
def test_matmul_by_pointers(gpu, rng, dtype, stages):
    assert run_matmul(rng, dtype, stages)
    clean(gpu, {CP_ASYNC_NOTE})
    assert (CP_ASYNC_NOTE in gpu.report.notes) == (stages > 1 and triton_release() < (3, 7))


@pytest.mark.parametrize("warps, ta, tb", [(8, True, False), is_slow(4, True, True)])
def test_matmul_of_transposed_matrices(gpu, rng, warps, ta, tb):
    assert run_matmul(rng, BF16, 3, (128, 64, 128), warps, ta, tb)
    clean(gpu, {CP_ASYNC_NOTE})


@pytest.mark.parametrize("seed", [0, is_slow(1)])
def test_matmul_with_warps_and_programs_in_random_order(gpu, rng, seed):
    gpu.options = ptx_machine.Options(shuffle_warps=True, shuffle_ctas=True, seed=seed)
    assert run_matmul(rng, BF16, 3)
    assert run_tma(rng, 3)
    clean(gpu, {CP_ASYNC_NOTE})


@triton.jit
def tma_matmul(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    i, j = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([i, k]), b.load([j, k]).T, acc)
    c.store([i, j], acc.to(c.dtype))


def run_tma(rng, stages, dtype=BF16, block=64, shape=(100, 72, 200)):
    """Whether A B^T is exact, of tensors that end inside their last boxes."""
    m, n, k = shape
    a, b = quarters(rng, m, k, dtype=dtype), quarters(rng, n, k, dtype=dtype)
    whole = torch.full((m + 8, n), float("nan"))
    c = whole[:m]
    maps = [TensorDescriptor(x, x.shape, x.stride(), [64, block]) for x in (a, b)]
    maps.append(TensorDescriptor(c, c.shape, c.stride(), [64, 64]))
    grid = (-(-m // 64), -(-n // 64))
    tma_matmul[grid](*maps, k, BM=64, BN=64, BK=block, num_stages=stages)
    assert whole[m:].isnan().all(), "rows past the end were written"
    return torch.equal(c.double(), a.double() @ b.double().T)


@pytest.mark.parametrize(
    "stages, dtype, block",
    [
        (3, BF16, 64),
        (1, BF16, 32),
        is_slow(2, F16, 128),
        is_slow(4, BF16, 16),
        is_slow(4, F16, 64),
        is_slow(3, F32, 32),
    ],
    ids=str,
)
def test_matmul_by_tma(gpu, rng, stages, dtype, block):
    assert run_tma(rng, stages, dtype, block)
    clean(gpu)


@triton.jit
def two_products(a, b, d, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + n[:, None] * K + k[None, :])
    z = tl.load(d + n[:, None] * K + k[None, :])
    scores = tl.dot(x, y.T)
    tl.store(c + m[:, None] * K + k[None, :], tl.dot(scores.to(z.dtype), z))


def test_the_second_product_takes_a_from_registers(gpu, rng):
    a, b, d = (quarters(rng, rows, 32) for rows in (128, 64, 64))
    c = torch.full((128, 32), float("nan"))
    seen = []
    with ptx_machine.edited(gpu, lambda _, ptx: seen.append(ptx) or ptx):
        two_products[(1,)](a, b, d, c, M=128, N=64, K=32, num_warps=8)
    assert re.search(r"wgmma\.mma_async[^;]*\}, *\{", seen[0]), "A in registers"
    scores = (a.double() @ b.double().T).to(BF16).double()
    assert (c - scores @ d.double()).abs().max() < 1e-3
    clean(gpu)


@triton.jit
def boxes(x, out, row, column, M: tl.constexpr, N: tl.constexpr, ADD: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    a = tl.load(x + m[:, None] * N + n[None, :])
    if ADD:
        out.atomic_add([row, column], a)
    else:
        out.store([row, column], a)


@pytest.mark.parametrize(
    "dtype, add, shape",
    [(BF16, False, (16, 64)), (F16, True, (32, 32)), is_slow(F32, True, (64, 64))],
)
def test_stores_and_reductions_by_tma(gpu, rng, dtype, add, shape):
    x = quarters(rng, *shape, dtype=dtype)
    out = quarters(rng, shape[0] + 8, shape[1] + 32, dtype=dtype)
    want, row, column = out.clone(), -3, 24
    kept = x[3:, : out.shape[1] - column]
    there = want[: shape[0] - 3, column : column + shape[1]]
    there.copy_(there + kept if add else kept)
    maps = TensorDescriptor(out, out.shape, out.stride(), list(shape))
    boxes[(1,)](x, maps, row, column, M=shape[0], N=shape[1], ADD=add)
    assert torch.equal(out, want)
    clean(gpu)


@triton.jit
def double(x, out, M, N, BM: tl.constexpr, BN: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [M, N], [N, 1], [BM, BN])
    target = tl.make_tensor_descriptor(out, [M, N], [N, 1], [BM, BN])
    i = tl.program_id(0) * BM
    for j in range(0, N, BN):
        target.store([i, j], source.load([i, j]) * 2)


def test_maps_that_the_kernel_makes(gpu, rng):
    x = torch.randn(50, 64, generator=rng)
    out = torch.full_like(x, float("nan"))
    double[(2,)](x, out, 50, 64, BM=32, BN=32)
    assert torch.equal(out, 2 * x)
    clean(gpu)
    drop = r"(@%p\d+ )?fence\.proxy\.tensormap::generic\.acquire[^;]*;"
    with ptx_machine.edited(gpu, lambda _, ptx: re.sub(drop, "", ptx)):
        double[(2,)](x, out, 50, 64, BM=32, BN=32)
    assert set(gpu.report.kinds()) == {"no tensormap fence"}


# Each synchronising instruction of the two matmuls left out, and waits for a group less.

DROPPED = (
    r"wgmma\.(wait_group|commit_group|fence)[^;]*;",
    r"fence\.proxy\.async[^;]*;",
    r"cp\.async\.(commit_group|wait_group)[^;]*;",
    r"cp\.async\.bulk\.(commit_group|wait_group)[^;]*;",
    r"mbarrier\.try_wait[^;]*;\s*@!complete bra[^;]*;",
    r"@%p\d+ mbarrier\.arrive[^;]*;",
)
LEAVES = r"wait_group(?:\.sync\.aligned|\.read)?\s+(\d+)(?=;)"


def edits(ptx):
    """(instruction, line, PTX) of every edit."""

    def at(found, new=""):
        line = ptx.count("\n", 0, found.start()) + 1
        return found[0], line, ptx[: found.start()] + new + ptx[found.end() :]

    for pattern in DROPPED:
        yield from (at(found) for found in re.finditer(pattern, ptx))
    for found in re.finditer(LEAVES, ptx):
        yield at(found, f"{found[0].removesuffix(found[1])}{int(found[1]) + 1}")
    # Of barriers, any single one may be one that another makes redundant.
    yield "all bar.sync", 0, re.sub(r"bar\.sync\s+0;", "", ptx)


@pytest.mark.parametrize(
    "launch, harmless",
    [
        (run_tma, []),
        # The first copies join the next group, and the newest group of the last wait is empty.
        # Since Triton 3.7 a fence follows copies by cp.async, which CP_ASYNC_NOTE does without.
        is_slow(
            run_matmul,
            ["fence.proxy.async.shared::cta;"] * (triton_release() >= (3, 7))
            + ["cp.async.commit_group;", "wait_group \t0"],
        ),
    ],
    ids=["tma", "pointers"],
)
def test_every_edit_is_noticed(gpu, rng, launch, harmless):
    def arguments():
        return (rng, 3) if launch is run_tma else (rng, BF16, 3)

    seen, missed = [], []
    with ptx_machine.edited(gpu, lambda _, ptx: seen.append(ptx) or ptx):
        assert launch(*arguments())
    every = list(edits(seen[0]))
    assert len(every) >= 9
    for what, line, changed in every:
        gpu.report.clear()
        with ptx_machine.edited(gpu, lambda _, ptx, changed=changed: changed):
            try:
                noticed = not launch(*arguments()) or bool(gpu.report)
            except ExecutionError:
                noticed = True
        if not noticed:
            missed.append((what, line))
    assert [what for what, _ in missed] == harmless, missed


# The small collectives


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix(count, trans):
    """Lane l gives the address of row l of the matrices, and holds two elements of each."""
    rng = np.random.default_rng(count)
    matrices = rng.integers(0, 1 << 16, (2, count, 8, 8)).astype(np.uint16)  # of two warps
    rows = rng.permutation(64)[: 16 * count].reshape(2, count, 8)  # where they go, of 16 bytes
    registers, smem = np.zeros((64, 5), np.uint32), np.zeros(1024, np.uint8)
    for warp in range(2):
        for lane in range(32):
            for m in range(count):
                at = matrices[warp, m].T if trans else matrices[warp, m]
                low, high = at[lane // 4, 2 * (lane % 4)], at[lane // 4, 2 * (lane % 4) + 1]
                registers[32 * warp + lane, m] = int(low) | int(high) << 16
            if lane < 8 * count:
                registers[32 * warp + lane, 4] = 16 * rows[warp, lane // 8, lane % 8]
    items = ", ".join(f"%r{m}" for m in range(count))
    body = f"""
        {registers_in([f"%r{k}" for k in range(5)], 0)}
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r4], {{{items}}};
        bar.sync 0;
        {dump(1024, 1, threads=64)}"""
    report = run(body, [registers, smem], threads=64)
    assert set(report.kinds()) <= {"uninitialised"}  # rows that no matrix has
    lines = smem.reshape(64, 16).view(np.uint16)
    assert np.array_equal(lines[rows], matrices)
    report = run(body.replace("bar.sync 0;", ""), [registers, smem], threads=64)
    assert "race" in report.kinds()


def test_elect():
    out = np.zeros((64, 2), np.uint32)
    body = f"""
        mov.u32 %r0, %tid.x;
        elect.sync %r1|%p0, -1;
        selp.b32 %r2, 1, 0, %p0;
        {registers_out(["%r1", "%r2"], 0)}"""
    assert not run(body, [out], threads=64)
    assert (out[:, 0] == 0).all() and np.flatnonzero(out[:, 1]).tolist() == [0, 32]
    with pytest.raises(ExecutionError, match="31 threads of a warp are here"):
        skip = "setp.eq.u32 %p1, %r0, 3;\n@%p1 bra $end;\n"
        run(body.replace("elect", f"{skip}elect") + "\n$end:", [out], threads=64)


@pytest.mark.parametrize("count, good", [(24, True), (240, True), (20, False), (264, False)])
def test_setmaxnreg_moves_nothing_that_can_be_seen(count, good):
    body = f"setmaxnreg.inc.sync.aligned.u32 {count};"
    if good:
        assert not run(body)
    else:
        with pytest.raises(UnknownInstructionError, match="setmaxnreg"):
            run(body)
