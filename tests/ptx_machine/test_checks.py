"""Each check, provoked by a few lines of PTX: what is reported, and that right code is not."""

import re

import numpy as np
import pytest

from ptx_machine import MemcheckError, UnknownInstructionError
from tests.ptx_machine.sheet import THREADS, Sheet, execute

TEXT = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry small(
    .param .u64 x,
    .param .u64 y
)
.reqntid {threads}
{{
    .reg .pred %p<8>;
    .reg .b16 %h<8>;
    .reg .b32 %r<16>;
    .reg .b64 %rd<16>;
    ld.param.b64 %rd0, [x];
    ld.param.b64 %rd1, [y];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    shl.b32 %r2, %r0, 2;
    xor.b32 %r3, %r2, 128;
    mad.wide.u32 %rd2, %r0, 4, %rd0;
    mad.wide.u32 %rd3, %r0, 4, %rd1;
    .loc 1 7 5 // kernel.py:7:5
    {body}
    ret;
}}
"""
# In shared memory, [%r2] is a word of the thread, [%r3] that of the same thread of the other warp.
OWN = "st.shared.b32 [%r2], %r0;"
OTHERS = "ld.shared.b32 %r4, [%r3];"
BARRIER = "bar.sync 0;"


def run(*lines, grid=1, x=None, y=None, shared=4 * THREADS, **options):
    """The report of a kernel on two arrays of a word for each thread of each program."""
    x = np.arange(THREADS * grid, dtype=np.uint32) if x is None else x
    y = np.zeros(THREADS * grid, np.uint32) if y is None else y
    text = TEXT.format(threads=THREADS, body="\n    ".join(lines))
    report, _ = execute(text, [x, y], grid=(grid, 1, 1), shared=shared, **options)
    return report


def only_finding(report):
    """(kind, text) of the only finding."""
    (finding,) = report.findings
    return finding.kind, f"{finding.instruction} {finding.detail}"


# Shared memory


def test_reads_of_what_was_never_written():
    kind, text = only_finding(
        run(OWN, BARRIER, "ld.shared.b32 %r4, [%r2 + 4];", shared=8 * THREADS)
    )
    assert kind == "uninitialised"
    assert "kernel.py:7:5" in text and f"shared byte {4 * THREADS} never written" in text
    assert "program (0, 0, 0), warp 1" in text
    assert not run(OWN, BARRIER, OTHERS)


def test_unwritten_bytes_are_nan():
    y = np.zeros(THREADS, np.uint32)
    run("ld.shared.b32 %r4, [%r2];", "st.global.b32 [%rd3], %r4;", y=y)
    assert np.isnan(y.view(np.float32)).all()


@pytest.mark.parametrize("options", [{}, {"shuffle_warps": True}], ids=["in order", "shuffled"])
def test_races_in_shared_memory(options):
    """Found in any order of the warps, also where the numbers come out right."""
    report = run(OWN, BARRIER, OTHERS, "st.shared.b32 [%r2], 7;", **options)
    assert set(report.kinds()) == {"race"}
    assert "read, no barrier between" in str(report) or "wrote, no barrier between" in str(report)
    report = run(OWN, OTHERS, BARRIER, **options)
    assert set(report.kinds()) <= {"race", "uninitialised"} and report.kinds()
    report = run(OWN, BARRIER, OTHERS, BARRIER, "st.shared.b32 [%r3], 1;",
                 "st.shared.b32 [%r2], 2;", **options)  # fmt: skip
    assert set(report.kinds()) == {"race"} and "wrote, no barrier between" in str(report)
    assert not run(OWN, BARRIER, OTHERS, BARRIER, "st.shared.b32 [%r2], 7;", **options)


def test_no_race_within_a_warp_or_between_programs():
    assert not run(OWN, "xor.b32 %r3, %r2, 64;", OTHERS, OWN, grid=3)


def test_same_value_twice_is_a_note():
    report = run("st.shared.b32 [8], 5;", BARRIER, OWN)
    assert not report and report.notes == {"same value written twice by two warps": 32}
    kind, text = only_finding(run("st.shared.b32 [8], %r0;"))
    assert kind == "race" and "writes what warp" in text


CHANGE = "red.shared.add.u32 [8], %r0;"


@pytest.mark.parametrize(
    "lines, found",
    [
        ([OWN, BARRIER, CHANGE, BARRIER, "ld.shared.b32 %r4, [8];"], None),
        ([OWN, BARRIER, CHANGE, CHANGE], None),
        ([OWN, BARRIER, CHANGE, "ld.shared.b32 %r4, [8];"], "reads what warp . changed, no barr"),
        ([OWN, BARRIER, CHANGE, OWN], "overwrites what warp 1 changed, no barrier between"),
        ([OWN, BARRIER, "ld.shared.b32 %r4, [8];", CHANGE], "changes what warp . read, no barrier"),
        ([OWN, CHANGE], "changes what warp 0 wrote, no barrier between"),
        ([CHANGE], "shared byte 8 never written"),
    ],
)
def test_atomics_of_shared_memory_need_barriers_to_plain_accesses_only(lines, found):
    report = run(*lines)
    if found is None:
        assert not report, report
    else:
        _, text = only_finding(report)
        assert re.search(found, text) and "kernel.py:7:5" in text and "program (0, 0, 0)" in text


def test_a_barrier_of_some_warps_orders_these_only():
    """Warps 0 and 1 meet; warp 2 has not."""
    lines = [
        "setp.lt.u32 %p1, %r0, 64;", OWN,
        "@!%p1 bra $L__C;",
        "bar.sync 1, 64;",
        "$L__C:",
        "ld.shared.b32 %r4, [PLACE];",
    ]  # fmt: skip
    text = TEXT.format(threads=96, body="\n    ".join(lines))
    arrays = [np.zeros(96, np.uint32), np.zeros(96, np.uint32)]
    report, _ = execute(text.replace("PLACE", "%r2"), arrays, threads=96, shared=512)
    assert not report
    report, _ = execute(text.replace("PLACE", "4"), arrays, threads=96, shared=512)
    kind, found = only_finding(report)
    assert kind == "race" and "reads what warp 0 wrote" in found and "warp 2" in found


def test_a_barrier_of_some_warps_orders_only_what_was_before():
    lines = ["setp.ge.u32 %p1, %r0, 64;", "@%p1 ret;", OWN, "bar.sync 1, 64;", OWN, OTHERS]
    text = TEXT.format(threads=96, body="\n    ".join(lines))
    arrays = [np.zeros(96, np.uint32), np.zeros(96, np.uint32)]
    report, _ = execute(text, arrays, threads=96, shared=512)
    assert "race" in report.kinds()
    report, _ = execute(
        text.replace(f"{OWN}\n    {OTHERS}", OTHERS), arrays, threads=96, shared=512
    )
    assert not report


COPY = "cp.async.ca.shared.global [%r2], [%rd2], 4;"
COMMIT, WAIT = "cp.async.commit_group;", "cp.async.wait_group 0;"


PART = ["mov.u32 %r6, 8;", "shl.b32 %r5, %r0, 4;", "mul.wide.u32 %rd4, %r5, 1;",
        "add.s64 %rd4, %rd4, %rd0;", "setp.lt.u32 %p1, %r0, 4;"]  # fmt: skip


@pytest.mark.parametrize("part", ["", ", %r6"], ids=["whole", "part"])
def test_copies_are_aligned_to_their_size_also_if_less_is_read(part):
    copy = f"@%p1 cp.async.cg.shared.global [%r5], [%rd4], 16{part};"
    assert not run(*PART, copy, "cp.async.wait_all;")
    with pytest.raises(MemcheckError, match=r"byte 2 of a0 \(256 bytes\): not aligned.*lane 0"):
        run(*PART, "add.s64 %rd4, %rd4, 2;", copy)
    with pytest.raises(MemcheckError, match=r"byte 256 of a0 \(256 bytes\): .*warp 0, lane 3"):
        run(*PART, "add.s64 %rd4, %rd4, 208;", copy)


@pytest.mark.parametrize("part", ["", ", %r6"], ids=["whole", "part"])
@pytest.mark.parametrize("byte, races", [(0, True), (4, True), (6, True), (8, None), (16, False)])
def test_every_byte_that_a_copy_reads_is_followed(byte, races, part):
    """Program 0 stores 2 bytes; program 1 copies bytes 0 to 15 or 0 to 7, of thread 0's vector."""
    races = not part if races is None else races
    lines = [
        *PART, "setp.eq.u32 %p1, %r0, 0;", "setp.ne.u32 %p2, %r1, 0;", "@%p2 bra $L__C;",
        f"@%p1 st.global.b16 [%rd0 + {byte}], %h0;", "ret;", "$L__C:",
        f"@%p1 cp.async.cg.shared.global [%r5], [%rd4], 16{part};", "cp.async.wait_all;",
    ]  # fmt: skip
    for ctas in ([0, 1], [1, 0]):
        report = run(*lines, grid=2, ctas=lambda name, grid, ctas=ctas: ctas)
        assert bool(report) == races, report


