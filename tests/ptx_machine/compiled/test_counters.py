"""Counters against compiled kernels whose counts are known by hand."""

import re

import pytest
import torch
import triton
import triton.language as tl

import ptx_machine
from benchmarks.counted.case import Case, count, first, spread, whole


@triton.jit
def copy(x, y, step, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i * step))


@triton.jit
def exponential(x, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.exp2(tl.load(x + i)))


@triton.jit
def row_sums(x, y, C: tl.constexpr):
    i = tl.arange(0, C)
    tl.store(y + tl.program_id(0), tl.sum(tl.load(x + tl.program_id(0) * C + i)))


@triton.jit
def add_products(a, b, c, steps, B: tl.constexpr):
    i, j = tl.arange(0, B), tl.arange(0, B)
    acc = tl.zeros([B, B], tl.float32)
    for s in range(0, steps):
        b_a = tl.load(a + s * B * B + i[:, None] * B + j[None, :])
        b_b = tl.load(b + s * B * B + i[:, None] * B + j[None, :])
        acc = tl.dot(b_a, b_b, acc)
    tl.store(c + i[:, None] * B + j[None, :], acc)


@triton.jit
def copy_by_tma(x, y):
    y.store([0, 0], x.load([0, 0]))


@pytest.fixture
def counted(gpu):
    """Counts of the next launch: `counted()` after it."""
    gpu.options.count = True
    return lambda: gpu.counts[-1]


