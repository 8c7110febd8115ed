"""Sectors and bank conflicts of address patterns that are known by hand."""

import numpy as np
import pytest

from ptx_machine.counters import LaunchCounts
from ptx_machine.parse import parse
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
