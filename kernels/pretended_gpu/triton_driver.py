"""A Triton driver for an H200 that specialises kernels and launches nothing.

Nothing is compiled either, unless ``PRETENDED_GPU_COMPILE=1`` asks for it: then a kernel that does
not compile for sm_90 raises where it would on the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .kernel_accesses import Accesses, accesses_of
from .record import RECORD, Launch, Operand
from .tensor_maps import check_tensor_map
from .torch_tensors import DEVICE, inner, operand

CAPABILITY = (9, 0)
MULTIPROCESSORS = 132
MAX_SHARED = 232_448  # CUDA C++ Programming Guide, "Technical Specifications": opt-in, a block
_TARGET = 10 * CAPABILITY[0] + CAPABILITY[1]


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": MAX_SHARED,
            "max_num_regs": 65_536,
            "multiprocessor_count": MULTIPROCESSORS,
            "warpSize": 32,
            "sm_clock_rate": 1_980_000,
            "mem_clock_rate": 3_201_000,
            "mem_bus_width": 6144,
        }

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """(module, function, registers, spills, threads at most)."""
        return object(), object(), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        """Triton 3.8 asks for it when a kernel is dropped."""

    def fill_tma_descriptor(
        self,
        address: int,
        swizzle: int,
        itemsize: int,
        dtype: int,
        box: Any,
        shape: Any,
        strides: Any,
        padding: int,
    ) -> object:
        RECORD.descriptors += 1
        check_tensor_map(address, swizzle, itemsize, box, shape, strides)
        return object()


class PretendedDriver:
    """What Triton asks of a driver, as its own NVIDIA driver answers on an H200."""

    def __init__(self) -> None:
        self.utils = _Utils()
        self.launcher_cls = CompiledLauncher

    @staticmethod
    def is_active() -> bool:
        """Whether Triton may choose it by itself: only :func:`install` does."""
        return False

    def get_current_target(self) -> Any:
        """sm_90."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", _TARGET, 32)

    def get_current_device(self) -> int:
        """0, the only one."""
        return 0

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        """(9, 0)."""
        return CAPABILITY

    def get_active_torch_device(self) -> torch.device:
        """cuda:0."""
        return DEVICE

    def get_device_interface(self) -> Any:
        """torch.cuda, the pretended one."""
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        """Of a kernel's argument."""
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(kind)

    def get_benchmarker(self) -> Any:
        """Refuse: times of a pretended GPU say nothing."""
        raise NotImplementedError("a pretended GPU has no times")


class CompiledLauncher:
    """Stands for Triton's launcher of a compiled kernel: descriptors are made, nothing starts."""

    def __init__(self, src: Any, metadata: Any) -> None:
        from triton.backends.nvidia import driver as nvidia

        self.name = metadata.name
        self.scratch = metadata.global_scratch_size, metadata.global_scratch_align
        self.unpack = nvidia.wrap_handle_tensordesc(
            lambda *args: None, dict(src.signature), getattr(metadata, "tensordesc_meta", None)
        )

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *args: Any) -> None:
        """Record the launch."""
        from triton.runtime import _allocation

        size, alignment = self.scratch
        if size:
            _allocation._allocator.get()(x * y * z * size, alignment, stream)
        note_launch(self.name, (x, y, z))
        self.unpack(x, y, z, stream, function, None, None, None, None, *args)


class UncompiledKernel:
    """Stands for a compiled kernel where nothing is compiled.

    Args:
        name: Of the kernel.
        arguments: Names of all its arguments.
        accesses: Which of them it reads and writes; asked for while ops are counted.
    """

    packed_metadata = None

    def __init__(self, name: str, arguments: Sequence[str], accesses: Callable[[], Accesses]):
        self.name, self.function = name, object()
        self._arguments, self._find_accesses = arguments, accesses
        self._accesses: Accesses | None = None

    def launch_metadata(self, *args: Any) -> None:
        """None: no hook is set."""

    def run(
        self, x: int, y: int, z: int, stream: int, function: object, metadata: object,
        launch_metadata: object, enter: object, leave: object, *args: Any,
    ) -> None:  # fmt: skip
        """Record the launch."""
        if not RECORD.counts_ops:
            note_launch(self.name, (x, y, z))
            return
        if self._accesses is None:
            self._accesses = self._find_accesses()
        named = dict(zip(self._arguments, args, strict=True))
        reads, writes = (_operands(named, names) for names in self._accesses)
        note_launch(self.name, (x, y, z), reads, writes)


def _operands(arguments: dict[str, Any], names: frozenset[str]) -> tuple[Operand, ...]:
    """Of the tensors of these names; one that is passed twice, by a descriptor too, counts once."""
    seen = {}
    for name in arguments.keys() & names:
        a = arguments[name]
        a = inner(getattr(a, "base", a))
        seen[a.data_ptr(), a.shape, a.stride()] = operand(a)
    return tuple(seen.values())


def note_launch(
    kernel: str,
    grid: tuple[int, int, int],
    reads: tuple[Operand, ...] = (),
    writes: tuple[Operand, ...] = (),
) -> None:
    """Record a launch; ValueError for a grid that CUDA refuses (2**31 - 1, 65535, 65535)."""
    x, y, z = grid
    if not (x < 1 << 31 and y < 1 << 16 and z < 1 << 16):
        raise ValueError(f"{kernel}: grid {grid} is larger than (2**31 - 1, 65535, 65535)")
    RECORD.launches.append(Launch(kernel, grid, reads, writes))


def install() -> None:
    """Make it Triton's driver in this process."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(PretendedDriver())
    compiles = os.environ.get("PRETENDED_GPU_COMPILE", "0") == "1"
    compile_really = JITFunction._do_compile

    def do_compile(
        self: Any, key: str, signature: Any, device: int, constants: Any, options: Any,
        attributes: Any, warmup: bool,
    ) -> Any:  # fmt: skip
        RECORD.kernels[self.fn.__module__, self.fn.__name__, key] = len(signature)
        if compiles:
            return compile_really(
                self, key, signature, device, constants, options, attributes, warmup
            )
        cache, _, target, backend, _ = self.device_caches[device]
        kernel = UncompiledKernel(
            self.fn.__name__,
            self.arg_names,
            lambda: accesses_of(self, signature, constants, options, (attributes, target, backend)),
        )
        cache[key] = kernel
        return kernel

    JITFunction._do_compile = do_compile
