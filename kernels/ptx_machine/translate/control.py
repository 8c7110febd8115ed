"""Jumps, barriers and fences. PTX ISA 9.7.12 and 9.7.13.

The machine reads the last instruction of a block itself: where it goes, whom it waits for.
"""

from __future__ import annotations

from ..clocks import WARP
from .forms import form
from .text import Text
from .warps import collective

_BARRIERS = 16


@form("bra[.uni]", "ret[.uni]", "exit")
def _jump(w: Text) -> None:
    pass


@form("brx.idx[.uni]")
def _indexed(w: Text) -> None:
    w.refuse_guard()


@form("bar[.cta].sync", "barrier[.cta].sync[.aligned]")
def _barrier(w: Text) -> None:
    """``id`` is for all threads of the CTA, ``id, count`` for so many."""
    w.refuse_guard()
    number, *count = map(w.number, w.i.operands)
    if not 0 <= number < _BARRIERS:
        raise w.unknown("a barrier that there is not")
    if len(count) > 1 or any(n <= 0 or n % WARP for n in count):
        raise w.unknown("a number of threads that is not of whole warps")


@form("bar.warp.sync")
def _warp_barrier(w: Text) -> None:
    collective(w, w.i.operands[0])
    w.line("warp_barrier(g)")


@form(
    "fence[.{sc,acq_rel,acquire,release}].{cta,cluster,gpu,sys}",
    "membar.{cta,gl,sys}",
    "nanosleep.u32",
    "prefetch.global.{L1,L2}",
)
def _nothing(w: Text) -> None:
    """Order between programs is not followed: the checks exempt atomics."""


@form("trap")
def _trap(w: Text) -> None:
    w.line(f"g.trap(I[{w.i.index}], {w.guard()})")
