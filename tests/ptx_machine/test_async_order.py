"""The order of the async proxy: correct programs are clean, and each edit of them is reported.

What is right and wrong here follows from the PTX ISA's sections on the async proxy, on mbarriers
and on the groups of wgmma and of bulk copies.
"""

import re

import numpy as np
import pytest

from ptx_machine import ExecutionError
from ptx_machine.proxies import CP_ASYNC_NOTE
from ptx_machine.wgmma import COPY_NOTE, READ_NOTE
from tests.ptx_machine.handmade import (
    COMMIT,
    FENCE,
    MMA,
    SETUP,
    WAIT,
    Global,
    edit,
    fill,
    kinds,
    registers_out,
    run,
)


def ones(count=1280):
    """bf16 operands of which every product is the number 16."""
    return np.full(count, 0x3F80, np.uint16)


# Operands by ordinary stores

STORED = f"""
    {SETUP}
    {fill(2560)}
    {FENCE}
    bar.sync 0;
    wgmma.fence.sync.aligned;
    {MMA}
    {COMMIT}
    {WAIT}
    {registers_out(["%f0", "%f1", "%f2", "%f3"], 1)}"""


def stored(body, **options):
    """(results, report) of a program on stored operands."""
    out = np.zeros((128, 4), np.float32)
    return out, run(body, [ones(), out], **options)


def test_a_product_that_is_fenced_ordered_and_waited_for():
    out, report = stored(STORED)
    assert not report and not report.notes, report
    assert (out == 16).all()


def test_results_are_not_there_before_their_wait():
    out, report = stored(edit(STORED, WAIT))
    assert kinds(report) == {"accumulator read before its wait"}
    assert "%f0, %f1" not in str(report) and "f0" in str(report)
    assert (out == 0).all(), "what the registers held before"


def test_a_wait_one_group_short():
    out, report = stored(edit(STORED, WAIT, "wgmma.wait_group.sync.aligned 1;"))
    assert kinds(report) == {"accumulator read before its wait"}
    assert (out == 0).all()


def test_a_product_without_a_commit_is_never_waited_for():
    out, report = stored(edit(STORED, COMMIT))
    assert kinds(report) == {"accumulator read before its wait"}
    assert (out == 0).all()


def test_only_the_groups_before_the_newest_are_over():
    """Two accumulators in two groups, and a wait that leaves one of them."""
    second = MMA.replace("%f0,%f1,%f2,%f3", "%f4,%f5,%f6,%f7").replace("%p0", "0")
    body = edit(STORED, WAIT, f"{second} {COMMIT} wgmma.wait_group.sync.aligned 1;")
    out, report = stored(body)
    assert not report, report
    assert (out == 16).all()
    late = edit(body, registers_out(["%f0", "%f1", "%f2", "%f3"], 1),
                registers_out(["%f0", "%f1", "%f2", "%f4"], 1))  # fmt: skip
    assert kinds(stored(late)[1]) == {"accumulator read before its wait"}


def test_products_on_one_accumulator_need_no_wait_between():
    out, report = stored(edit(STORED, MMA, MMA + COMMIT + MMA))
    assert not report, report
    assert (out == 32).all()


def test_accumulators_in_flight_share_all_registers_or_none():
    second = MMA.replace("%f0,%f1,%f2,%f3", "%f2,%f3,%f4,%f5").replace("%p0", "0")
    report = stored(edit(STORED, MMA, MMA + second))[1]
    assert kinds(report) == {"accumulators overlap"}
    assert re.search(r"f2\w*, \w*f3\w* of wgmma.* warp 0, lane 0", str(report), re.S), report
    turned = second.replace("%f2,%f3,%f4,%f5", "%f3,%f2,%f1,%f0")
    assert "accumulators overlap" in kinds(stored(edit(STORED, MMA, MMA + turned))[1])
    apart = f"{MMA} {COMMIT} {WAIT} wgmma.fence.sync.aligned; {second}"
    assert not stored(edit(STORED, MMA, apart))[1]


def test_a_wait_on_one_path_only():
    """The wait is skipped by warps that take the other way: seen where it happens."""
    body = edit(STORED, WAIT, f"setp.eq.u32 %p2, %r1, 3;\n@%p2 bra $skip;\n{WAIT}\n$skip:")
    out, report = stored(body)
    assert kinds(report) == {"accumulator read before its wait"}
    assert (out[:96] == 16).all() and (out[96:] == 0).all()
    assert "warp 3" in str(report)


