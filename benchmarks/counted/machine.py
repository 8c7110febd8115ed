"""The executor, set up to count."""

from __future__ import annotations

import ptx_machine
from hrvlm_kernels.triton_kernels import launch


def machine(chip: int) -> ptx_machine.PtxDriver:
    """The executor as a chip, counting, and without its checks."""
    options = ptx_machine.Options(check=False, check_global=False, count=True)
    gpu = ptx_machine.install(chip, options)
    for cached in (launch.architecture, launch.multiprocessors):
        cached.cache_clear()
    return gpu
