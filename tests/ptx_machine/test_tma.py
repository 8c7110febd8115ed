"""TMA and mbarriers: boxes of tensors by loops over their elements, maps, phases."""

import itertools

import numpy as np
import pytest

from ptx_machine import ExecutionError, MemcheckError
from ptx_machine.clocks import Clocks
from ptx_machine.mbarrier import MbarrierError, Mbarriers
from ptx_machine.shared_memory import SharedMemory
from ptx_machine.tensor_map import TensorMap, replace_field
from ptx_machine.wgmma_layout import MatrixDescriptor, operand_chunks
from tests.ptx_machine import cute
from tests.ptx_machine.handmade import (
    Global,
    dump,
    edit,
    kinds,
    run,
)

MODES = {0: 0, 32: 1, 64: 2, 128: 3}  # of a tensor map's swizzle


def copy(rank, corner, box_bytes, store="cp.async.bulk.tensor", mod=""):
    """PTX: load the box at `corner` of arg_0 to 1024, and store it to arg_1 at the same place."""
    at = ", ".join(f"%r{20 + k}" for k in range(rank))
    moves = "\n".join(f"mov.s32 %r{20 + k}, {c};" for k, c in enumerate(reversed(corner)))
    return f"""
        mov.b64 %rd0, arg_0;
        cvta.param.u64 %rd0, %rd0;
        mov.b64 %rd1, arg_1;
        cvta.param.u64 %rd1, %rd1;
        mov.u32 %r0, %tid.x;
        setp.eq.u32 %p0, %r0, 0;
        mov.u32 %r1, 1024;
        {moves}
        @%p0 mbarrier.init.shared::cta.b64 [0], 1;
        bar.sync 0;
        @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [0], {box_bytes};
        @%p0 cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes
            [%r1], [%rd0, {{{at}}}], [0];
        mbarrier.try_wait.parity.shared::cta.b64 %p1, [0], 0;
        @%p0 {store}.{rank}d.global.shared::cta{mod}.bulk_group [%rd1, {{{at}}}], [%r1];
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;"""


def places(array, corner, box):
    """Index in the array, or None outside, of each element of a box, innermost fastest."""
    for i in itertools.product(*map(range, box)):
        at = tuple(c + j for c, j in zip(corner, i, strict=True))
        inside = all(0 <= a < n for a, n in zip(at, array.shape, strict=True))
        yield at if inside else None


