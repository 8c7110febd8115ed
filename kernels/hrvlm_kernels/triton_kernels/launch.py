"""How the ops start kernels: by which backend, on which chip, with which tile sizes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..backends import cpu_driver
from . import tile_tables

Config = TypeVar("Config")

_NO_GUARD = nullcontext()
# (kernel, larger configuration) that a device refused: not tried again on every call.
_refused: set[tuple[str, object]] = set()


@lru_cache
def architecture(device: torch.device) -> str:
    """The row of the configuration tables for `device`.

    Returns:
        "sm_80", "sm_90", "sm_100", "gfx942", or "interpreter" for the CPU. Chips without a row of
        their own (sm_86, sm_89, sm_120; other AMD chips) use the nearest one; what does not fit
        them is found out at launch. On the CPU, a driver that executes compiled kernels says for
        which chip they are.
    """
    if device.type == "cpu":
        driver = cpu_driver()
        if driver is None:
            return "interpreter"
        major = driver.get_current_target().arch // 10
    elif torch.version.hip:
        return "gfx942"
    else:
        major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@lru_cache
def triton_release() -> tuple[int, int]:
    """Major and minor version of Triton, which compiles the kernels."""
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


def tile_choices(table: str, *row: str | int) -> tuple[Any, ...]:
    """The tile sizes to try for a row of one of the tile tables, best first; none without a row.

    Those that this Triton compiles to code that spills are left out, by `tile_tables.SPILLS`. A
    release that is not in there counts as the newest one before it that is.
    """
    return without_spilling(getattr(tile_tables, table).get(row, ()), table, *row)


def without_spilling(configs: tuple[Any, ...], table: str, *row: str | int) -> tuple[Any, ...]:
    """Those of the tile sizes that this Triton compiles well for a row of a table."""
    tried = max((r for r in tile_tables.SPILLS if r <= triton_release()), default=None)
    spilling = () if tried is None else tile_tables.SPILLS[tried].get((table, *row), ())
    return tuple(config for config in configs if config not in spilling) if spilling else configs


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a kernel run side by side at least; 1 under the interpreter."""
    if device.type == "cpu":
        driver = cpu_driver()
        if driver is None:
            return 1
        properties = driver.utils.get_device_properties(driver.get_current_device())
        return int(properties["multiprocessor_count"])
    return torch.cuda.get_device_properties(device).multi_processor_count


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up; Triton's own costs the host microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below `n`, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def device_guard(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of `x` the current one, where Triton launches whatever its arguments."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(x.device)


def launch(kernel: str, configs: Sequence[Config], start: Callable[[Config], None]) -> None:
    """Call ``start(configs[0])``, or ``start(configs[1])`` where the first does not fit the chip.

    The second comes with a warning, once.

    Args:
        kernel: Name for the warning.
        configs: Tile sizes, largest first; a single one has no fallback.
        start: Launches the kernel with the tile sizes given.

    Raises:
        triton.runtime.errors.OutOfResources: the last configuration does not fit either.
    """
    from triton.runtime.errors import OutOfResources

    if len(configs) > 1 and (kernel, configs[0]) in _refused:
        configs = configs[1:]
    try:
        start(configs[0])
    except OutOfResources as error:
        if len(configs) == 1:
            raise
        _refused.add((kernel, configs[0]))
        warnings.warn(
            f"{kernel}: {configs[0]} does not fit ({error}); using {configs[1]}", stacklevel=2
        )
        start(configs[1])
