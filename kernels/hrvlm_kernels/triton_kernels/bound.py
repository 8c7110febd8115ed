"""Kernels that are bound once: what Triton decides at every launch, kept for the next one like it.

    @bound
    @triton.jit
    def kernel(...): ...

``kernel[grid](...)`` works as ever. Triton looks at each argument, at every launch, for what it
compiles for: a type, a 1, a multiple of 16; and compares the kernel's globals with those it was
compiled with. Here a launch whose pointers are all aligned finds the compiled kernel by the types,
the integers and the constants alone. Whatever is not of this kind goes Triton's own way: the
interpreter, unaligned pointers, hooks of a profiler, and AMD's chips.

Whole calls of such kernels are made again by replay.py.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from operator import itemgetter
from typing import Any, TypeVar

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import replay

Kernel = TypeVar("Kernel")

_MOST = 512  # variants of a kernel that are kept


def bound(kernel: Kernel) -> Kernel:
    """The same kernel, whose launches are bound."""
    if isinstance(kernel, JITFunction) and not torch.version.hip:
        kernel.run = _Launches(kernel)
        replay.place = _place
    return kernel


class _Launches:
    """``JITFunction.run`` of one kernel."""

    def __init__(self, kernel: Any):
        self.kernel, self.by_triton = kernel, kernel.run
        self.known: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self.pointers: Callable[[Any], tuple[Any, ...]] | None = None
        self.integers: Callable[[Any], tuple[Any, ...]] | None = None

    def __call__(self, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        """Launch; `constants` are those of the kernel and the options of the compiler."""
        watch = replay.watched()
        if warmup or _has_hooks() or callable(grid):
            if watch is not None:
                watch.refuse()
            return self.by_triton(*args, grid=grid, warmup=warmup, **constants)
        if self.pointers is None:
            self._sort(args)
        low, kinds = 0, []
        for a in self.pointers(args):  # type: ignore[misc]
            if a is None or type(a) is TensorDescriptor:
                kinds.append(a and TensorDescriptor)
            else:
                low |= a.data_ptr()
                kinds.append(a.dtype)
        if low & 15:
            if watch is not None:
                watch.refuse()
            return self.by_triton(*args, grid=grid, warmup=False, **constants)
        active = driver.active
        device = active.get_current_device()
        key = (
            active, device, *kinds, *self.integers(args), *constants, *constants.values(),  # type: ignore[misc]
        )  # fmt: skip
        found = self.known.get(key)
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        if found is None:
            compiled = self.by_triton(*args, grid=grid, warmup=False, **constants)
            if len(self.known) >= _MOST:
                self.known.clear()
            names = self.kernel.arg_names[len(args) :]
            rest = tuple(constants[name] for name in names)
            run = compiled.run
            start = compiled.function, compiled.packed_metadata, None, None, None  # no hooks
            self.known[key] = run, start, rest
        else:
            run, start, rest = found
            stream = active.get_current_stream(device)
            compiled = run(x, y, z, stream, *start, *args, *rest)
        if watch is not None:
            everything = x, y, z, replay.STREAM, *start, *args, *rest
            watch.note(device, *_inside(run, everything))
        return compiled

    def _sort(self, args: tuple[Any, ...]) -> None:
        """Which arguments are pointers, and which are integers that Triton looks at."""
        parameters = self.kernel.params[: len(args)]
        numbers = (int, float)
        pointers = [i for i, a in enumerate(args) if not isinstance(a, numbers)]
        integers = [
            i
            for i, (a, p) in enumerate(zip(args, parameters, strict=True))
            if isinstance(a, int) and not p.do_not_specialize
        ]
        self.pointers, self.integers = _getter(pointers), _getter(integers)


def _getter(positions: list[int]) -> Callable[[Any], tuple[Any, ...]]:
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda args: tuple(args[i] for i in positions)


def _inside(run: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """What a launcher of Triton calls for ``run(*args)``, and with what.

    It is Python around ``run.launch``, which adds constants to the arguments, and memory for the
    few kernels that ask for it.
    """
    parts = getattr(run, "__dict__", {})
    if "launch" not in parts or any(parts.get(f"{a}_scratch_size") for a in ("global", "profile")):
        return run, args
    calls: list[tuple[Any, ...]] = []
    twin = copy(run)
    twin.launch = lambda *passed: calls.append(passed)
    twin(*args)
    if len(calls) != 1 or not {*map(id, args)}.issuperset(
        id(a) for a in calls[0] if a is not None and not isinstance(a, bool)
    ):
        return run, args
    return run.launch, calls[0]


def _has_hooks() -> bool:
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def _place() -> tuple[Any, int, int] | None:
    """Driver, device and stream of the next launch; None where someone wants to see the launch."""
    active, hooks = driver.active, knobs.runtime
    if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
        return None
    if not getattr(active, "takes_addresses", True):
        return None
    device = active.get_current_device()
    return active, device, active.get_current_stream(device)
