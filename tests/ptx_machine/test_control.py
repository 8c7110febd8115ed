"""Jumps, barriers and fences; and that every form the machine knows is in some test's list."""

import importlib

import numpy as np
import pytest

from ptx_machine import ExecutionError, PtxSyntaxError, UnknownInstructionError
from ptx_machine.parse import parse
from ptx_machine.translate import FORMS
from ptx_machine.translate.forms import expand, form
from tests.ptx_machine.sheet import THREADS, Sheet

MODULES = ("arithmetic", "bits", "control", "conversion", "memory", "warps")


def is_common(op):
    """Whether the form is in none of the files of what sm_90 adds: see test_sm90_forms.py."""
    return FORMS[op].__module__.rpartition(".")[2] not in ("bulk", "wgmma")


def test_every_form_is_tested():
    """`TESTED` are the forms that a file gives to :meth:`Sheet.run`, which looks for them."""
    modules = [importlib.import_module(f"tests.ptx_machine.test_{m}") for m in MODULES]
    tested = [op for module in modules for op in module.TESTED]
    assert set(tested) == {op for op in FORMS if is_common(op)}


def forms(base):
    return [op for op in FORMS if op.partition(".")[0] == base and is_common(op)]


NO_BARRIERS = [
    "bar.warp.sync -1;", "nanosleep.u32 20;", "prefetch.global.L1 [%rd0];",
    "prefetch.global.L2 [%rd0];", *(f"{op};" for op in forms("fence") + forms("membar")),
]  # fmt: skip
BARRIERS = [op for op in forms("bar") + forms("barrier") if "warp" not in op]
TESTED = [
    *(op for base in ("bra", "ret", "exit", "brx", "trap") for op in forms(base)), *BARRIERS,
    *(line.partition(" ")[0].rstrip(";") for line in NO_BARRIERS),
]  # fmt: skip


def test_patterns():
    assert list(expand("a[.b].{c,d}")) == ["a.c", "a.d", "a.b.c", "a.b.d"]
    assert list(expand("x[.{y,z}]")) == ["x", "x.y", "x.z"]
    with pytest.raises(ValueError, match=r"two translators for add\.f32"):
        form("add.f32")(lambda w: None)


def run(lines, ops=(), shared=0, **options):
    """What ``%r1`` holds in the end; threads that left before keep 0."""
    sheet = Sheet(shared=shared)
    for line in lines:
        sheet.line(line)
    sheet.keep(("%r1", 32))
    return sheet.run(ops, **options)[0][0]


ORDERS = [{}, {"shuffle_warps": True, "seed": 1}, {"shuffle_warps": True, "seed": 2}]


@pytest.mark.parametrize("options", ORDERS, ids=["in order", "seed 1", "seed 2"])
@pytest.mark.parametrize("op", forms("bra"))
def test_loops_of_each_thread(op, options):
    """Each thread goes round as often as its number says; then all are together again."""
    got = run(
        [
            "mov.u32 %r1, 0;",
            "$L__AGAIN:",
            "setp.ge.u32 %p1, %r1, %r0;",
            f"@%p1 {op} $L__OUT;",
            "add.u32 %r1, %r1, 1;",
            f"{op} $L__AGAIN;",
            "$L__OUT:",
            "shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;",
            "add.u32 %r1, %r1, %r2;",
        ],
        [op],
        **options,
    )
    assert got == [2 * t + (1 if t % 2 == 0 else -1) for t in range(THREADS)]


@pytest.mark.parametrize("op", forms("ret") + forms("exit"))
def test_threads_leave(op):
    got = run(["mov.u32 %r1, 7;", "setp.lt.u32 %p1, %r0, 40;", f"@!%p1 {op};"], [op])
    assert got == [7] * 40 + [0] * 24


def test_guarded_writes_keep_values_of_earlier_blocks():
    lines = ["mov.u32 %r1, 5;", "setp.lt.u32 %p1, %r0, 10;", "bar.sync 0;", "@%p1 mov.u32 %r1, 7;"]
    assert run(lines) == [7] * 10 + [5] * 54


@pytest.mark.parametrize("op", forms("brx"))
def test_jumps_by_index(op):
    lines = ["and.b32 %r2, %r0, 3;", "$L_table:", ".branchtargets $L_0, $L_1, $L_2, $L_1;"]
    lines.append(f"{op} %r2, $L_table;")
    for k in range(3):
        lines += [f"$L_{k}:", f"mov.u32 %r1, {10 + k};", "bra $L_end;"]
    got = run([*lines, "$L_end:"], [op])
    assert got == [10 + (0, 1, 2, 1)[t % 4] for t in range(THREADS)]


def exchange(barrier):
    """Each thread reads what another warp wrote."""
    return [
        "shl.b32 %r2, %r0, 2;",
        "st.shared.b32 [%r2], %r0;",
        barrier,
        "xor.b32 %r3, %r2, 128;",
        "ld.shared.b32 %r1, [%r3];",
    ]