def test_copies(counted):
    n, block = 4096, 1024
    x, y = torch.randn(8 * n), torch.zeros(n)
    copy[(n // block,)](x, y, 1, BLOCK=block, num_warps=4)
    traffic = counted().traffic()
    for what in ("load", "store"):
        assert {traffic[what], traffic[f"{what} asked"], traffic[f"{what} distinct"]} == {4 * n}
    # 4 warps, 8 floats for each thread: two 16-byte vectors in and two out for each warp.
    assert counted().pipes()["global"] == (n // block) * 4 * 4

    copy[(n // block,)](x, y, 8, BLOCK=block, num_warps=4)
    traffic = counted().traffic()
    assert traffic["load"] == 8 * traffic["load asked"] == 32 * n == traffic["load distinct"]
    assert traffic["store"] == traffic["store asked"] == 4 * n

    exponential[(n // block,)](x, y, BLOCK=block, num_warps=4)
    assert counted().pipes()["mufu"] == n // 32


def test_a_column_of_shared_memory(gpu, counted, monkeypatch):
    """PTX edited by hand: each lane writes and reads the first word of a row of 128 bytes."""
    x, y = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)

    def through_shared(name, text):
        store = next(line for line in text.splitlines() if "st.global" in line)
        value = re.search(r"\{ *(%r\d+) *\}", store)[1]
        more = (
            "{ .reg .b32 %mytid, %myaddress;\n mov.u32 %mytid, %tid.x;\n"
            f" shl.b32 %myaddress, %mytid, 7;\n st.shared.b32 [%myaddress], {value};\n"
            f" bar.sync 0;\n ld.shared.b32 {value}, [%myaddress];\n}}\n"
        )
        return text.replace(store, more + store)

    monkeypatch.setattr(gpu, "shared_at_least", 4096)
    with ptx_machine.edited(gpu, through_shared):
        copy[(1,)](x, y, 1, BLOCK=32, num_warps=1)
    assert torch.equal(x, y)
    assert counted().wavefronts() == (64, 2)


def test_products(gpu, counted):
    size, steps = 64, 3
    a, b = (torch.randn(steps, size, size).bfloat16() for _ in range(2))
    c = torch.zeros(size, size)
    add_products[(1,)](a, b, c, steps, B=size, num_warps=4)
    assert (c - (a.float() @ b.float()).sum(0)).abs().max() < 1e-2
    counts, flops = counted(), steps * 2 * size**3
    if gpu.capability == 80:  # m16n8k16
        assert counts.flops() == {"mma": flops, "wgmma": 0}
        assert counts.pipes()["tensor"] == flops // (2 * 16 * 8 * 16)
        assert counts.operand_bytes() == 0
    else:  # m64n64k16 by four warps, both operands in shared memory
        assert counts.flops() == {"mma": 0, "wgmma": flops}
        assert counts.pipes()["tensor"] == steps * 4 * size // 16
        assert counts.operand_bytes() == steps * 2 * 2 * size**2
    assert counts.wavefronts()[0] == counts.wavefronts()[1]  # Triton's layouts have no conflict


def test_sums_and_sampled_programs(gpu, counted):
    """Five shuffles in each of 4 warps; of their 4 sums, two more in each warp that reads them."""
    x, y = torch.randn(4, 1024), torch.zeros(4)
    row_sums[(4,)](x, y, C=1024, num_warps=4)
    whole = counted()
    assert whole.programs == 4 and whole.pipes()["shuffle"] in (4 * 22, 4 * 28)
    gpu.options.ctas = lambda name, grid: [0, 3]
    row_sums[(4,)](x, y, C=1024, num_warps=4)
    half = counted()
    assert half.programs == 2 and half.grid == (4, 1, 1)
    assert {name: 2 * n for name, n in half.pipes().items()} == whole.pipes()


def test_boxes():
    """TMA: rows of 64 bytes, two sectors each, those outside of the tensor left out."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    gpu = ptx_machine.install(90, ptx_machine.Options(count=True))
    x, y = torch.randn(5, 16), torch.zeros(5, 16)
    blocks = [TensorDescriptor.from_tensor(a, [8, 16]) for a in (x, y)]
    copy_by_tma[(1,)](*blocks)
    assert torch.equal(x, y)
    traffic = gpu.counts[-1].traffic()
    assert traffic["load"] == traffic["store"] == traffic["load asked"] == 5 * 64
    assert gpu.counts[-1].copies["load shared bytes"] == 8 * 64


def test_nothing_is_counted_unasked(gpu):
    x, y = torch.randn(64), torch.zeros(64)
    copy[(1,)](x, y, 1, BLOCK=64)
    assert not gpu.counts


# Of benchmarks.counted: what samples stand for, and how often machine code runs


def result_of(gpu, start, sample, **work):
    gpu.options.count = True
    case = Case(
        "op", "size", "shipped", start, unit="element", units=1000, samples={"": sample}, **work
    )
    return count(case, gpu, gpu.capability)


@pytest.mark.parametrize("sample", [spread(2), spread(3), first], ids=["two", "three", "one"])
def test_samples_stand_for_all(gpu, sample):
    x, y = torch.randn(7, 1024), torch.zeros(7)

    def start():
        row_sums[(7,)](x, y, C=1024, num_warps=4)

    (every,), (some,) = (result_of(gpu, start, s)["kernels"] for s in (whole, sample))
    assert some.pop("sampled") < every.pop("sampled") == 7
    del some["grid"], every["grid"]
    assert set(some) == set(every)
    assert some["limit"] == every["limit"]
    for name in ("instructions", "sectors_per_asked", "conflicts"):
        assert some[name] == pytest.approx(every[name]), name
    assert some["clocks"] == pytest.approx(every["clocks"], rel=0.02)  # sums share a sector


def test_turns_of_loops_in_machine_code(gpu):
    """Products are as many in SASS as in PTX, however ptxas unrolled the loop; no guess of ours."""
    size = 64
    a, b = (torch.randn(9, size, size).bfloat16() for _ in range(2))
    c = torch.zeros(size, size)
    totals = {}
    for steps in (3, 9):

        def start(steps=steps):
            add_products[(1,)](a, b, c, steps, B=size, num_warps=4)

        work = {"flops": steps * 2 * size**3}
        (kernel,) = result_of(gpu, start, whole, **work)["kernels"]
        assert kernel["flops_per_useful"] == 1
        assert kernel["sass"]["tensor"] == pytest.approx(kernel["ptx"]["tensor"])
        totals[steps] = kernel["instructions"], kernel["ptx_instructions"]
    grown = [nine / three for three, nine in zip(totals[3], totals[9], strict=True)]
    assert 1 < grown[0] < 3 and 1 < grown[1] < 3
