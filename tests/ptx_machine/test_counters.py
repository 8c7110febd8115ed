"""Sectors, bank conflicts and turns of loops that are known by hand."""

import numpy as np
import pytest

from ptx_machine import Options, Report
from ptx_machine.counters import LaunchCounts
from ptx_machine.global_memory import GlobalMemory
from ptx_machine.loops import Order
from ptx_machine.machine import Machine
from ptx_machine.parse import parse
from ptx_machine.translate import Program
from tests.ptx_machine.handmade import text

LANE = np.arange(32)


@pytest.fixture
def counts():
    return LaunchCounts(parse(text("")), threads=128, grid=(1, 1, 1))


@pytest.mark.parametrize(
    ("address", "width", "wavefronts", "phases"),
    [
        pytest.param(LANE * 4, 4, 1, 1, id="a row"),
        pytest.param(LANE * 128, 4, 32, 1, id="a column of 32 x 32 floats"),
        pytest.param(LANE * 132, 4, 1, 1, id="the same, padded"),
        pytest.param(LANE * 0, 4, 1, 1, id="one word for all"),
        pytest.param(LANE * 2, 2, 1, 1, id="two halves of a word"),
        pytest.param(LANE * 8, 8, 2, 2, id="8 bytes in a row"),
        pytest.param(LANE * 16, 16, 4, 4, id="16 bytes in a row"),
        pytest.param(LANE * 128, 16, 32, 4, id="16 bytes in rows of 128"),
        pytest.param(LANE * 144, 16, 4, 4, id="16 bytes in rows of 144"),
        pytest.param(np.arange(0, 128, 8), 4, 1, 1, id="half of the lanes"),
    ],
)
def test_wavefronts(counts, address, width, wavefronts, phases):
    instruction = counts.kernel.instructions[0]
    counts.shared_access(instruction, np.arange(len(address)), address, width)
    assert counts.wavefronts() == (wavefronts, phases)
    assert counts.worst_conflict() == wavefronts / phases


@pytest.mark.parametrize(("swizzled", "wavefronts"), [(False, 32), (True, 4)])
def test_wavefronts_of_ldmatrix(counts, swizzled, wavefronts):
    address = LANE * 128 + swizzled * 16 * (LANE % 8)
    counts.matrix_access(counts.kernel.instructions[0], LANE * 0, address)
    assert counts.wavefronts() == (wavefronts, 4)


@pytest.mark.parametrize(
    ("address", "width", "sectors", "asked"),
    [
        pytest.param(LANE * 4, 4, 4, 128, id="a row"),
        pytest.param(LANE * 4 + 4, 4, 5, 128, id="a row, not aligned"),
        pytest.param(LANE * 32, 4, 32, 128, id="a column"),
        pytest.param(LANE * 16, 16, 16, 512, id="vectors"),
        pytest.param(LANE * 0, 4, 1, 4, id="one word for all"),
        pytest.param(LANE * 14 // 7 * 7, 2, 14, 64, id="half a row of patches of 7"),
    ],
)
def test_sectors(counts, address, width, sectors, asked):
    """Each of two warps pays; what the launch touches counts once."""
    base = 0x7F00_0000_0000
    instruction = counts.kernel.instructions[0]
    for warp in range(2):
        counts.global_access(instruction, LANE * 0 + warp, base + address, width, store=False)
    traffic = counts.traffic()
    assert traffic["load"] == 2 * 32 * sectors
    assert traffic["load asked"] == 2 * asked
    assert traffic["load distinct"] == 32 * sectors
    assert traffic["store"] == traffic["store asked"] == 0


NESTED = """
    mov.u32 %r0, %tid.x;
    and.b32 %r1, %r0, 3;
    mov.u32 %r2, 0;
$L__OUTER:
    mov.u32 %r3, 0;
$L__INNER:
    add.u32 %r4, %r0, %r3;
    and.b32 %r4, %r4, 1;
    setp.ne.u32 %p1, %r4, 0;
    @%p1 bra $L__ASIDE;
$L__BOTH:
    add.u32 %r3, %r3, 1;
    setp.le.u32 %p2, %r3, %r1;
    @%p2 bra $L__INNER;
    setp.gt.u32 %p3, %r1, %r2;
    @%p3 bra $L__NEXT;
    add.u32 %r6, %r6, 1;
$L__NEXT:
    add.u32 %r2, %r2, 1;
    setp.lt.u32 %p4, %r2, 5;
    @%p4 bra $L__OUTER;
    bra $L__OUT;
$L__ASIDE:
    add.u32 %r5, %r5, 1;
    bra $L__BOTH;
$L__OUT:
"""


def test_threads_that_part_in_a_loop_are_together_in_its_next_turn():
    """A warp pays once for the longest of four inner loops; in its last turn none steps aside."""
    program = Program(parse(text(NESTED)))
    counts = LaunchCounts(program.kernel, threads=128, grid=(1, 1, 1))
    machine = Machine(
        program, (1, 1, 1), 128, 0, [], GlobalMemory(True), Report(), Options(), counts
    )
    machine.run()
    assert [runs / 4 for runs in counts.runs] == [1, 5, 20, 20, 5, 5, 5, 1, 15, 1]


def test_loops_and_places():
    """Blocks 1 to 4 are a loop around that of 2 and 3; 5 jumps to itself; 7 stands aside."""
    order = Order([[1], [2], [7, 3], [2, 4], [1, 5], [5, 6], [], [3]])
    assert order.rank == [0, 1, 2, 4, 5, 6, 7, 3]
    assert order.around == [(), (1,), (1, 2), (1, 2), (1,), (6,), (), (1, 2)]
    place, places = (), []
    for block in (0, 1, 2, 3, 2, 7, 3, 4, 1, 2, 3, 4, 5, 5, 6):
        place = order.moved(place, block)
        places.append(place)
    assert places[4:9] == [
        (1, 0, 2, 1, 2), (1, 0, 2, 1, 3), (1, 0, 2, 1, 4), (1, 0, 5), (1, 1, 1),
    ]  # fmt: skip
    assert places[-3:] == [(6, 0, 6), (6, 1, 6), (7,)]
    assert places == sorted(places)
