"""Jumps, barriers and fences. PTX ISA 9.7.12 and 9.7.13.

The machine reads the last instruction of a block itself: where it goes, whom it waits for.
"""

from __future__ import annotations

from .forms import form
from .text import Text


@form("bra[.uni]", "ret[.uni]", "exit")
def _jump(w: Text) -> None:
    pass


@form("brx.idx[.uni]", "bar[.cta].sync", "bar.warp.sync", "barrier[.cta].sync[.aligned]")
def _wait(w: Text) -> None:
    w.refuse_guard()


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