@pytest.mark.parametrize("level, size", [("cg", 4), ("cg", 8), ("ca", 12), ("ca", 32), ("cg", 0)])
def test_copies_of_sizes_that_there_are_not(level, size):
    line = f"cp.async.{level}.shared.global [%r5], [%rd4], {size};"
    with pytest.raises(UnknownInstructionError, match="a size that there is not: cp"):
        run(*PART, line)


def test_copies_in_flight():
    right = [COPY, COMMIT, WAIT, BARRIER, OTHERS]
    assert not run(*right)
    for missing in (WAIT, COMMIT):
        report = run(*(line for line in right if line != missing))
        kind, text = only_finding(report)
        assert kind == "in flight" and "a cp.async of warp 1 that was not waited for" in text
    kind, text = only_finding(run(COPY, COMMIT, WAIT, OTHERS))
    assert kind == "race" and "reads what warp 1 wrote" in text
    kind, text = only_finding(run(COPY, COMMIT, OWN, WAIT))
    assert kind == "in flight" and "overwrites what" in text
    kind, _ = only_finding(
        run(COPY, COMMIT, COPY, COMMIT, "cp.async.wait_group 1;", "ld.shared.b32 %r4, [%r2];")
    )
    assert kind == "in flight"


def test_a_wait_leaves_the_newest_groups_in_flight():
    second = COPY.replace("[%r2]", "[%r2 + 256]")
    lines = [COPY, COMMIT, second, COMMIT, "cp.async.wait_group 1;", "ld.shared.b32 %r4, [%r2];"]
    assert not run(*lines, shared=512)
    kind, text = only_finding(run(*lines, "ld.shared.b32 %r5, [%r2 + 256];", shared=512))
    assert kind == "in flight" and "%r5" in text