def test_registers_written_under_a_product():
    body = edit(STORED, WAIT, "mov.b32 %f3, 0f3F800000;" + WAIT)
    assert kinds(stored(body)[1]) == {"accumulator written before its wait"}
    registers = MMA.replace("%rd0", "{%r4,%r5,%r6,%r7}").replace("1, 1, 0, 0", "1, 1, 0")
    zeros = "mov.u32 %r4, 0; mov.u32 %r5, 0; mov.u32 %r6, 0; mov.u32 %r7, 0;"
    right = edit(edit(STORED, MMA, registers), SETUP, SETUP + zeros)
    assert not stored(right)[1]
    report = stored(edit(right, COMMIT, COMMIT + "add.u32 %r8, %r6, 1;"))[1]
    assert not report and set(report.notes) == {READ_NOTE}
    body = edit(right, COMMIT, COMMIT + "mov.u32 %r6, 1;")
    assert kinds(stored(body)[1]) == {"operand written before its wait"}


def test_registers_written_without_a_fence_of_wgmma():
    written = "add.f32 %f2, %f1, 0f3F800000;"
    right = edit(STORED, "wgmma.fence.sync.aligned;", written + "wgmma.fence.sync.aligned;")
    assert not stored(right)[1]
    body = edit(STORED, MMA, written + MMA)
    assert kinds(stored(body)[1]) == {"no wgmma.fence"}
    assert not stored(edit(body, "%p0, 1, 1", "0, 1, 1"))[1], "D is not read"
    body = edit(STORED, "wgmma.fence.sync.aligned;")
    assert kinds(stored(body)[1]) == {"no wgmma.fence"}
    report = stored(edit(STORED, MMA, "mov.b32 %f2, %f1;" + MMA))[1]
    assert not report and set(report.notes) == {COPY_NOTE}


@pytest.mark.parametrize(
    "old, new, found",
    [
        (FENCE, "", {"no proxy fence"}),
        (f"{FENCE}\n    bar.sync 0;", f"bar.sync 0;\n    {FENCE}", set()),
        (f"{FENCE}\n    bar.sync 0;", FENCE, {"race"}),
        (FENCE, f"bar.sync 0;\n{FENCE}", set()),
        # Of another warp, which does not know of the stores; and before them.
        (FENCE, f"setp.eq.u32 %p2, %r1, 1;\n@%p2 {FENCE}", {"no proxy fence"}),
        (fill(2560), FENCE + fill(2560), set()),
        (fill(2560) + f"\n    {FENCE}", FENCE + fill(2560), {"no proxy fence"}),
        (FENCE, "fence.proxy.async;", set()),
        (FENCE, "fence.proxy.async.shared::cluster;", set()),
        (FENCE, "fence.proxy.async.global;", {"no proxy fence"}),
        (FENCE, "fence.acq_rel.cta;", {"no proxy fence"}),
    ],
)
def test_a_proxy_fence_between_the_stores_and_the_product(old, new, found):
    report = stored(edit(STORED, old, new))[1]
    assert kinds(report) == found, report
    assert not report.notes


ONE_LANE = "and.b32 %r5, %r0, 31; setp.eq.u32 %p2, %r5, 0;"


@pytest.mark.parametrize(
    "new, found",
    [
        # Only one lane's own stores are fenced, whatever comes after.
        (f"{ONE_LANE} @%p2 {FENCE} bar.sync 0;", {"no proxy fence"}),
        (f"{ONE_LANE} @%p2 {FENCE} @!%p2 {FENCE} bar.sync 0;", {"no proxy fence"}),
        # What was ordered before its fence is.
        (f"{ONE_LANE} bar.sync 0; @%p2 {FENCE}", set()),
        (f"{ONE_LANE} bar.warp.sync -1; @%p2 {FENCE} bar.sync 0;", set()),
        (f"{ONE_LANE} bar.warp.sync -1; st.shared.b32 [%r391], %r392; @%p2 {FENCE} bar.sync 0;",
         {"no proxy fence"}),
    ],
)  # fmt: skip
def test_a_proxy_fence_by_one_lane(new, found):
    report = stored(edit(STORED, f"{FENCE}\n    bar.sync 0;", new))[1]
    assert kinds(report) == found, report