@pytest.mark.parametrize("options", ORDERS, ids=["in order", "seed 1", "seed 2"])
@pytest.mark.parametrize("op", BARRIERS)
def test_barriers(op, options):
    for arguments in ("0", "3", "0, 64"):
        got = run(exchange(f"{op} {arguments};"), [op], shared=4 * THREADS, **options)
        assert got == [t ^ 32 for t in range(THREADS)]


@pytest.mark.parametrize("line", NO_BARRIERS)
def test_what_is_no_barrier(line):
    """These order nothing between warps, and change no register."""
    op = line.partition(" ")[0].rstrip(";")
    assert run(["mov.u32 %r1, 5;", line], [op]) == [5] * THREADS
    with pytest.raises(AssertionError, match="race"):
        run(exchange(line), shared=4 * THREADS)


def test_barriers_with_fewer_threads_than_the_block():
    """One warp waits for its own threads only."""
    lines = [
        "mov.u32 %r1, 1;",
        "setp.lt.u32 %p1, %r0, 32;",
        "@!%p1 bra $L__END;",
        "bar.sync 1, 32;",
    ]
    assert run([*lines, "mov.u32 %r1, 2;", "$L__END:"]) == [2] * 32 + [1] * 32


def test_deadlock():
    """Half of the block waits for the other, which waits elsewhere."""
    lines = ["setp.lt.u32 %p1, %r0, 32;", "@%p1 bra $L__A;", "bar.sync 1;", "$L__A:", "bar.sync 2;"]
    with pytest.raises(ExecutionError, match="deadlock") as error:
        run(lines)
    message = str(error.value)
    assert (
        "32 of 64 threads at bar.sync 1" in message and "32 of 64 threads at bar.sync 2" in message
    )
    assert "program (0, 0, 0), warp 1, lane 0" in message


def test_part_of_a_warp_at_a_barrier():
    """Both halves of a warp wait at the same barrier, but not at the same instruction."""
    lines = ["setp.lt.u32 %p1, %r0, 16;", "@%p1 bra $L__A;", "{}.sync{} 0;", "bra $L__B;", "$L__A:"]
    lines += ["{}.sync{} 0;", "$L__B:", "mov.u32 %r1, 3;"]
    for barrier in (("bar", ""), ("barrier", ".aligned")):
        with pytest.raises(ExecutionError, match=r"16 threads of a warp are here.*lane (0|16)$"):
            run([line.format(*barrier) for line in lines])
    assert run([line.format("barrier", "") for line in lines]) == [3] * THREADS


def test_half_of_each_warp_at_a_barrier_for_one():
    """Half of each of two warps make 32 threads, but no warp; those that left are not missed."""
    lines = ["and.b32 %r2, %r0, 16;", "setp.eq.u32 %p1, %r2, 0;", "@%p1 bra $L__A;", "{}", "ret;"]
    lines += ["$L__A:", "{} 1, 32;", "mov.u32 %r1, 3;"]
    with pytest.raises(ExecutionError, match=r"16 threads of a warp are here.*warp 0, lane 0"):
        run([line.format("bar.sync") for line in [*lines[:3], "bra $L__B;", *lines[5:], "$L__B:"]])
    left = [*lines[:3], "ret;", *lines[5:]]
    assert run([line.format("bar.sync") for line in left])[:17] == [3] * 16 + [0]
    assert run([line.format("barrier.sync") for line in left])[:17] == [3] * 16 + [0]


@pytest.mark.parametrize(
    "line",
    ["bar.sync 16;", "barrier.sync -1;", "bar.sync 1, 40;", "barrier.sync.aligned 1, 48;",
     "bar.sync 1, 0;", "bar.sync 1, 32, 32;"],
)  # fmt: skip
def test_barriers_that_there_are_not(line):
    with pytest.raises(UnknownInstructionError, match=r"that (there )?is not"):
        run([line])


def test_part_of_a_warp_at_bar_warp_sync():
    lines = ["setp.lt.u32 %p1, %r0, 40;", "@%p1 bra $L__IN;", "ret;", "$L__IN:"]
    with pytest.raises(ExecutionError, match=r"8 threads of a warp are here.*warp 1, lane 0"):
        run([*lines, "bar.warp.sync -1;"])
    with pytest.raises(UnknownInstructionError, match=r"by part of a warp: bar\.warp\.sync 1"):
        run(["bar.warp.sync 1;"])


def test_a_barrier_with_two_counts_or_too_many_threads():
    lines = ["setp.lt.u32 %p1, %r0, 32;", "@%p1 bra $L__A;", "bar.sync 1, 96;", "$L__A:"]
    with pytest.raises(ExecutionError, match=r"bar.sync 1, .*barrier 1 with two counts; program"):
        run([*lines, "bar.sync 1, 64;"])
    with pytest.raises(ExecutionError, match=r"bar.sync 1, 32.*too many threads at barrier 1; pro"):
        run(["bar.sync 1, 32;"])