def test_copies_go_with_their_threads():
    """Threads that part between the issue and the wait, and meet again."""
    lines = [COPY, COMMIT, "setp.lt.u32 %p1, %r0, 20;", "@%p1 bra $L__A;", "mov.u32 %r5, 1;"]
    y = np.zeros(THREADS, np.uint32)
    after = ["ld.shared.b32 %r4, [%r2];", "st.global.b32 [%rd3], %r4;"]
    assert not run(*lines, "$L__A:", WAIT, *after, y=y)
    assert y.tolist() == list(range(THREADS))
    alone = ["bra $L__B;", "$L__A:", WAIT, "$L__B:"]
    kind, _ = only_finding(run(*lines, *alone, *after))
    assert kind == "in flight"


def test_copies_read_at_the_issue():
    """What is written to the source afterwards does not arrive."""
    x, y = np.arange(THREADS, dtype=np.uint32), np.zeros(THREADS, np.uint32)
    run(COPY, COMMIT, "st.global.b32 [%rd2], 7;", WAIT, "ld.shared.b32 %r4, [%r2];",
        "st.global.b32 [%rd3], %r4;", x=x, y=y)  # fmt: skip
    assert (y == np.arange(THREADS)).all() and (x == 7).all()


# Global memory


def test_races_between_programs():
    kind, text = only_finding(run("mov.u32 %r4, %ctaid.x;", "st.global.b32 [%rd3], %r4;", grid=2))
    assert kind == "global race" and "writes what another program wrote in this launch" in text
    assert "byte 0 of a1 (512 bytes); program (0, 0, 0), warp 0, lane 0" in text
    kind, text = only_finding(run("ld.global.b32 %r4, [%rd3];", "add.u32 %r4, %r4, 1;",
                                  "setp.eq.u32 %p1, %r1, 1;", "@%p1 st.global.b32 [%rd3], %r4;",
                                  grid=2))  # fmt: skip
    assert kind == "global write after read"
    assert not run("ld.global.b32 %r4, [%rd2];", "red.global.add.u32 [%rd3], %r4;", grid=2)
    assert not run("mad.wide.u32 %rd4, %r1, 256, %rd3;", "st.global.b32 [%rd4], %r0;", grid=2)
    report = run("st.global.b32 [%rd3], 5;", grid=2)
    assert not report and report.notes == {"same global value written twice": 64}