def cp_async(nbytes):
    """Like fill, by cp.async."""
    lines = [line for line in fill(nbytes).splitlines() if "st.shared" not in line]
    copies = [
        line.replace("ld.global.v4.b32 {%r392, %r393, %r394, %r395}, ",
                     f"cp.async.cg.shared.global [%r391 + {2048 * k}], ").replace(";", ", 16;")
        for k, line in enumerate(line for line in lines if "ld.global" in line)
    ]  # fmt: skip
    lines = [line for line in lines if "ld.global" not in line]
    # The guard of the last copy has been set before any of them.
    return "\n".join([*lines, *copies, "cp.async.commit_group;", "cp.async.wait_group 0;"])


def test_cp_async_without_a_fence_is_a_note_and_nothing_else_is():
    body = edit(STORED, fill(2560), cp_async(2560))
    assert not stored(body)[1].notes
    out, report = stored(edit(body, FENCE))
    assert not report and set(report.notes) == {CP_ASYNC_NOTE}
    assert (out == 16).all()
    overwritten = edit(body, FENCE, "@%p1 st.shared.b32 [%r0 + 64], %r0;")
    _, report = stored(overwritten)
    assert kinds(report) == {"no proxy fence"} and set(report.notes) == {CP_ASYNC_NOTE}
    assert kinds(stored(edit(body, "cp.async.wait_group 0;"))[1]) == {"in flight"}
    assert kinds(stored(edit(body, f"{FENCE}\n    bar.sync 0;", FENCE))[1]) == {"race"}


def test_the_note_is_for_products_only():
    """A bulk store of what cp.async wrote, without a fence, is a finding."""
    source, target = np.ones((128, 4), np.float32), np.zeros((128, 4), np.float32)
    memory = Global(source, target)
    body = f"""
        {cp_async(2048)}
        mov.b64 %rd2, arg_1;
        cvta.param.u64 %rd2, %rd2;
        mov.u32 %r0, %tid.x;
        setp.eq.u32 %p1, %r0, 0;
        mov.u32 %r1, 0;
        {FENCE}
        bar.sync 0;
        @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd2, {{%r1, %r1}}], [%r1];
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;"""
    arguments = [source, memory.map(target, [128, 4])]
    assert not run(body, arguments, memory=memory)
    assert np.array_equal(target, source)
    report = run(edit(body, FENCE), arguments, memory=memory)
    assert kinds(report) == {"no proxy fence"} and not report.notes


@pytest.mark.parametrize(
    "after, found",
    [
        ("st.shared.b32 [%r0 + 1024], %r0;", {"in flight"}),
        (WAIT + "bar.sync 0; @%p1 st.shared.b32 [%r0 + 1024], %r0;", set()),
        # This warp has waited, the others may not have.
        (WAIT + "@%p1 st.shared.b32 [%r0 + 1024], %r0;", {"in flight"}),
        ("bar.sync 0; @%p1 st.shared.b32 [%r0 + 1024], %r0;", {"in flight"}),
        ("@%p1 st.shared.b32 [%r0 + 3072], %r0;", set()),
        ("@%p1 ld.shared.b32 %r9, [%r0 + 1024];", set()),
    ],
)
def test_operands_overwritten_under_a_product(after, found):
    body = edit(STORED, COMMIT, f"{COMMIT} shl.b32 %r0, %r0, 2; {after}")
    report = stored(body)[1]
    assert kinds(report) == found, report
    if found:
        assert "a product of warpgroup 0 that was not waited for may still read" in str(report)


# Operands by TMA, results by TMA

