"""wgmma against the ISA's layouts in CuTe's notation, its figures of fragments, and numpy."""

import numpy as np
import pytest
import torch

from ptx_machine import ExecutionError, MemcheckError, UnknownInstructionError
from ptx_machine.formats import ITEMSIZE, cut, decode, encode
from ptx_machine.wgmma_layout import (
    MatrixDescriptor,
    a_fragment,
    accumulator,
    accumulator_registers,
    operand_chunks,
    swizzle,
)
from tests.ptx_machine import cute
from tests.ptx_machine.handmade import fill, kinds, registers_in, registers_out, run

WIDTHS = (0, 32, 64, 128)


def elements(chunks, itemsize, mn_major):
    """[rows, columns] addresses of elements, from those of 16-byte chunks."""
    along = np.arange(16 // itemsize) * itemsize
    every = (chunks[..., None] + along).reshape(chunks.shape[0], -1)
    return every.T if mn_major else every


@pytest.mark.parametrize(
    "mn_major, itemsize, width, rows",
    [
        (mn_major, itemsize, width, rows)
        for mn_major, itemsize in ((False, 1), (False, 2), (False, 4), (True, 2))
        for width in WIDTHS
        for rows in (8, 64, 256)
        if rows >= (max(width, 16) // itemsize if mn_major else 8)
    ],
)
def test_operands_lie_as_the_canonical_layouts_say(mn_major, itemsize, width, rows):
    columns = 32 // itemsize
    leading, stride = 4096, 8192  # not what packs densely
    start = 3 * 1024 + (32 if width > 32 and not mn_major else 0)  # K advances inside the pattern
    shape, step = cute.canonical(mn_major, width, itemsize, rows, columns, leading, stride)
    want = cute.byte_addresses(shape, step, width, start, rows, columns, itemsize)
    descriptor = MatrixDescriptor(start, leading, stride, width)
    got = elements(operand_chunks(descriptor, rows, itemsize, mn_major), itemsize, mn_major)
    assert np.array_equal(got, want)


@pytest.mark.parametrize(
    "mn_major, width, itemsize, shape, stride, leading, step",
    [
        (False, 0, 4, ((8, 2), (4, 4)), ((4, 32), (1, 64)), 16, 8),
        (False, 32, 4, ((8, 2), (4, 4)), ((8, 64), (1, 4)), 1, 16),
        (True, 0, 2, ((8, 1, 2), (8, 2)), ((1, 8, 64), (8, 128)), 16, 8),
        (True, 32, 2, ((8, 2, 2), (8, 2)), ((1, 8, 128), (16, 256)), 16, 32),
        (True, 64, 2, ((8, 4, 2), (8, 2)), ((1, 8, 256), (32, 512)), 32, 64),
    ],
)
def test_worked_examples_of_the_isa(mn_major, width, itemsize, shape, stride, leading, step):
    """Layouts in elements, and the fields of the descriptor in units of 16 bytes."""
    descriptor = MatrixDescriptor(0, leading << 4, step << 4, width)
    bits = descriptor.encode()
    assert (bits >> 16 & 0x3FFF, bits >> 32 & 0x3FFF) == (leading, step)
    assert MatrixDescriptor.decode(bits) == descriptor
    rows, columns = int(np.prod(cute.flat(shape[0]))), 32 // itemsize  # of a single instruction
    want = cute.byte_addresses(shape, stride, width, 0, rows, columns, itemsize)
    got = elements(operand_chunks(descriptor, rows, itemsize, mn_major), itemsize, mn_major)
    assert np.array_equal(got, want)


def test_fields_of_a_descriptor():
    descriptor = MatrixDescriptor(0x3FFF0, 0x10, 0x400, 128, 5)
    bits = descriptor.encode()
    assert bits == 0x3FFF | 1 << 16 | 0x40 << 32 | 5 << 49 | 1 << 62
    assert MatrixDescriptor.decode(np.uint64(bits)) == descriptor
    assert [MatrixDescriptor.decode(n << 62).swizzle for n in range(4)] == [0, 128, 64, 32]
    with pytest.raises(ValueError, match="reserved bits 0x10000000000000"):
        MatrixDescriptor.decode(1 << 52)
    with pytest.raises(ValueError, match="multiples of 16"):
        MatrixDescriptor(8, 16, 16).encode()
    with pytest.raises(NotImplementedError, match="base offset"):
        operand_chunks(descriptor, 64, 2, False)
    with pytest.raises(ValueError, match="16 bits"):
        operand_chunks(MatrixDescriptor(0, 16, 16), 64, 4, True)


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_swizzles_move_chunks_inside_their_rows(width):
    address = np.arange(32 * width)
    there = swizzle(address, width)
    assert np.array_equal(there, cute.swizzle(width, address))
    assert np.array_equal(np.sort(there), address)
    assert np.array_equal(swizzle(there, width), address)
    assert np.array_equal(there // width, address // width)


def d_position(n):
    """(row, column) [128, n / 2] of a thread's elements of D: the ISA's figure, tile by tile."""
    row, column = np.empty((128, n // 2), int), np.empty((128, n // 2), int)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for tile in range(n // 8):
            for i, (down, right) in enumerate(((0, 0), (0, 1), (8, 0), (8, 1))):
                row[thread, 4 * tile + i] = 16 * warp + (lane >> 2) + down
                column[thread, 4 * tile + i] = 8 * tile + 2 * (lane & 3) + right
    return row, column


def a_position(itemsize):
    """(row, column) [128, 4, elements of a register] of A, as mma.m16n8k{8,16,32} has them."""
    per, k = 4 // itemsize, 32 // itemsize
    row, column = np.empty((128, 4, per), int), np.empty((128, 4, per), int)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for register, (down, right) in enumerate(((0, 0), (8, 0), (0, k // 2), (8, k // 2))):
            row[thread, register] = 16 * warp + (lane >> 2) + down
            column[thread, register] = per * (lane & 3) + np.arange(per) + right
    return row, column


@pytest.mark.parametrize("n", range(8, 257, 8))
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_fragments_of_d(n, kind):
    row, column = d_position(n)
    assert len(set(zip(row.ravel(), column.ravel(), strict=True))) == 64 * n
    itemsize = ITEMSIZE[kind]
    d = np.random.default_rng(0).permutation(64 * n).reshape(64, n).astype(f"u{itemsize}")
    registers = np.ascontiguousarray(d[row, column]).view(np.uint32)
    assert np.array_equal(accumulator(registers, 64, itemsize)[0], d)
    assert np.array_equal(accumulator_registers(d[None]), registers.T)
    by_warp = accumulator(registers[32:64], 16, itemsize)
    assert np.array_equal(by_warp[0], d[16:32]), "a warp alone has its 16 rows"


@pytest.mark.parametrize("kind", ["e4m3", "bf16", "tf32"])
def test_fragments_of_a(kind):
    itemsize = ITEMSIZE[kind]
    k = 32 // itemsize
    row, column = a_position(itemsize)
    assert len(set(zip(row.ravel(), column.ravel(), strict=True))) == 64 * k
    a = np.random.default_rng(0).integers(0, 256, (64, k)).astype(f"u{itemsize}")
    registers = np.ascontiguousarray(a[row, column]).reshape(128, -1).view(np.uint32)
    assert np.array_equal(a_fragment(registers, 64, kind)[0], a)
    assert np.array_equal(a_fragment(registers[96:], 16, kind)[0], a[48:])


def test_an_accumulator_rounded_in_place_is_a_fragment_of_a():
    """What attention relies on: 8 registers of scores make the 4 of A for 16 keys, in order."""
    d = np.random.default_rng(0).normal(size=(1, 64, 32)).astype(np.float32)
    registers = accumulator_registers(d).view(np.float32).T
    for block in range(2):
        halves = encode(np.ascontiguousarray(registers[:, 8 * block : 8 * block + 8]), "bf16")
        a = a_fragment(halves.view(np.uint32), 64, "bf16")
        assert np.array_equal(a[0], encode(d[0, :, 16 * block : 16 * block + 16].copy(), "bf16"))


def test_number_formats_are_those_of_torch():
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        got = decode(np.arange(65536).astype(np.uint16), kind)
        assert np.array_equal(got, every.view(dtype).double().numpy(), equal_nan=True)
    byte = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    for kind, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        got = decode(np.arange(256).astype(np.uint8), kind)
        assert np.array_equal(got, byte.view(dtype).double().numpy(), equal_nan=True)
    assert decode(np.array([0x3F801FFF, 0x3F802000], np.uint32), "tf32").tolist() == [1, 1 + 2**-10]
    exact = np.array([1 + 2.0**-24, -1 - 3 * 2.0**-24, 2.0**-40, 0.0, np.inf, np.nan])
    want = np.float32([1, -1 - 2 * 2.0**-24, 2.0**-40, 0, np.inf, np.nan])
    assert np.array_equal(cut(exact), want, equal_nan=True), "towards zero"


# Products, as instructions


def numbers(rng, shape, kind):
    """Elements of which sums of products are exact."""
    if kind in ("e4m3", "e5m2"):
        low, high = (0x28, 0x50) if kind == "e4m3" else (0x34, 0x48)
        return (rng.integers(low, high, shape) | rng.integers(0, 2, shape) << 7).astype(np.uint8)
    if kind in ("s8", "u8"):
        return rng.integers(0, 256, shape).astype(np.uint8)
    return encode(rng.integers(-8, 9, shape) / 4.0, kind)


class Case:
    """One wgmma: operands placed in shared memory as the descriptors' CuTe layouts say."""

    def __init__(self, d="f32", a="bf16", b=None, n=32, width=64, a_from="k", b_major="k"):
        self.d, self.a, self.b, self.n = d, a, b or a, n
        self.a_from, self.b_major = a_from, b_major
        self.k = 32 // ITEMSIZE[a]
        rng = np.random.default_rng(n)
        self.left, self.right = numbers(rng, (64, self.k), a), numbers(rng, (n, self.k), self.b)
        self.smem = np.zeros(40960, np.uint8)
        self.b_bits = self._place(self.right, self.b, 0, b_major == "mn", width)
        size = ITEMSIZE[a]
        if a_from == "registers":
            row, column = a_position(size)
            fragment = np.ascontiguousarray(self.left[row, column]).reshape(128, -1)
            self.a_registers = fragment.view(np.uint32)
        else:
            self.a_registers = np.zeros((128, 4), np.uint32)
            self.a_bits = self._place(self.left, a, 32768, a_from == "mn", width)
        self.d_kind = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[d]
        self.start = rng.integers(-4, 5, (64, n)).astype(self.d_kind)
        self.position = d_position(n)

    def _place(self, matrix, kind, start, mn_major, width):
        rows, columns = matrix.shape
        size = ITEMSIZE[kind]
        leading, stride = (128, 256) if not width else (16, 8 * width)
        if mn_major and width:
            leading = width * self.k
        shape, step = cute.canonical(mn_major, width, size, rows, columns, leading, stride)
        at = cute.byte_addresses(shape, step, width, start, rows, columns, size)
        self.smem[at[..., None] + np.arange(size)] = np.ascontiguousarray(matrix)[..., None].view(
            np.uint8
        )
        return MatrixDescriptor(start, leading, stride, width).encode()

    def run(self, *, scale="1", signs=(1, 1), **options):
        """(D [64, n], report)"""
        pack = 2 if self.d == "f16" else 1
        d = [f"%f{k}" for k in range(self.n // 2 // pack)]
        a = [f"%r{k}" for k in range(4)]
        left = f"{{{','.join(a)}}}" if self.a_from == "registers" else "%rd1"
        tail = ""
        if self.d != "s32":
            tail = f", {signs[0]}, {signs[1]}"
            if self.a in ("f16", "bf16"):
                own = "" if self.a_from == "registers" else f", {int(self.a_from == 'mn')}"
                tail += f"{own}, {int(self.b_major == 'mn')}"
        op = f"wgmma.mma_async.sync.aligned.m64n{self.n}k{self.k}.{self.d}.{self.a}.{self.b}"
        body = f"""
            {registers_in(d, 1)}
            {registers_in(a, 2)}
            {fill(40960)}
            fence.proxy.async.shared::cta;
            bar.sync 0;
            mov.b64 %rd0, {self.b_bits};
            mov.b64 %rd1, {getattr(self, "a_bits", 0)};
            mov.u32 %r10, {1 if scale == "1" else 0};
            setp.ne.u32 %p0, %r10, 0;
            wgmma.fence.sync.aligned;
            {op} {{{",".join(d)}}}, {left}, %rd0, %p0{tail};
            wgmma.commit_group.sync.aligned;
            wgmma.wait_group.sync.aligned 0;
            {registers_out(d, 3)}"""
        row, column = self.position
        before = np.ascontiguousarray(self.start[row, column]).view(np.uint32)
        after = np.zeros_like(before)
        arguments = [self.smem, before, self.a_registers, after]
        report = run(body, arguments, shared=40960, **options)
        out = np.empty((64, self.n), self.d_kind)
        out[row, column] = after.view(self.d_kind)
        return out, report

    def want(self, sign=1, before=True):
        """The same by a loop over k."""
        left, right = decode(self.left, self.a), decode(self.right, self.b)
        total = sum(left[:, k : k + 1] * right[None, :, k] for k in range(self.k))
        total = sign * total + (self.start.astype(float) if before else 0)
        return total.astype(self.d_kind)


FORMS = [
    *({"a": a, "a_from": f} for a in ("bf16", "f16", "tf32", "e4m3") for f in ("registers", "k")),
    *({"a": a, "a_from": f, "b_major": "mn"} for a in ("bf16", "f16") for f in ("registers", "k")),
    *({"n": 64, "a_from": "mn", "b_major": m, "width": w} for m in ("k", "mn") for w in WIDTHS),
    *({"n": n, "width": w} for n in (8, 24, 256) for w in (0, 32, 128)),
    {"a": "e5m2", "b": "e4m3"},
    {"a": "e4m3", "b": "e5m2", "a_from": "registers"},
    {"d": "f16", "a": "f16"},
    {"a": "e5m2"},
    {"d": "f16", "a": "e5m2", "a_from": "registers"},
    {"d": "f16", "a": "e4m3"},
    {"d": "f16", "a": "e4m3", "b": "e5m2"},
    {"d": "f16", "a": "e5m2", "b": "e4m3", "a_from": "registers"},
    {"d": "s32", "a": "s8"},
    {"d": "s32", "a": "u8", "b": "s8", "a_from": "registers"},
    {"d": "s32", "a": "s8", "b": "u8"},
    {"d": "s32", "a": "u8"},
    {"n": 64, "b_major": "mn", "width": 128},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f.values())))
def test_a_product_is_the_sum_over_k(form):
    case = Case(**form)
    out, report = case.run()
    assert not report, report
    assert np.array_equal(out, case.want())


def test_scales_of_a_product():
    case = Case(a="f16")
    assert np.array_equal(case.run(signs=(-1, 1))[0], case.want(-1))
    assert np.array_equal(case.run(signs=(-1, -1))[0], case.want())
    case.start[:] = np.nan
    assert np.array_equal(case.run(scale="0")[0], case.want(before=False)), "D is not read"


def test_infinities_meet_zeros():
    case = Case(a_from="registers")
    case.right[:] = 0
    case.smem[:32768] = 0
    case.a_registers[0, 0] = 0x7F80
    out, _ = case.run()
    assert np.isnan(out[0]).all() and np.array_equal(out[1:], case.start[1:])


@pytest.mark.parametrize("seed", range(2))
def test_warps_of_a_warpgroup_one_by_one(seed):
    for form in ({}, {"a_from": "registers"}, {"a_from": "mn", "width": 32}):
        case = Case(**form)
        out, report = case.run(shuffle_warps=True, seed=seed)
        assert not report, report
        assert np.array_equal(out, case.want())


MMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"


def issue(descriptor="%rd0", op=MMA, tail=", 1, 1, 0, 0", before="", registers=4):
    d = ",".join(f"%f{k}" for k in range(registers))
    return f"""
        mov.u32 %r0, %tid.x;
        mov.b64 %rd0, {MatrixDescriptor(0, 16, 256, 32).encode()};
        setp.ne.u32 %p0, %r0, 1000;
        {before}
        {op} {{{d}}}, %rd0, {descriptor}, %p0{tail};"""


@pytest.mark.parametrize(
    "options",
    [
        {"op": MMA.replace("n8", "n12")},
        {"op": MMA.replace("k16", "k8")},
        {"op": MMA.replace("bf16.bf16", "bf16.f16")},
        {"op": MMA.replace("f32.bf16.bf16", "f16.bf16.bf16"), "registers": 2},
        {"op": MMA.replace("mma_async", "mma_async.sp")},
        {"tail": ", 1, 2, 0, 0"},
        {"tail": ", 1, 1"},
        {"registers": 5},
        {"before": "@%p0 wgmma.commit_group.sync.aligned;"},
    ],
    ids=str,
)
def test_forms_that_the_isa_does_not_have_are_refused(options):
    with pytest.raises(UnknownInstructionError, match="wgmma"):
        run(issue(**options))


def test_wrong_operands_are_refused():
    with pytest.raises(ExecutionError, match="descriptor of B differs"):
        run(issue("%rd1", before="cvt.u64.u32 %rd1, %r0;"))
    with pytest.raises(ExecutionError, match="scale-d differs"):
        run(issue(before="setp.lt.u32 %p0, %r0, 7;"))
    with pytest.raises(MemcheckError, match=r"byte 4336 of shared memory .*: outside; .*, warp 0"):
        run(issue("%rd1", before="add.s64 %rd1, %rd0, 256;"))
    with pytest.raises(ExecutionError, match="25 threads of a warp are here"):
        run(issue(before="setp.lt.u32 %p1, %r0, 7;\n@%p1 bra $end;") + "\n$end:")
    with pytest.raises(ExecutionError, match="not by whole warpgroups"):
        run(issue(), threads=64)


def test_operands_that_nobody_wrote():
    assert kinds(run(issue())) == {"uninitialised"}
