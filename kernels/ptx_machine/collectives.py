"""What a warp does together: stmatrix, elect.sync (both from sm_90 on), bar.warp.sync.

Source: PTX ISA, "stmatrix", "elect.sync" and "bar.warp.sync". setmaxnreg, which moves registers
between warps, changes nothing that can be seen here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .clocks import WARP

if TYPE_CHECKING:
    from .group import Group
    from .syntax import Instruction


def matrices(registers: list[np.ndarray], transposed: bool) -> np.ndarray:
    """[warps, matrices, 8, 8] uint16 of the registers of whole warps.

    Lane l holds, of each matrix, row l / 4 and columns 2 (l % 4) and the next; transposed, the
    column and rows.
    """
    halves = np.stack(registers, axis=-1).view(np.uint32).reshape(-1, WARP, len(registers))
    rows = np.ascontiguousarray(halves.swapaxes(1, 2)).view(np.uint16)
    made = rows.reshape(-1, len(registers), 8, 8)
    return made.swapaxes(2, 3) if transposed else made


def store_matrix(
    g: Group, instruction: Instruction, address: np.ndarray, registers: list[np.ndarray],
    transposed: bool,
) -> None:  # fmt: skip
    """stmatrix.m8n8.b16: the threads 8 j to 8 j + 7 of a warp give the rows of matrix j."""
    shared = g.machine.shared
    given = np.arange(g.n).reshape(-1, WARP)[:, : 8 * len(registers)].ravel()
    where = shared.locate(g, instruction, address[given], g.base[given], 16, 16, given)
    rows = np.ascontiguousarray(matrices(registers, transposed)).reshape(-1, 8)
    shared.note_write(g, instruction, where, g.warp[given], 16, rows.view(np.uint32))
    if g.machine.counts is not None:
        g.machine.counts.matrix_access(instruction, g.warp[given], where)
    shared.bytes.reshape(-1, 16)[where >> 4] = rows.view(np.uint8)


def warp_barrier(g: Group) -> None:
    """bar.warp.sync of whole warps: races within a warp are not looked for, but its fences are."""
    g.machine.clocks.warp_barrier(np.unique(g.warp))


def elect(g: Group) -> tuple[np.ndarray, np.ndarray]:
    """elect.sync of whole warps: (the leader's lane, whether a thread is it).

    The ISA lets the chip choose, the same one every time: the lowest lane here.
    """
    return np.zeros(g.n, np.uint32), g.thread % WARP == 0