LOAD = """@%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r2], [%rd2, {%r3, %r3}], [%r4];"""
STORE = "@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd4, {%r3, %r3}], [%r6];"
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r4], 2304;"
TRY = "mbarrier.try_wait.parity.shared.b64 %p3, [%r4], %r3;"
BULK_WAIT = "cp.async.bulk.wait_group.read 0;"
STORE_D = "st.shared.v4.b32 [%r7], {%f0, %f1, %f2, %f3};"
COPIED = f"""
    {SETUP}
    mov.b64 %rd2, arg_0;
    cvta.param.u64 %rd2, %rd2;
    mov.b64 %rd3, arg_1;
    cvta.param.u64 %rd3, %rd3;
    mov.b64 %rd4, arg_2;
    cvta.param.u64 %rd4, %rd4;
    mov.u32 %r2, 0;
    mov.u32 %r3, 0;
    mov.u32 %r4, 3072;
    mov.u32 %r5, 2048;
    mov.u32 %r6, 4096;
    shl.b32 %r7, %r0, 4;
    add.u32 %r7, %r7, 4096;
    @%p1 mbarrier.init.shared::cta.b64 [%r4], 1;
    bar.sync 0;
    {EXPECT}
    {LOAD}
    {LOAD.replace("%rd2", "%rd3").replace("[%r2]", "[%r5]")}
    {TRY}
    wgmma.fence.sync.aligned;
    {MMA}
    {COMMIT}
    {WAIT}
    {STORE_D}
    {FENCE}
    bar.sync 0;
    {STORE}
    cp.async.bulk.commit_group;
    {BULK_WAIT}
    bar.sync 0;"""


def copied(body, **options):
    """(results, report) of a program that loads and stores by TMA."""
    a, b = ones(1024).reshape(64, 16), ones(128).reshape(8, 16)
    out = np.zeros((128, 4), np.float32)
    memory = Global(a, b, out)
    maps = [memory.map(x, [len(x), 16], mode=1, element=9) for x in (a, b)]
    maps.append(memory.map(out, [128, 4]))
    return out, run(body, maps, memory=memory, shared=8192, **options)


@pytest.mark.parametrize("options", [{}, *({"shuffle_warps": True, "seed": s} for s in range(4))])
def test_loads_a_product_and_a_store_by_tma(options):
    out, report = copied(COPIED, **options)
    assert not report and not report.notes, report
    assert (out == 16).all()


def test_boxes_are_not_there_before_their_mbarrier_is_waited_for():
    out, report = copied(edit(COPIED, TRY))
    assert kinds(report) == {"in flight", "bulk load never waited for"}
    assert "a bulk load writes, the phase of its mbarrier at 3072 not waited for" in str(report)
    assert np.isnan(out).all(), "what shared memory held before"


def test_a_wait_by_one_warp_counts_for_those_who_meet_it():
    alone = f"setp.eq.u32 %p4, %r1, 2; @%p4 {TRY}"
    assert not copied(edit(COPIED, TRY, f"{alone} bar.sync 0;"))[1]
    assert kinds(copied(edit(COPIED, TRY, alone))[1]) == {"in flight"}


@pytest.mark.parametrize(
    "old, new, found",
    [
        (FENCE, "", {"no proxy fence"}),
        (f"{FENCE}\n    bar.sync 0;", FENCE, {"race"}),
        (STORE_D, f"{STORE_D} bar.sync 0;", set()),
        # The bytes that a store reads are written again.
        (BULK_WAIT, "", {"bulk store never waited for"}),
        (BULK_WAIT, STORE_D + BULK_WAIT, {"in flight"}),
        (BULK_WAIT, BULK_WAIT + STORE_D, {"in flight"}),
        (BULK_WAIT, BULK_WAIT + "bar.sync 0;" + STORE_D, set()),
        (BULK_WAIT, "cp.async.bulk.wait_group.read 1; bar.sync 0;" + STORE_D + BULK_WAIT,
         {"in flight"}),
        # A load into operands under the product, and after it.
        (WAIT, f"{LOAD} {WAIT}", {"in flight", "bulk load never waited for"}),
        (WAIT, f"{WAIT} {LOAD}", {"in flight", "bulk load never waited for"}),
        (WAIT, f"{WAIT} bar.sync 0; {LOAD}", {"bulk load never waited for"}),
        # Ordinary accesses to a box on its way.
        (TRY, f"ld.shared.b32 %r9, [%r2]; {TRY}", {"in flight"}),
        (TRY, f"@%p1 st.shared.b32 [%r2 + 64], %r9; {TRY}", {"in flight", "race"}),
        (TRY, f"{TRY} ld.shared.b32 %r9, [%r2];", set()),
        (TRY, f"{TRY} ld.shared.b32 %r9, [%r2]; {LOAD}",
         {"race", "in flight", "bulk load never waited for"}),
        # The mbarrier itself.
        ("1;\n    bar.sync 0;\n    @%p1 mbarrier.arrive", "1;\n    @%p1 mbarrier.arrive", {"race"}),
        (BULK_WAIT, BULK_WAIT + "@%p1 mbarrier.inval.shared::cta.b64 [%r4];", set()),
        (WAIT, "setp.eq.u32 %p5, %r1, 1; @%p5 mbarrier.inval.shared::cta.b64 [%r4];" + WAIT, None),
    ],
)  # fmt: skip
def test_edits_of_the_program_by_tma(old, new, found):
    if found is None:  # 32 threads end the same mbarrier
        with pytest.raises(ExecutionError, match="mbarrier at 0xc00: there is none"):
            copied(edit(COPIED, old, new))
        return
    report = copied(edit(COPIED, old, new))[1]
    assert kinds(report) == found, report