def test_a_write_after_a_read_in_place_is_called_so():
    """Of a tensor that is passed twice; not of one beside it."""
    lines = ["ld.global.b32 %r4, [{}];", "setp.eq.u32 %p1, %r1, 1;"]
    lines += ["@%p1 st.global.b32 [%rd3], %r1;"]
    for x, read, kind in ((True, "%rd2", "global write after read, in place"),
                          (False, "%rd3", "global write after read")):  # fmt: skip
        y = np.zeros(2 * THREADS, np.uint32)
        report = run(*(line.format(read) for line in lines), grid=2, x=y if x else None, y=y)
        assert only_finding(report)[0] == kind


def test_races_between_warps_of_a_program():
    lines = ["mad.wide.u32 %rd4, %r3, 1, %rd1;", "st.global.b32 [%rd3], %r0;", "{}",
             "ld.global.b32 %r4, [%rd4];"]  # fmt: skip
    kind, text = only_finding(run(*(line.format("") for line in lines)))
    assert kind == "global race" and "reads what warp 1 wrote" in text
    assert not run(*(line.format(BARRIER) for line in lines))


@pytest.mark.parametrize("writer", [0, 1])
@pytest.mark.parametrize("apart", [False, True], ids=["at once", "apart"])
def test_a_write_after_a_read_by_another_warp(writer, apart):
    """Whichever of two warps read last; the barrier orders both reads before the write."""
    both = ["ld.global.b32 %r4, [%rd0];"]
    if apart:
        both = ["setp.lt.u32 %p1, %r0, 32;", "@%p1 " + both[0], "@!%p1 " + both[0]]
    write = [
        f"shr.u32 %r5, %r0, 5;setp.eq.u32 %p2, %r5, {writer};",
        "@%p2 st.global.b32 [%rd0], 7;",
    ]
    kind, text = only_finding(run(*both, *write))
    assert kind == "global write after read" and f"warp {1 - writer} read" in text
    assert not run(*both, BARRIER, *write)


def test_bytes_have_neighbours():
    """Stores of single bytes by two warps, side by side, are no race; on one byte they are."""
    lines = [
        "cvt.u16.u32 %h0, %r0;",
        "and.b32 %r5, %r0, 31;",
        "shr.u32 %r6, %r0, 5;",
        "mad.lo.u32 %r5, %r5, 2, %r6;",
        "mad.wide.u32 %rd4, %r5, 1, %rd1;",
    ]
    y = np.zeros(THREADS, np.uint32)
    assert not run(*lines, "st.global.b8 [%rd4], %h0;", y=y)
    assert sorted(y.view(np.uint8)[:64].tolist()) == list(range(64))
    kind, _ = only_finding(run(*lines, "and.b64 %rd4, %rd4, -2;", "st.global.b8 [%rd4], %h0;"))
    assert kind == "global race"


def test_checks_can_be_left_out():
    assert not run(OWN, OTHERS, BARRIER, check=False)
    assert not run("st.global.b32 [%rd3], %r1;", grid=2, check_global=False)


# Addresses


