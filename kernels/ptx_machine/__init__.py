"""Runs compiled Triton kernels without a GPU: PTX, executed with numpy and checked like hardware.

Triton compiles a kernel for a real NVIDIA chip with its real backend, ptxas included. The PTX that
comes out is executed on ordinary CPU tensors, instruction by instruction, so bfloat16, layouts,
pipelining, tensor-core fragments, shared memory, alignment and races are those of compiled code::

    gpu = ptx_machine.install(90, ptx_machine.Options(shuffle_warps=True, seed=1))
    kernel[grid](x, y, n, BLOCK=128)            # CPU tensors; TMA descriptors too
    assert not gpu.report, gpu.report           # findings of the checks
    gpu.report.notes                            # what was seen and does no harm
    with ptx_machine.edited(gpu, lambda name, ptx: ptx.replace("bar.sync", "//")):
        kernel[grid](x, y, n, BLOCK=128)        # with other PTX

``install(80)`` and ``install(90)`` may take turns in one process: a kernel is compiled for the chip
that was installed last. (Triton's own exception: of casts to 8-bit floats it keeps those of the
first chip.) This is a development tool, never installed with the package: tests and benchmarks
import it (``PYTHONPATH=kernels:.``), it imports neither them nor hrvlm.

Triton decides when it is imported, and again where a kernel's module is, whether kernels are
compiled or interpreted. So this needs a process in which ``TRITON_INTERPRET`` was not 1 by then;
:func:`install` says so otherwise. Tests arrange that by folder: see ``OWN_PROCESS`` in
``tests/conftest.py``. Each test file of such a folder runs in a process of its own, as one item of
the whole run; ``TRITON_INTERPRET=0 pytest tests/ptx_machine/compiled -k matmul`` runs single tests.

It executes PTX, not the machine code that ptxas makes of it, and measures no time. :data:`NOT_SEEN`
has all that it does not see.
"""

from __future__ import annotations

from .driver import MAX_SHARED, MULTIPROCESSORS, ProtocolError, PtxDriver, edited, install
from .not_seen import NOT_SEEN
from .options import Options
from .report import ExecutionError, Finding, MemcheckError, Report
from .syntax import PtxSyntaxError, UnknownInstructionError

__all__ = [
    "MAX_SHARED",
    "MULTIPROCESSORS",
    "NOT_SEEN",
    "ExecutionError",
    "Finding",
    "MemcheckError",
    "Options",
    "ProtocolError",
    "PtxDriver",
    "PtxSyntaxError",
    "Report",
    "UnknownInstructionError",
    "edited",
    "install",
]