def test_stores_are_not_there_before_they_are_waited_for():
    """The bytes are read at the wait, so what is written meanwhile is what arrives."""
    later = "mov.b32 %f0, 0f40000000; " + STORE_D
    out, report = copied(edit(COPIED, BULK_WAIT, later + BULK_WAIT))
    assert kinds(report) == {"in flight"}
    assert (out[:, 0] == 2).all() and (out[:, 1:] == 16).all()


def test_a_wait_for_reading_says_nothing_of_what_is_written():
    """The target is as before until the wait without .read, or the end."""
    seen = np.full(128, 7, np.float32)
    look = """ld.param.b64 %rd8, [arg_2]; mul.wide.u32 %rd9, %r0, 4; add.s64 %rd8, %rd8, %rd9;
        ld.param.b64 %rd7, [arg_3]; add.s64 %rd7, %rd7, %rd9;
        setp.lt.u32 %p7, %r0, 32;  @%p7 ld.global.b32 %r20, [%rd8]; @%p7 st.global.b32 [%rd7], %r20;
        {wait} @%p7 ld.global.b32 %r20, [%rd8]; @%p7 st.global.b32 [%rd7 + 128], %r20;"""
    source, target = np.ones((8, 16), np.float32), np.zeros((8, 16), np.float32)
    memory = Global(source, target, seen)
    for wait, after in ((BULK_WAIT, 0), (BULK_WAIT.replace(".read", ""), 1)):
        target[:] = 0
        body = f"""
            {SETUP} {fill(512)} {FENCE} bar.sync 0;
            mov.b64 %rd4, arg_1; cvta.param.u64 %rd4, %rd4; mov.u32 %r3, 0; mov.u32 %r6, 0;
            {STORE} cp.async.bulk.commit_group; {BULK_WAIT} bar.sync 0;
            st.shared.v4.b32 [%r391], {{%r3, %r3, %r3, %r3}};
            {look.format(wait=wait)}"""
        report = run(body, [source, memory.map(target, [8, 16]), target, seen], memory=memory)
        assert not report, report
        assert (seen[:32] == 0).all() and (seen[32:64] == after).all()
        assert (target == 1).all(), "written in the end, of what was read then"


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("2304;", "2320;", "parity 0, 0 arrivals and 16 bytes pending"),
        (EXPECT, "", "parity 0, 1 arrivals and -2304 bytes pending"),
        (LOAD, "", "parity 0, 0 arrivals and 2048 bytes pending"),
        ("[%r4], 1;", "[%r4], 2;", "parity 0, 1 arrivals and 0 bytes pending"),
        (TRY, f"{TRY} mov.u32 %r3, 1; {TRY}", "parity 1, 1 arrivals and 0 bytes pending"),
    ],
)
def test_what_never_completes_is_a_deadlock_that_names_its_mbarrier(old, new, message):
    with pytest.raises(ExecutionError, match="deadlock: 128 threads") as raised:
        copied(edit(COPIED, old, new))
    assert f"the mbarrier at 0xc00 is in a phase of {message}" in str(raised.value)


def test_a_phase_that_ends_before_all_its_bytes_are_there():
    """Too few bytes are expected: the phase is over when the first box has landed."""
    out, report = copied(edit(COPIED, "2304;", "2048;"))
    assert kinds(report) == {"in flight", "bulk load never waited for"}
    assert np.isnan(out).all()
