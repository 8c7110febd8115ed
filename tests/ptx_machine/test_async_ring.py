"""A ring of buffers between a warp that loads by TMA and a warpgroup that multiplies."""

import numpy as np
import pytest

from ptx_machine import ExecutionError
from tests.ptx_machine.handmade import (
    COMMIT,
    MMA,
    SETUP,
    WAIT,
    Global,
    edit,
    kinds,
    registers_out,
    run,
)

RING = f"""
    {SETUP}
    mov.b64 %rd2, arg_0;
    cvta.param.u64 %rd2, %rd2;
    mov.u32 %r3, 0;
    mov.u32 %r9, 0;
    setp.eq.u32 %p1, %r0, 128;
    @%p1 mbarrier.init.shared::cta.b64 [8192], 1;
    @%p1 mbarrier.init.shared::cta.b64 [8200], 1;
    @%p1 mbarrier.init.shared::cta.b64 [8208], 128;
    @%p1 mbarrier.init.shared::cta.b64 [8216], 128;
    bar.sync 0;
    setp.ge.u32 %p2, %r0, 128;
    @%p2 bra $produce;
$consume:
    and.b32 %r10, %r9, 1;
    shl.b32 %r11, %r10, 3;
    bfe.u32 %r12, %r9, 1, 1;
    add.u32 %r13, %r11, 8192;
    add.u32 %r14, %r11, 8208;
    shl.b32 %r15, %r10, 8;
    cvt.u64.u32 %rd5, %r15;
    add.s64 %rd6, %rd0, %rd5;
    add.s64 %rd7, %rd1, %rd5;
    mbarrier.try_wait.parity.shared.b64 %p3, [%r13], %r12;
    wgmma.fence.sync.aligned;
    {MMA.replace("%rd0", "%rd6").replace("%rd1", "%rd7")}
    {COMMIT}
    {WAIT}
    mbarrier.arrive.shared::cta.b64 _, [%r14];
    add.u32 %r9, %r9, 1;
    setp.lt.u32 %p4, %r9, 5;
    @%p4 bra $consume;
    {registers_out(["%f0", "%f1", "%f2", "%f3"], 1)}
    bra $end;
$produce:
    setp.ne.u32 %p5, %r0, 128;
    @%p5 bra $end;
$next:
    and.b32 %r10, %r9, 1;
    shl.b32 %r11, %r10, 3;
    bfe.u32 %r12, %r9, 1, 1;
    xor.b32 %r12, %r12, 1;
    add.u32 %r13, %r11, 8192;
    add.u32 %r14, %r11, 8208;
    mbarrier.try_wait.parity.shared.b64 %p3, [%r14], %r12;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r13], 2560;
    shl.b32 %r15, %r10, 12;
    mul.lo.u32 %r16, %r9, 80;
    cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes
        [%r15], [%rd2, {{%r3, %r16}}], [%r13];
    add.u32 %r9, %r9, 1;
    setp.lt.u32 %p4, %r9, 5;
    @%p4 bra $next;
$end:"""


def ring(body, **options):
    """(results, report): five tiles, of ones, twos, ..., go through the ring."""
    values = np.repeat(np.arange(1, 6, dtype=np.float32), 1280).view(np.uint32) >> 16
    tiles = values.astype(np.uint16).reshape(400, 16)
    out = np.zeros((128, 4), np.float32)
    memory = Global(tiles, out)
    arguments = [memory.map(tiles, [80, 16], mode=1, element=9), out]
    return out, run(body, arguments, memory=memory, threads=160, shared=8448, **options)


@pytest.mark.parametrize("options", [{}, *({"shuffle_warps": True, "seed": s} for s in range(4))])
def test_a_ring_of_buffers(options):
    out, report = ring(RING, **options)
    assert not report and not report.notes, report
    assert (out == 16 * (1 + 4 + 9 + 16 + 25)).all()


FREE = "mbarrier.try_wait.parity.shared.b64 %p3, [%r14], %r12;"
FULL = "mbarrier.try_wait.parity.shared.b64 %p3, [%r13], %r12;"
ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [%r14];"


@pytest.mark.parametrize(
    "old, new, found",
    [
        # The loader does not wait for the buffer, or is told too early that it is free.
        (FREE, "", "1 arrive, 0 are pending in a phase that nobody knows to be over"),
        (f"{WAIT}\n    {ARRIVE}", f"{ARRIVE} {WAIT}", {"in flight"}),
        (f"{WAIT}\n    {ARRIVE}", f"{WAIT.replace('0', '1')} {ARRIVE} {WAIT}", {"in flight"}),
        # One thread arrives for all: the other warps may still wait for their products.
        (ARRIVE, f"@%p6 {ARRIVE}", {"in flight"}),
        (ARRIVE, f"bar.sync 1, 128; @%p6 {ARRIVE}", set()),
        (FULL, "", "deadlock|1 arrive, 0 are pending"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"shuffle_warps": True, "seed": 1}], ids=str)
def test_edits_of_the_ring(old, new, found, options):
    body = edit(RING, old, new)
    if "%p6" in new:
        body = body.replace("8208], 128", "8208], 1").replace("8216], 128", "8216], 1")
        body = edit(body, SETUP, f"{SETUP} setp.eq.u32 %p6, %r0, 0;")
    if isinstance(found, str):
        with pytest.raises(ExecutionError, match=found):
            ring(body, **options)
        return
    report = ring(body, **options)[1]
    assert kinds(report) == found, report