@pytest.mark.parametrize("width", (0, 32, 64, 128))
@pytest.mark.parametrize("rank", (1, 2, 3, 4, 5))
def test_boxes_are_loaded_and_stored_element_by_element(rank, width):
    box = ((2, 2, 3, 5)[5 - rank :] if rank > 1 else ()) + ((width or 48) // 2,)
    shape = ((3, 4, 5, 7)[5 - rank :] if rank > 1 else ()) + (72,)
    source = np.random.default_rng(0).integers(1, 1 << 16, shape).astype(np.uint16)
    count = int(np.prod(box))
    for corner in ((-1,) * (rank - 1) + (-3,), tuple(n - 1 for n in shape)):
        target, smem = np.zeros_like(source), np.zeros(8192, np.uint8)
        memory = Global(source, target, smem)
        maps = [memory.map(a, box, mode=MODES[width]) for a in (source, target)]
        body = copy(rank, corner, 2 * count) + dump(2 * count, 2, at=1024)
        report = run(body, [*maps, smem], memory=memory, shared=16384)
        assert not report, report
        want, landed = np.zeros_like(source), np.zeros(count, np.uint16)
        for k, at in enumerate(places(source, corner, box)):
            if at is not None:
                want[at] = source[at]
                where = cute.swizzle(width, np.array(1024 + 2 * k)) - 1024
                landed[int(where) // 2] = source[at]
        assert np.array_equal(target, want)
        assert np.array_equal(smem[: 2 * count].view(np.uint16), landed)


def test_outside_of_the_tensor_is_nan_where_the_map_says_so():
    source = np.ones((8, 8), np.float32)
    target = np.zeros((16, 16), np.float32)
    memory = Global(source, target)
    maps = [memory.map(source, [4, 8], padding=1), memory.map(target, [4, 8])]
    run(copy(2, (6, 4), 128), maps, memory=memory)
    assert np.isnan(target[8:10, 4:12]).all() and np.isnan(target[6:8, 8:12]).all()
    assert (target[6:8, 4:8] == 1).all()


REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
              "or": np.bitwise_or, "xor": np.bitwise_xor}  # fmt: skip


@pytest.mark.parametrize(
    "dtype, names",
    [("f4", ("add",)), ("f2", ("add", "min", "max")), ("i4", ("add", "min", "max")),
     ("u4", tuple(REDUCTIONS))],
)  # fmt: skip
def test_reductions(dtype, names):
    rng = np.random.default_rng(0)
    source, before = rng.integers(0, 100, (2, 8, 8)).astype(dtype)
    for name in names:
        target = before.copy()
        memory = Global(source, target)
        maps = [memory.map(a, [4, 8]) for a in (source, target)]
        body = copy(2, (2, 0), 32 * source.itemsize, "cp.reduce.async.bulk.tensor", f".{name}")
        assert not run(body, maps, memory=memory)
        want = before.copy()
        want[2:6] = REDUCTIONS[name](before[2:6], source[2:6])
        assert np.array_equal(target, want)


def test_reductions_of_bfloat16_round_once():
    source, target = np.full((2, 1, 8), 0x3F80, np.uint16)
    target[:] = 0x4380  # 256, with neighbours 2 apart
    memory = Global(source, target)
    maps = [memory.map(a, [1, 8], element=9) for a in (source, target)]
    run(copy(2, (0, 0), 16, "cp.reduce.async.bulk.tensor", ".add"), maps, memory=memory)
    assert (target == 0x4380).all(), "257 is a tie, rounded to even"


def test_what_tma_must_not_touch():
    source, target = np.ones((16, 8), np.float32), np.ones((8, 8), np.float32)
    memory = Global(source, target)
    good = memory.map(source, [4, 8])
    large = memory.map(target, [4, 8], shape=(16, 8))  # than its tensor
    with pytest.raises(MemcheckError, match=r"byte 319 of array 1 \(256 bytes\): outside"):
        run(copy(2, (6, 0), 128), [good, large], memory=memory)
    with pytest.raises(MemcheckError, match=r"byte 319 of array 1 \(256 bytes\): outside"):
        run(copy(2, (6, 0), 128), [large, good], memory=memory)
    with pytest.raises(
        MemcheckError, match="a box of 128 bytes, aligned to 128, at shared address 64"
    ):
        run(edit(copy(2, (0, 0), 128), "%r1, 1024", "%r1, 64"), [good, good], memory=memory)
    with pytest.raises(MemcheckError, match="at shared address 4096 of 4096"):
        run(edit(copy(2, (0, 0), 128), "%r1, 1024", "%r1, 4096"), [good, good], memory=memory)
    with pytest.raises(ExecutionError, match="3 coordinates of a tensor of rank 2; program"):
        run(copy(3, (0, 0, 0), 128), [good, good], memory=memory)
    with pytest.raises(ExecutionError, match="no tensor map is there"):
        body = edit(copy(2, (0, 0), 128), "bar.sync 0;", "ld.param.b64 %rd0, [arg_2]; bar.sync 0;")
        run(body, [good, good, source], memory=memory)


def threads_of(error):
    return str(error.value).rpartition("; ")[2]


@pytest.mark.parametrize(
    "line, what",
    [
        ("mbarrier.init.shared::cta.b64 [2052], 1;", "8 bytes at byte 2052 .* not aligned"),
        ("mbarrier.init.shared::cta.b64 [2048], %r31;", "mbarrier at 0x800: made for 0 arrivals"),
        ("mbarrier.inval.shared::cta.b64 [2048];", "mbarrier at 0x800: there is none"),
        ("mbarrier.arrive.shared::cta.b64 _, [2048];", "mbarrier at 0x800: there is none"),
        ("mbarrier.expect_tx.shared::cta.b64 [0], 1048576;", "tx-count 1048576 is out of range"),
        ("mbarrier.try_wait.parity.shared::cta.b64 %p6, [2048], 0;", "at 0x800: there is none"),
        ("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
         "[%r1], [%rd0, {%r20, %r21}], [4];", "8 bytes at byte 4 of .* not aligned"),
        ("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
         "[%r1], [%rd0, {%r20, %r21}], [2048];", "mbarrier at 0x800: there is none"),
        ("cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes "
         "[%r1], [%rd0, {%r20}], [0];", "1 coordinates of a tensor of rank 2"),
        ("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd9, {%r20, %r21}], [%r1];",
         "address 0x5, near no tensor"),
        ("tensormap.replace.tile.rank.shared::cta.b1024.b32 [32], 1;", "128 bytes at byte 32"),
    ],
)  # fmt: skip
def test_errors_name_instruction_and_thread(line, what):
    source, target = np.ones((2, 16, 8), np.float32)
    memory = Global(source, target)
    maps = [memory.map(a, [4, 8]) for a in (source, target)]
    before = "setp.eq.u32 %p5, %r0, 37; mov.u32 %r31, 0; mov.b64 %rd9, 5; @%p5"
    body = edit(copy(2, (0, 0), 128), "bar.sync 0;", f"bar.sync 0; {before} {line}")
    with pytest.raises((MemcheckError, ExecutionError), match=what) as error:
        run(body, maps, memory=memory)
    assert f"handmade: @%p5 {line.partition(' ')[0]}" in str(error.value)
    assert threads_of(error) == "program (0, 0, 0), warp 1, lane 5"


def test_boxes_of_two_ctas_that_overlap_are_a_race():
    source, target = np.arange(128, dtype=np.float32).reshape(2, 8, 8)
    memory = Global(source, target)
    maps = [memory.map(a, [4, 8]) for a in (source, target)]
    report = run(copy(2, (0, 0), 128), maps, memory=memory, grid=2)
    assert not report, "the same values"
    assert set(report.notes) == {"same global value written twice"}
    store = "@%p0 cp.async.bulk.tensor.2d.global"
    row = edit(copy(2, (0, 0), 128), "mov.s32 %r21, 0;", "mov.u32 %r21, %ctaid.x;")
    report = run(edit(row, store, f"mov.u32 %r21, 1; {store}"), maps, memory=memory, grid=2)
    assert kinds(report) == {"global race"}


# Maps


def test_maps_that_the_driver_refuses():
    good = {"base": 1 << 20, "swizzle_mode": 3, "elem_size": 2, "elem_type": 9,
            "block_size": [64, 1, 64], "shape": [100, 4, 64], "strides": [256, 64, 1]}  # fmt: skip
    TensorMap.host(**good)
    for key, bad, text in (
        ("base", (1 << 20) + 8, "aligned"),
        ("strides", [260, 65, 1], "multiples of 16"),
        ("block_size", [64, 1, 128], "exceed the swizzle"),
        ("block_size", [512, 1, 64], "sides"),
        ("block_size", [64, 1, 4], "have 8 bytes"),
        ("shape", [0, 4, 64], "shape"),
        ("elem_size", 4, "bytes"),
    ):
        with pytest.raises(ValueError, match=text):
            TensorMap.host(**good | {key: bad})


def test_a_map_made_field_by_field_is_the_host_s():
    """In the order and with the values of Triton's tensormap.replace."""
    data = np.zeros(128, np.uint8)
    with pytest.raises(ValueError, match="no tensor map"):
        TensorMap.unpack(data)
    for name, value, ordinal in (
        ("global_address", 1 << 33, 0), ("rank", 1, 0), ("box_dim", 64, 0), ("box_dim", 128, 1),
        ("global_dim", 64, 0), ("global_dim", 1000, 1), ("global_stride", 2048, 0),
        ("element_stride", 1, 0), ("element_stride", 1, 1), ("elemtype", 10, 0),
        ("interleave_layout", 0, 0), ("swizzle_mode", 3, 0), ("fill_mode", 0, 0),
    ):  # fmt: skip
        replace_field(data, name, value, ordinal)
    got = TensorMap.unpack(data)
    want = TensorMap.host(1 << 33, 3, 2, 9, [128, 64], [1000, 64], [1024, 1])
    assert TensorMap.unpack(want.pack()) == got
    assert (got.base, got.shape, got.strides, got.box) == (1 << 33, (64, 1000), (2048,), (64, 128))
    assert (got.element, got.swizzle, got.nan_fill) == ("bf16", 128, False)
    with pytest.raises(ValueError, match="no ordinal 1"):
        replace_field(data, "rank", 1, 1)


@pytest.mark.parametrize("width", (32, 64, 128))
def test_what_tma_writes_is_what_the_descriptors_of_wgmma_read(width):
    """A tile [64, 128] of 16 bits, in boxes as wide as the swizzle: K-major, and its transpose."""
    n, columns, inner = 64, 128, width // 2
    tile = np.random.default_rng(0).integers(0, 1 << 16, (n, columns)).astype(np.uint16)
    smem = np.zeros(1 << 15, np.uint8)
    for r, c in itertools.product(range(n), range(columns)):
        at = 2048 + c // inner * n * width + r * width + c % inner * 2
        at = int(cute.swizzle(width, np.array(at)))
        smem[at : at + 2] = tile[r, c : c + 1].view(np.uint8)
    chunks = smem.reshape(-1, 16)
    for k in range(0, columns, 16):  # K-major: rows of N, 16 columns of K
        start = 2048 + k // inner * n * width + k % inner * 2
        where = operand_chunks(MatrixDescriptor(start, 16, 8 * width, width), n, 2, False)
        got = chunks[where >> 4].reshape(n, -1).view(np.uint16)
        assert np.array_equal(got, tile[:, k : k + 16])
    for k in range(0, n, 16):  # MN-major: the columns are N now, 16 rows are K
        descriptor = MatrixDescriptor(2048 + k * width, n * width, 8 * width, width)
        where = operand_chunks(descriptor, columns, 2, True)
        got = chunks[where >> 4].reshape(16, -1).view(np.uint16)
        assert np.array_equal(got, tile[k : k + 16])


DEVICE_MAP = """
    mov.u32 %r0, %tid.x;
    setp.lt.u32 %p5, %r0, 32;
    shl.b32 %r30, %r0, 2;
    mov.u32 %r31, 0;
    ld.param.b64 %rd9, [arg_2];
    ld.param.b64 %rd8, [arg_3];
    setp.eq.u32 %p6, %r0, 0;
    @%p5 st.shared.b32 [%r30 + 3968], %r31;
    bar.warp.sync -1;
    @%p6 tensormap.replace.tile.global_address.shared::cta.b1024.b64 [3968], %rd8;
    @%p6 tensormap.replace.tile.rank.shared::cta.b1024.b32 [3968], 1;
    @%p6 tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [3968], 0, 8;
    @%p6 tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [3968], 1, 4;
    @%p6 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [3968], 0, 8;
    @%p6 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [3968], 1, 16;
    @%p6 tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [3968], 0, 32;
    @%p6 tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [3968], 0, 1;
    @%p6 tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [3968], 1, 1;
    @%p6 tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [3968], 7;
    @%p6 tensormap.replace.tile.interleave_layout.shared::cta.b1024.b32 [3968], 0;
    @%p6 tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [3968], 0;
    @%p6 tensormap.replace.tile.fill_mode.shared::cta.b1024.b32 [3968], 0;
    bar.warp.sync -1;
    @%p5 tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned
        [%rd9], [3968], 0x80;
    fence.proxy.tensormap::generic.acquire.gpu [%rd9], 0x80;
    bar.sync 0;"""


@pytest.mark.parametrize(
    "old, new, found",
    [
        ("", "", set()),
        ("fence.proxy.tensormap::generic.acquire.gpu [%rd9], 0x80;", "", {"no tensormap fence"}),
        ("@%p5 st.shared.b32 [%r30 + 3968], %r31;", "", {"uninitialised"}),
    ],
)
def test_a_map_made_by_the_device(old, new, found):
    source, target = np.arange(256, dtype=np.float32).reshape(2, 16, 8)
    scratch = np.zeros(256, np.uint8)
    scratch = scratch[-scratch.ctypes.data % 128 :][:128]
    memory = Global(source, target, scratch)
    good = memory.map(target, [4, 8])
    body = edit(DEVICE_MAP, old, new) + edit(copy(2, (4, 0), 128), "mov.b64 %rd0, arg_0;\n"
        "        cvta.param.u64 %rd0, %rd0;", "mov.b64 %rd0, %rd9;")  # fmt: skip
    report = run(body, [good, good, scratch, source], memory=memory)
    assert kinds(report) == found, report
    assert np.array_equal(target[4:8], source[4:8])


# mbarriers


def barriers():
    """Mbarriers in 64 bytes."""
    return Mbarriers(SharedMemory(64, 4, Clocks(1, 4), False))


def test_phases_of_an_mbarrier():
    m = barriers()
    assert not m.init(8, 2)
    assert m.is_over(8, 1), "the phase before the first counts as over"
    assert not m.is_over(8, 0)
    m.arrive(8)
    assert m.pending(8) == (0, 1, 0) and not m.is_over(8, 0)
    m.arrive(8)
    assert m.is_over(8, 0) and not m.is_over(8, 1)
    assert m.pending(8) == (1, 2, 0), "reloaded"
    m.arrive(8, 2)
    assert m.is_over(8, 1) and not m.is_over(8, 0)
    with pytest.raises(MbarrierError, match="3 arrive, 2 are pending"):
        m.arrive(8, 3)
    m.inval(8)
    with pytest.raises(MbarrierError, match="there is none"):
        m.arrive(8)


def test_bytes_hold_a_phase_open():
    m = barriers()
    m.init(0, 1)
    m.expect_tx(0, 8192)
    m.arrive(0)
    m.complete_tx(0, 4096)
    assert not m.is_over(0, 0)
    m.complete_tx(0, 4096)
    assert m.is_over(0, 0)
    m.complete_tx(0, 100)  # before they are expected: the arrival is still to come
    assert m.pending(0) == (1, 1, -100)
    m.expect_tx(0, 100)
    m.arrive(0)
    assert m.is_over(0, 1)
    with pytest.raises(MbarrierError, match="tx-count 1048576 is out of range"):
        m.expect_tx(0, 1 << 20)
    with pytest.raises(MbarrierError, match="made for 0 arrivals"):
        m.init(8, 0)


def test_an_mbarrier_lives_in_its_bytes():
    m = barriers()
    m.init(0, 1)
    assert m.init(0, 1), "again: undefined in the ISA"
    m.words[0] = 0
    with pytest.raises(MbarrierError, match="there is none"):
        m.arrive(0)


@pytest.mark.parametrize("wait", ["try_wait", "test_wait"])
def test_what_stands_before_a_wait_runs_once(wait):
    """Three warps count and wait, and have to wait again; the fourth arrives."""
    counted = np.zeros(4, np.uint32)
    body = f"""
        mov.u32 %r0, %tid.x;
        setp.eq.u32 %p0, %r0, 0;
        @%p0 mbarrier.init.shared.b64 [0], 1;
        bar.sync 0;
        setp.lt.u32 %p1, %r0, 32;
        @%p1 bra $arrive;
        ld.param.b64 %rd0, [arg_0];
        red.global.add.u32 [%rd0], 1;
        mbarrier.{wait}.parity.shared.b64 %p2, [0], 0;
        bra $end;
        $arrive:
        @%p0 mbarrier.arrive.shared.b64 _, [0];
        $end:"""
    assert not run(body, [counted])
    assert counted[0] == 96
