"""Jumps, barriers and fences; and that every form the machine knows is in some test's list."""

import importlib

import numpy as np
import pytest

from ptx_machine import ExecutionError, PtxSyntaxError, UnknownInstructionError
from ptx_machine.parse import parse
from ptx_machine.translate import FORMS
from ptx_machine.translate.forms import expand, form
from tests.ptx_machine.sheet import THREADS, Sheet

BASES = (
    "bra", "ret", "exit", "brx", "bar", "barrier", "fence", "membar", "nanosleep",
    "prefetch", "trap",
)  # fmt: skip
MODULES = ("arithmetic", "bits", "control", "conversion", "memory", "warps")


# Translators of what sm_90 adds: see test_sm90_forms.py.
SM_90 = ("bulk", "wgmma")
SM_90_BASES = {"elect", "stmatrix", "setmaxnreg"}


def is_common(op):
    """Whether the form is one of those that sm_80 has too."""
    home = FORMS[op].__module__.rpartition(".")[2]
    return home not in SM_90 and op.partition(".")[0] not in SM_90_BASES


def test_every_form_is_tested():
    """Tests run all forms of their opcodes, so the opcodes are what can be forgotten."""
    modules = [importlib.import_module(f"tests.ptx_machine.test_{m}") for m in MODULES]
    tested = [base for module in modules for base in module.BASES]
    assert sorted(tested) == sorted({op.partition(".")[0] for op in FORMS if is_common(op)})


def forms(base):
    return [op for op in FORMS if op.partition(".")[0] == base and is_common(op)]


def test_patterns():
    assert list(expand("a[.b].{c,d}")) == ["a.c", "a.d", "a.b.c", "a.b.d"]
    assert list(expand("x[.{y,z}]")) == ["x", "x.y", "x.z"]
    with pytest.raises(ValueError, match=r"two translators for add\.f32"):
        form("add.f32")(lambda w: None)


def run(lines, shared=0, **options):
    """What ``%r1`` holds in the end; threads that left before keep 0."""
    sheet = Sheet(shared=shared)
    for line in lines:
        sheet.line(line)
    sheet.keep(("%r1", 32))
    return sheet.run(**options)[0][0]


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
        **options,
    )
    assert got == [2 * t + (1 if t % 2 == 0 else -1) for t in range(THREADS)]


@pytest.mark.parametrize("op", forms("ret") + forms("exit"))
def test_threads_leave(op):
    got = run(["mov.u32 %r1, 7;", "setp.lt.u32 %p1, %r0, 40;", f"@!%p1 {op};"])
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
    got = run([*lines, "$L_end:"])
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
@pytest.mark.parametrize("op", [op for op in forms("bar") + forms("barrier") if "warp" not in op])
def test_barriers(op, options):
    for arguments in ("0", "3", "0, 64"):
        got = run(exchange(f"{op} {arguments};"), shared=4 * THREADS, **options)
        assert got == [t ^ 32 for t in range(THREADS)]


@pytest.mark.parametrize(
    "line", ["bar.warp.sync -1;", "nanosleep.u32 20;", "prefetch.global.L1 [%rd0];"]
    + ["prefetch.global.L2 [%rd0];"] + [f"{op};" for op in forms("fence") + forms("membar")]
)  # fmt: skip
def test_what_is_no_barrier(line):
    """These order nothing between warps, and change no register."""
    assert run(["mov.u32 %r1, 5;", line]) == [5] * THREADS
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
    with pytest.raises(ExecutionError, match="some threads of a warp are at another barrier"):
        run([line.format("bar", "") for line in lines])
    with pytest.raises(ExecutionError, match="some threads of a warp are at another barrier"):
        run([line.format("barrier", ".aligned") for line in lines])
    assert run([line.format("barrier", "") for line in lines]) == [3] * THREADS


def test_a_barrier_with_two_counts_or_too_many_threads():
    lines = ["setp.lt.u32 %p1, %r0, 32;", "@%p1 bra $L__A;", "bar.sync 1, 96;", "$L__A:"]
    with pytest.raises(ExecutionError, match="barrier 1 with two counts"):
        run([*lines, "bar.sync 1, 64;"])
    with pytest.raises(ExecutionError, match="too many threads at barrier 1"):
        run(["bar.sync 1, 32;"])


def test_trap_and_endless_loops():
    with pytest.raises(ExecutionError, match=r"trap.*warp 1, lane 8"):
        run(["setp.eq.u32 %p1, %r0, 40;", "@%p1 trap;"])
    assert run(["setp.eq.u32 %p1, %r0, 99;", "@%p1 trap;", "mov.u32 %r1, 1;"]) == [1] * THREADS
    with pytest.raises(ExecutionError, match="without an end"):
        run(["$L__HERE:", "bra $L__HERE;"], max_steps=1000)


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
        ("    ret;", "    .callprototype x;", "callprototype"),
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
