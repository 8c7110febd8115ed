"""A GPU that is only pretended: what breaks in Python on one, seen on a machine without.

    import pretended_gpu

    pretended_gpu.install()                      # before hrvlm_kernels is imported
    x = torch.randn(4, 4, device="cuda")         # CPU data in a tensor that says cuda:0
    record = pretended_gpu.RECORD                # syncs, uploads, launches, ops with their bytes

Tensors with CPU data say that they are on ``cuda:0``: an op that mixes devices raises as torch
does, what makes the host wait for the device is recorded (and raises while
``torch.cuda.set_sync_debug_mode("error")`` holds or a graph is captured), and so is what is copied
from pageable memory. ``torch.cuda`` tells of an H200. Triton's driver specialises kernels for
sm_90, checks grids and TMA descriptors, and launches nothing: the numbers of hrvlm_kernels' ops
come from ``hrvlm_kernels.reference``.

So it sees wrong devices, hidden waits, wrong signatures and plain Python errors of code paths that
only a GPU takes. It sees nothing of what a kernel computes (:mod:`ptx_machine` does), and no time
that it tells means anything.

    torch_tensors      the tensors, and the dispatch mode that judges every op
    torch_cuda         torch.cuda and the constructors that take a device
    triton_driver      the driver that launches nothing
    kernel_accesses    which arguments a Triton kernel reads and writes
    tensor_maps        the documented limits of cuTensorMapEncodeTiled
    reference_numbers  the numbers of the ops; the one file that imports hrvlm_kernels
    moved_bytes        bytes and launches of a piece of code, op by op
    null_driver        a libcuda.so.1 that does nothing, under Triton's own launcher: host time
    pytest_plugin      the tests marked gpu on it
    everywhere         a folder for PYTHONPATH: every process has a pretended GPU

Development only: it is not part of the wheel.
"""

from __future__ import annotations

import sys

from .record import RECORD, Record, SyncError

__all__ = ["RECORD", "Record", "SyncError", "install"]


def install(*, numbers: bool = True) -> None:
    """Pretend a GPU from here on, in this process.

    Args:
        numbers: Whether the ops' outputs get the numbers of the references; False leaves them
            as allocated, which is faster and enough to count bytes.

    Raises:
        RuntimeError: hrvlm_kernels is imported already, or there is a real GPU.
    """
    import torch

    if torch.cuda.is_available():
        raise RuntimeError("there is a real GPU (or a pretended one): nothing to pretend")
    if "hrvlm_kernels" in sys.modules:
        raise RuntimeError("pretended_gpu.install() has to come before hrvlm_kernels is imported")
    from . import reference_numbers, torch_cuda, torch_tensors, triton_driver

    torch_cuda.install()
    triton_driver.install()
    reference_numbers.install(numbers=numbers)
    torch_tensors.install()
    # A pretended parameter moved to the CPU changes its class, which `.data =` does not take.
    torch.__future__.set_swap_module_params_on_conversion(True)
