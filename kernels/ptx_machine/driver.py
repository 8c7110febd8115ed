"""A Triton driver without a GPU: compiles for an NVIDIA chip and runs the PTX on the CPU."""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.driver import ty_to_cpp
from triton.runtime import _allocation
from triton.runtime.cache import get_cache_manager

from .arguments import Arguments, parameters
from .counters import LaunchCounts
from .global_memory import GlobalMemory, smallest_store
from .machine import Machine
from .options import Options
from .parse import parse
from .report import Report
from .translate import Program

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
MAX_SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148}


class ProtocolError(RuntimeError):
    """Triton starts kernels in a way that this driver does not know: a release newer than it."""


class _Utils:
    """What Triton asks the CUDA driver."""

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[int, str, int, int, int]:
        """(module, function, registers, spills, threads at most); nothing is loaded."""
        return 1, name, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Nothing was loaded; Triton 3.8 asks for it when a kernel is dropped."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": MAX_SHARED[device],
            "max_num_regs": 65_536,
            "multiprocessor_count": MULTIPROCESSORS[device],
            "warpSize": 32,
        }


class Launcher:
    """What Triton calls to start a compiled kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.signature: dict[str, Any] = src.signature
        self.metadata = metadata

    def __call__(self, *call: Any) -> None:
        """Run it, given the grid, stream, function, metadata, hooks and arguments."""
        if len(call) != 9 + len(self.signature):
            raise ProtocolError(
                f"Triton {triton.__version__} starts {self.metadata.name} with {len(call)} values "
                f"instead of 9 and {len(self.signature)} arguments: ptx_machine has to learn it"
            )
        x, y, z, _, _, _, launch, enter, leave = call[:9]
        if enter is not None:
            enter(launch)
        if x * y * z > 0:
            triton.runtime.driver.active.execute(self, (x, y, z), call[9:])
        if leave is not None:
            leave(launch)


class PtxDriver(DriverBase):
    """Compiles for `capability` and executes PTX; set by :func:`install`.

    `report` collects the findings of all launches, `launches` names them with the seconds they
    took; `instructions` counts what all threads executed. With `options.count`, `counts` has what
    each launch executed.
    """

    takes_addresses = False  # where its memory ends, only a tensor tells

    def __init__(self, capability: int, options: Options) -> None:
        super().__init__()
        self.capability = capability
        self.options = options
        self.report = Report()
        self.utils = _Utils()
        self.launcher_cls = Launcher
        self.programs: dict[str, Program] = {}
        self.edit: Callable[[str, str], str] | None = None  # (kernel name, PTX) -> PTX
        self.launches: list[tuple[str, float]] = []
        self.instructions = 0
        self.counts: list[LaunchCounts] = []
        self.shared_at_least = 0  # bytes; for edited PTX that needs more than its kernel did

    @classmethod
    def is_active(cls) -> bool:
        """Never found by itself: only install() chooses it."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Triton's own."""
        return ty_to_cpp(ty)

    def get_current_target(self) -> GPUTarget:
        """The chip to compile for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Kernels are cached by device: each capability is a device of its own."""
        return self.capability

    def set_current_device(self, device: int) -> None:
        """Choose a chip."""
        self.capability = device

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        """Major and minor."""
        return divmod(self.capability, 10)

    def get_current_stream(self, device: int) -> int:
        """There is one."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """Torch's module of that device."""
        return torch.cpu

    def get_benchmarker(self) -> Any:
        """There is none."""
        raise NotImplementedError("timings of a simulation say nothing")

    def assemble_tensormap_to_arg(self, tensormaps_info: Any, args: Any) -> Any:
        """Nothing to do."""
        return args

    # Running

    def ptx_of(self, metadata: Any) -> str:
        """The PTX of a compiled kernel, from Triton's cache."""
        name = metadata.name[:150]
        group = get_cache_manager(metadata.hash).get_group(f"{name}.json")
        if group is None or f"{name}.ptx" not in group:
            raise ProtocolError(f"Triton {triton.__version__} keeps no {name}.ptx in its cache")
        return Path(group[f"{name}.ptx"]).read_text()

    def program(self, metadata: Any) -> Program:
        """The translated kernel."""
        if self.edit is not None:
            original = self.ptx_of(metadata)
            text = self.edit(metadata.name, original)
            if text != original:
                return Program(parse(text))
        if metadata.hash not in self.programs:
            self.programs[metadata.hash] = Program(parse(self.ptx_of(metadata)))
        return self.programs[metadata.hash]

    def execute(
        self, launcher: Launcher, grid: tuple[int, int, int], args: tuple[Any, ...]
    ) -> None:
        """Run one launch; `args` are those of the Python function, constants too."""
        metadata = launcher.metadata
        if metadata.num_ctas != 1:
            raise NotImplementedError(
                f"{metadata.name}: num_ctas={metadata.num_ctas}: clusters are not understood"
            )
        begin = time.perf_counter()
        program = self.program(metadata)
        memory = GlobalMemory(self.options.check_global, smallest_store(program.kernel))
        arguments = Arguments(memory)
        meta = getattr(metadata, "tensordesc_meta", None)
        params = parameters(launcher.signature, args, meta, arguments)
        if metadata.profile_scratch_size:
            raise NotImplementedError(f"{metadata.name}: memory for the profiler")
        params += [_scratch(arguments, metadata, grid), bytes(8)]
        _check_parameters(program, params)
        threads = program.kernel.threads or 32 * metadata.num_warps
        shared = max(metadata.shared, self.shared_at_least)
        machine = Machine(program, grid, threads, shared, params, memory, self.report, self.options)
        if self.options.count:
            machine.counts = LaunchCounts(program.kernel, threads, grid, metadata)
            self.counts.append(machine.counts)
        try:
            machine.run()
        finally:
            self.instructions += machine.instructions
            self.launches.append((metadata.name, time.perf_counter() - begin))


