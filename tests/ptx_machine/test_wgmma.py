"""Products of wgmma: every form as a sum over k in numpy, and operands that are refused."""

import itertools

import numpy as np
import pytest

from ptx_machine import ExecutionError, MemcheckError, UnknownInstructionError
from ptx_machine.formats import ITEMSIZE, decode, encode
from ptx_machine.wgmma_layout import MatrixDescriptor
from tests.ptx_machine import cute
from tests.ptx_machine.handmade import Global, fill, kinds, registers_in, registers_out, run
from tests.ptx_machine.test_wgmma_layout import WIDTHS, a_position, d_position


def numbers(rng, shape, kind):
    """Elements of which sums of products are exact."""
    if kind in ("e4m3", "e5m2"):
        low, high = (0x28, 0x50) if kind == "e4m3" else (0x34, 0x48)
        return (rng.integers(low, high, shape) | rng.integers(0, 2, shape) << 7).astype(np.uint8)
    if kind in ("s8", "u8"):
        return rng.integers(0, 256, shape).astype(np.uint8)
    return encode(rng.integers(-8, 9, shape) / 4.0, kind)


def opcode(n, d, a, b):
    return f"wgmma.mma_async.sync.aligned.m64n{n}k{32 // ITEMSIZE[a]}.{d}.{a}.{b}"


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

    def product(self, n, signs=(1, 1)):
        """(the instruction on the first n columns of B, the registers of D)"""
        pack = 2 if self.d == "f16" else 1
        d = [f"%f{k}" for k in range(n // 2 // pack)]
        left = "{%r0,%r1,%r2,%r3}" if self.a_from == "registers" else "%rd1"
        tail = ""
        if self.d != "s32":
            tail = f", {signs[0]}, {signs[1]}"
            if self.a in ("f16", "bf16"):
                own = "" if self.a_from == "registers" else f", {int(self.a_from == 'mn')}"
                tail += f"{own}, {int(self.b_major == 'mn')}"
        op = opcode(n, self.d, self.a, self.b)
        return f"{op} {{{','.join(d)}}}, {left}, %rd0, %p0{tail};", d

    def run(self, *, scale="1", signs=(1, 1), **options):
        """(D [64, n], report)"""
        instruction, d = self.product(self.n, signs)
        body = f"""
            {registers_in(d, 1)}
            {registers_in(["%r0", "%r1", "%r2", "%r3"], 2)}
            {fill(40960)}
            fence.proxy.async.shared::cta;
            bar.sync 0;
            mov.b64 %rd0, {self.b_bits};
            mov.b64 %rd1, {getattr(self, "a_bits", 0)};
            mov.u32 %r10, {1 if scale == "1" else 0};
            setp.ne.u32 %p0, %r10, 0;
            wgmma.fence.sync.aligned;
            {instruction}
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


TYPES = [  # of D, A and B
    ("f32", "bf16", "bf16"), ("f32", "f16", "f16"), ("f16", "f16", "f16"), ("f32", "tf32", "tf32"),
    *itertools.product(("f16", "f32"), ("e4m3", "e5m2"), ("e4m3", "e5m2")),
    *itertools.product(["s32"], ("s8", "u8"), ("s8", "u8")),
]  # fmt: skip


def sizes(d):
    """All N, of which integers have fewer."""
    return (8, 16, 24, *range(32, 257, 16)) if d == "s32" else range(8, 257, 8)


ORDER = [f"wgmma.{name}.sync.aligned" for name in ("fence", "commit_group", "wait_group")]
TESTED = [*(opcode(n, *kinds) for kinds in TYPES for n in sizes(kinds[0])), *ORDER]


@pytest.mark.parametrize("kinds", TYPES, ids="-".join)
def test_every_size_of_product(kinds):
    """N takes the first columns of one B."""
    fence, commit, wait = ORDER
    case, made = Case(*kinds, n=256), []
    lines, start = [], 0
    for n in sizes(case.d):
        instruction, d = case.product(n)
        lines += [f"{fence};", instruction, f"{commit};", f"{wait} 0;"]
        lines.append(f"mad.wide.u32 %rd2, %r390, {4 * len(d)}, %rd3;")
        step = 2 if len(d) % 4 else 4
        lines += [
            f"st.global.v{step}.b32 [%rd2 + {start + 4 * k}], {{{','.join(d[k : k + step])}}};"
            for k in range(0, len(d), step)
        ]
        made.append((n, start // 4, 128 * len(d)))
        start += 512 * len(d)
    zeros = "".join(f"mov.b32 {name}, 0f00000000;" for name in case.product(256)[1])
    body = f"""
        {fill(40960)}
        ld.param.b64 %rd3, [arg_1];
        fence.proxy.async.shared::cta;
        bar.sync 0;
        mov.b64 %rd0, {case.b_bits};
        mov.b64 %rd1, {case.a_bits};
        setp.ne.u32 %p0, %r390, %r390;
        {zeros}
        {" ".join(lines)}"""
    after = np.zeros(start // 4, np.uint32)
    memory = Global(case.smem, after, check=False)
    report = run(body, [case.smem, after], memory=memory, shared=40960)
    assert not report, report
    want = case.want(before=False)
    for n, first, count in made:
        got = after[first : first + count].view(case.d_kind).reshape(128, -1)
        assert np.array_equal(got, want[d_position(n)]), n


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
    with pytest.raises(ExecutionError, match=r"descriptor of B differs .*warp 0, lane 1$"):
        run(issue("%rd1", before="cvt.u64.u32 %rd1, %r0;"))
    with pytest.raises(ExecutionError, match="scale-d differs"):
        run(issue(before="setp.lt.u32 %p0, %r0, 7;"))
    with pytest.raises(MemcheckError, match=r"byte 4336 of shared memory .*: outside; .*, warp 0"):
        run(issue("%rd1", before="add.s64 %rd1, %rd0, 256;"))
    with pytest.raises(ExecutionError, match="25 threads of a warp are here"):
        run(issue(before="setp.lt.u32 %p1, %r0, 7;\n@%p1 bra $end;") + "\n$end:")
    with pytest.raises(ExecutionError, match=r"reserved bits 0x4000 are set; .*warp 0, lane 0$"):
        run(issue("%rd1", before="add.s64 %rd1, %rd0, 0x4000;"))
    with pytest.raises(NotImplementedError, match=r"handmade: wgmma.* a base offset; program"):
        run(issue("%rd1", before="mov.b64 %rd1, 0x2000000000000;"))
    with pytest.raises(ExecutionError, match="not by whole warpgroups"):
        run(issue(), threads=64)


def test_operands_that_nobody_wrote():
    assert kinds(run(issue())) == {"uninitialised"}
