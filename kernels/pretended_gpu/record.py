"""What happened on the pretended GPU."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

_HERE = str(Path(__file__).parent)


class SyncError(RuntimeError):
    """The host waited for the device where it must not."""


class Operand(NamedTuple):
    """A tensor that an op or a kernel reads or writes."""

    shape: tuple[int, ...]
    bytes: int  # of its elements, each once


@dataclass(frozen=True)
class Op:
    """An aten op that ran, or one of hrvlm_kernels."""

    name: str
    is_view: bool  # nothing is launched
    reads: tuple[Operand, ...]
    writes: tuple[Operand, ...]

    @property
    def bytes(self) -> int:
        """Of all that it reads and writes."""
        return sum(a.bytes for a in (*self.reads, *self.writes))


class Allocation(NamedTuple):
    """Memory of the device that a result of an op got; none of it is that of an argument."""

    op: str
    bytes: int


@dataclass(frozen=True)
class Launch:
    """A start of a Triton kernel; what it reads and writes is told while ops are counted."""

    kernel: str
    grid: tuple[int, int, int]
    reads: tuple[Operand, ...] = ()
    writes: tuple[Operand, ...] = ()


@dataclass
class Record:
    """Filled while code runs; see :func:`pretended_gpu.install`."""

    syncs: list[tuple[str, str]] = field(default_factory=list)  # (what, where in the source)
    uploads: list[str] = field(default_factory=list)  # ops that took pageable host memory
    launches: list[Launch] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)  # while `counts_ops`
    allocations: list[Allocation] = field(default_factory=list)  # likewise
    kernels: dict[tuple[str, str, str], int] = field(default_factory=dict)  # (module, name, key)
    waits: list[int] = field(default_factory=list)  # cycles that the device was to wait
    descriptors: int = 0
    counts_ops: bool = False
    captured: list[Callable[[], object]] | None = None  # of the graph that is being captured
    sync_mode: str = "default"  # of torch.cuda.set_sync_debug_mode

    def clear(self) -> None:
        """Forget what happened; modes stay."""
        for seen in (
            self.syncs, self.uploads, self.launches, self.ops, self.allocations, self.waits,
        ):  # fmt: skip
            seen.clear()

    def sync(self, what: str) -> None:
        """Note that the host waits.

        Raises:
            SyncError: the sync-debug mode is "error", or a graph is being captured.
        """
        place = _place()
        self.syncs.append((what, place))
        if self.sync_mode == "error":
            raise SyncError(f"called a synchronizing CUDA operation ({what}) at {place}")
        if self.captured is not None:
            raise SyncError(f"operation not permitted when stream is capturing ({what}) at {place}")

    def capture(self, again: Callable[[], object]) -> None:
        """Note how what was just done is done again, where a graph is being captured."""
        if self.captured is not None:
            self.captured.append(again)

    @contextmanager
    def counting(self, counts: bool = True) -> Iterator[None]:
        """Record ops with their bytes, and allocations, (or don't) inside the block."""
        before, self.counts_ops = self.counts_ops, counts
        try:
            yield
        finally:
            self.counts_ops = before


def _place() -> str:
    """The innermost line that is neither torch's nor of this package."""
    frames = (
        frame
        for frame in reversed(traceback.extract_stack())
        if not frame.filename.startswith(_HERE) and "/torch/" not in frame.filename
    )
    frame = next(frames, None)
    return f"{Path(frame.filename).name}:{frame.lineno}" if frame else "?"


RECORD = Record()