@pytest.mark.parametrize(
    "line, message",
    [
        ("ld.global.b32 %r4, [%rd2 + 4];", "4 bytes at byte 256 of a0 (256 bytes): outside; "
         "program (0, 0, 0), warp 1, lane 31"),
        ("ld.global.b32 %r4, [%rd0 + -4];", "4 bytes at byte -4 of a0 (256 bytes): outside; "
         "program (0, 0, 0), warp 0, lane 0"),
        ("ld.global.v2.b32 {%r4, %r5}, [%rd2];", "8 bytes at byte 4 of a0 (256 bytes): not "
         "aligned; program (0, 0, 0), warp 0, lane 1"),
        ("ld.global.b32 %r4, [%rd9];", "4 bytes at 0xffffffffffffffff, near no tensor; "),
        ("st.global.b16 [%rd3 + 254], %h0;", "2 bytes at byte 258 of a1 (256 bytes): outside; "),
        ("red.global.add.u32 [%rd2 + 2], %r0;", "4 bytes at byte 2 of a0 (256 bytes): not "),
        ("cp.async.ca.shared.global [%r2], [%rd2 + 4], 4;", "4 bytes at byte 256 of a0"),
        ("st.shared.b32 [%r2 + 4], %r0;", "4 bytes at byte 256 of shared memory (256 bytes): "
         "outside; program (0, 0, 0), warp 1, lane 31"),
        ("ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r2];", "16 bytes at byte 4 of shared memory "
         "(256 bytes): not aligned; program (0, 0, 0), warp 0, lane 1"),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 %r4, [%r2];", "16 bytes at byte 4 of shared"),
        ("cp.async.ca.shared.global [%r2 + 2], [%rd2], 4;", "4 bytes at byte 2 of shared memory"),
    ],
)  # fmt: skip
def test_addresses_outside_or_misaligned(line, message):
    """Named: the kernel, the instruction, its source line, the tensor and byte, and the thread."""
    arrays = np.zeros((2, THREADS + 4), np.uint32)[:, :THREADS]
    aligned = [a[-a.ctypes.data // 4 % 4 :][:THREADS] for a in arrays]
    arrays = [np.zeros(THREADS * 4, np.uint8).view(np.uint32) for _ in aligned]
    with pytest.raises(MemcheckError) as error:
        run(line, x=arrays[0], y=arrays[1])
    text = str(error.value)
    assert text.startswith(f"small: {line.rstrip(';')}   [kernel.py:7:5, PTX line ")
    assert message in text


def test_threads_that_take_no_part_touch_nothing():
    """A predicate keeps the last thread from reading past the end."""
    assert not run("setp.ne.u32 %p1, %r0, 63;", "@%p1 ld.global.b32 %r4, [%rd2 + 4];",
                   "setp.ge.u32 %p2, %r0, 99;", "@%p2 st.shared.b32 [%r2 + 4], %r0;",
                   "@%p2 cp.async.ca.shared.global [%r2], [%rd9], 4;")  # fmt: skip


def test_one_instruction_on_several_tensors():
    """Threads of one load may read different tensors, as after a select of pointers."""
    y = np.arange(100, 100 + THREADS, dtype=np.uint32)
    x = np.arange(THREADS, dtype=np.uint32)
    sheet = Sheet(x, y)
    for line in (
        "and.b32 %r1, %r0, 1;",
        "setp.eq.u32 %p1, %r1, 1;",
        "selp.b64 %rd5, %rd4, %rd3, %p1;",
        "mad.wide.u32 %rd5, %r0, 4, %rd5;",
        "ld.global.b32 %r1, [%rd5];",
        "add.u32 %r2, %r1, 1;",
        "st.global.b32 [%rd5], %r2;",
    ):
        sheet.line(line)
    sheet.keep(("%r1", 32))
    (got,) = sheet.run()[0]
    assert got == [t + 100 * (t % 2) for t in range(THREADS)]
    assert x.tolist() == [t + (t % 2 == 0) for t in range(THREADS)]
    assert y.tolist() == [100 + t + (t % 2) for t in range(THREADS)]


def test_what_is_reported_once_is_counted():
    report = run(OWN, OTHERS, BARRIER, grid=3)
    assert len(report.findings) == len(report.kinds()) == 1
    assert "race x" in str(report) or "uninitialised x" in str(report)
    report.clear()
    assert not report and not report.notes and str(report) == ""