def test_trap_and_endless_loops():
    with pytest.raises(ExecutionError, match=r"trap.*warp 1, lane 8"):
        run(["setp.eq.u32 %p1, %r0, 40;", "@%p1 trap;"])
    lines = ["setp.eq.u32 %p1, %r0, 99;", "@%p1 trap;", "mov.u32 %r1, 1;"]
    assert run(lines, forms("trap")) == [1] * THREADS
    with pytest.raises(ExecutionError, match="without an end"):
        run(["$L__HERE:", "bra $L__HERE;"], max_steps=1000)


@pytest.mark.parametrize("options", ORDERS)
def test_warps_that_spin_let_others_run(options):
    """One spins, before the place where the other lets it go."""
    lines = [
        "mov.u32 %r1, 0;", "st.shared.u32 [0], %r1;", "bar.sync 0;",
        "setp.ge.u32 %p1, %r0, 32;", "@%p1 bra $L__GO;",
        "$L__SPIN:", "atom.shared.add.u32 %r2, [0], 0;", "setp.eq.u32 %p2, %r2, 0;",
        "@%p2 bra $L__SPIN;", "bra $L__END;",
        "$L__GO:", "atom.shared.add.u32 %r3, [0], 1;", "$L__END:", "mov.u32 %r1, 7;",
    ]  # fmt: skip
    assert run(lines, shared=16, max_steps=1000, **options) == [7] * THREADS


@pytest.mark.parametrize(
    "line",
    ["frobnicate.b32 %r1, %r0;", "add.sat.s32 %r1, %r0, %r0;", "mov.u32 %r1, %clock;",
     "mov.u32 %r1, nothing;", "bar.sync %r0;", "@%p1 bar.sync 0;", "cvt.rm.f32.f64 %r1, %rd0;"],
)  # fmt: skip
def test_unknown_instructions_are_named(line):
    with pytest.raises(UnknownInstructionError) as error:
        run([line])
    assert line.rstrip(";") in str(error.value) and "PTX line" in str(error.value)


def test_what_the_parser_does_not_know():
    text = Sheet().text()
    for old, new, message in (
        (".entry sheet(", ".func sheet(", "no .entry"),
        ("    ret;", "    .callprototype x;", r"callprototype x.*PTX line \d+\]: not understood"),
        ("    ret;", "    .param .b64 p;", r"\.param .*PTX line \d+\]: a call, .*not understood"),
        (".extern .shared .align 16 .b8 smem[]", ".shared .b8 smem[16]", "static shared memory"),
        ("    ret;", "    mov.u32 %r1, 0x;", "not understood"),
        ("    ret;\n}", "    ret;", "does not end"),
    ):
        assert old in text
        with pytest.raises(PtxSyntaxError, match=message):
            parse(text.replace(old, new))


def test_programs_of_a_grid_in_any_order():
    """Program numbers are those of the grid, whatever the order and how many run together."""
    from tests.ptx_machine.sheet import execute

    text = """
    .version 8.7
    .target sm_80
    .address_size 64
    .visible .entry grid(.param .u64 out) .reqntid 32
    {
        .reg .b32 %r<10>; .reg .b64 %rd<4>;
        ld.param.b64 %rd0, [out];
        mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ctaid.y; mov.u32 %r2, %ctaid.z;
        mov.u32 %r3, %nctaid.x; mov.u32 %r4, %nctaid.y;
        mad.lo.u32 %r5, %r2, %r4, %r1;
        mad.lo.u32 %r5, %r5, %r3, %r0;
        mov.u32 %r6, %tid.x;
        mad.lo.u32 %r7, %r5, 32, %r6;
        mad.wide.u32 %rd1, %r7, 4, %rd0;
        add.u32 %r8, %r7, 1;
        st.global.b32 [%rd1], %r8;
        ret;
    }
    """.replace(
        ".entry grid(.param .u64 out) .reqntid 32\n    {",
        ".entry grid(\n.param .u64 out\n)\n.reqntid 32\n{",
    )
    for options in ({}, {"shuffle_ctas": True, "seed": 3}, {"lanes": 64}, {"shuffle_warps": True}):
        out = np.zeros(4 * 3 * 2 * 32, np.uint32)
        report, machine = execute(text, [out], threads=32, grid=(4, 3, 2), **options)
        assert not report and np.array_equal(out, np.arange(1, len(out) + 1))
        assert machine.instructions == len(out) * len(machine.kernel.instructions)
    out[:] = 0
    execute(text, [out], threads=32, grid=(4, 3, 2), ctas=lambda name, grid: [5, 2])
    assert set(np.flatnonzero(out) // 32) == {2, 5}