def _check_parameters(program: Program, params: list[bytes]) -> None:
    sizes, expected = [len(p) for p in params], [p.size for p in program.kernel.params]
    if sizes != expected:
        raise ProtocolError(
            f"Triton {triton.__version__}: {program.kernel.name} has parameters of {expected} "
            f"bytes, {sizes} were made of its arguments: ptx_machine has to learn it"
        )


def _scratch(arguments: Arguments, metadata: Any, grid: tuple[int, int, int]) -> bytes:
    """The kernel's scratch memory, from the allocator that was set for it, as on the chip."""
    size = metadata.global_scratch_size
    if not size:
        return bytes(8)
    size *= grid[0] * grid[1] * grid[2] * metadata.num_ctas
    buffer = _allocation._allocator.get()(size, metadata.global_scratch_align, 0)
    arguments.kept.append(buffer)
    arguments.allow([("global scratch", buffer)])
    return struct.pack("<Q", arguments.address(buffer))


def install(capability: int = 80, options: Options | None = None) -> PtxDriver:
    """Make all Triton kernels of this process run here, compiled for `capability`.

    Raises:
        ValueError: a chip that is not in :data:`MULTIPROCESSORS`.
        RuntimeError: Triton was imported to interpret kernels.
    """
    if capability not in MULTIPROCESSORS:
        raise ValueError(f"capability is {capability}; known are {sorted(MULTIPROCESSORS)}")
    if not isinstance(triton.language.cdiv, triton.runtime.JITFunction):
        raise RuntimeError("Triton was imported with TRITON_INTERPRET=1: it compiles nothing here")
    triton.knobs.runtime.interpret = False  # also if the environment asks for it later
    driver = PtxDriver(capability, options or Options())
    triton.runtime.driver.set_active(driver)
    return driver


@contextlib.contextmanager
def edited(driver: PtxDriver, edit: Callable[[str, str], str]) -> Iterator[None]:
    """Run kernels with their PTX changed by ``edit(name, text)``."""
    driver.edit = edit
    try:
        yield
    finally:
        driver.edit = None
