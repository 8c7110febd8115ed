"""A Triton driver without a GPU: compiles for an NVIDIA chip and runs the PTX on the CPU."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST, ty_to_cpp
from triton.runtime import _allocation
from triton.runtime.cache import get_cache_manager

from .machine import Machine, Options
from .memory import GlobalMemory, Report
from .parse import parse
from .tensor_map import TensorMap
from .translate import Program

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
MAX_SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148}
_INTS = {
    "i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q",
    "u1": "<B", "u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q",
}  # fmt: skip


class _Utils:
    def __init__(self, driver: PtxDriver) -> None:
        self.driver = driver

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int):
        """(module, function, registers, spills, threads at most); nothing is loaded."""
        return 1, name, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": MAX_SHARED[device],
            "max_num_regs": 65_536,
            "multiprocessor_count": MULTIPROCESSORS[device],
            "warpSize": 32,
            "sm_clock_rate": 1_410_000,
            "mem_clock_rate": 1_215_000,
            "mem_bus_width": 5120,
        }

    def fill_tma_descriptor(self, *args):
        raise NotImplementedError("the launcher here makes descriptors itself")


class Launcher:
    """What Triton calls to start a compiled kernel."""

    def __init__(self, src, metadata) -> None:
        self.signature = src.signature
        self.fn = src.fn
        self.metadata = metadata

    def __call__(self, x, y, z, stream, function, packed, launch, enter, leave, *args) -> None:
        if enter is not None:
            enter(launch)
        if x * y * z > 0:
            triton.runtime.driver.active.execute(self, (x, y, z), args)
        if leave is not None:
            leave(launch)


class PtxDriver(DriverBase):
    """Compiles for `capability` and executes PTX; set by :func:`install`."""

    def __init__(self, capability: int, options: Options) -> None:
        super().__init__()
        self.capability = capability
        self.options = options
        self.report = Report()
        self.utils = _Utils(self)
        self.launcher_cls = Launcher
        self.programs: dict[str, Program] = {}
        self.edit: Callable[[str, str], str] | None = None  # (kernel name, PTX) -> PTX
        self.launches: list[tuple[str, float]] = []  # (kernel, seconds)
        self.shared_at_least = 0  # for edited PTX that needs more than its kernel did

    @classmethod
    def is_active(cls) -> bool:
        return False  # never found by itself: only install() chooses it

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty_to_cpp(ty)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    # Kernels are cached by device: each capability is a device of its own.
    def get_current_device(self) -> int:
        return self.capability

    def set_current_device(self, device: int) -> None:
        self.capability = device

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self.capability, 10)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_benchmarker(self):
        raise NotImplementedError("timings of a simulation say nothing")

    def get_empty_cache_for_benchmark(self):
        raise NotImplementedError("timings of a simulation say nothing")

    def assemble_tensormap_to_arg(self, tensormaps_info, args):
        return args

    # Running

    def ptx_of(self, metadata) -> str:
        name = metadata.name[:150]
        group = get_cache_manager(metadata.hash).get_group(f"{name}.json")
        return Path(group[f"{name}.ptx"]).read_text()

    def program(self, metadata) -> Program:
        text = self.ptx_of(metadata)
        if self.edit is not None:
            return Program(parse(self.edit(metadata.name, text)))
        if metadata.hash not in self.programs:
            self.programs[metadata.hash] = Program(parse(text))
        return self.programs[metadata.hash]

    def execute(self, launcher: Launcher, grid: tuple[int, int, int], args) -> None:
        """Run one launch; `args` are those of the Python function, constants too."""
        metadata = launcher.metadata
        begin = time.perf_counter()
        program = self.program(metadata)
        memory = GlobalMemory(self.options.check_global)
        params = self._parameters(launcher, memory, args)
        expected = program.kernel.params
        if len(params) + 2 != len(expected):
            raise RuntimeError(f"{metadata.name}: {len(params)} arguments, PTX has {len(expected)}")
        for value, param in zip(params, expected[:-2], strict=True):
            if len(value) != param.size:
                raise RuntimeError(f"{metadata.name}: {param.name} has {param.size} bytes")
        if metadata.profile_scratch_size:
            raise NotImplementedError(f"{metadata.name}: memory for the profiler")
        params += [_scratch(memory, metadata, grid), bytes(8)]
        threads = program.kernel.threads or 32 * metadata.num_warps
        machine = Machine(
            program, grid, threads, max(metadata.shared, self.shared_at_least), params, memory,
            self.report, self.options,
        )  # fmt: skip
        machine.run()
        self.launches.append((metadata.name, time.perf_counter() - begin))

    def _parameters(self, launcher: Launcher, memory: GlobalMemory, args) -> list[bytes]:
        kinds = list(launcher.signature.items())
        for (name, kind), value in zip(kinds, args, strict=True):
            if isinstance(kind, str) and kind.startswith("*") and value is not None:
                _register(memory, name, value)
            elif isinstance(kind, str) and kind.startswith("tensordesc"):
                _register(memory, name, value.base)
        descriptors = iter(getattr(launcher.metadata, "tensordesc_meta", None) or [])
        params = []
        for (name, kind), value in zip(kinds, args, strict=True):
            if kind == "constexpr":
                continue
            if not isinstance(kind, str):
                raise NotImplementedError(f"argument {name} of type {kind}")
            if kind.startswith("tensordesc"):
                params += _descriptor(memory, value, next(descriptors, None))
            elif kind.startswith("*"):
                params.append(struct.pack("<Q", _address(memory, value)))
            elif kind in _INTS:
                params.append(struct.pack(_INTS[kind], value))
            else:
                params.append(_float(kind, value))
        return params


def _span(x: torch.Tensor) -> tuple[int, int]:
    """(address, bytes) from the first to the last element of a tensor."""
    last = sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), (last + 1) * x.element_size()


def _register(memory: GlobalMemory, name: str, x: torch.Tensor) -> None:
    """Allow the tensor; with others of the same storage as one region, from first to last."""
    if not x.numel():
        return
    storage = x.untyped_storage().data_ptr()
    start, size = _span(x)
    waiting = memory.__dict__.setdefault("storages", {})
    low, high, names = waiting.get(storage, (start, start + size, []))
    waiting[storage] = (min(low, start), max(high, start + size), [*names, name])


def _address(memory: GlobalMemory, x: torch.Tensor | None) -> int:
    if x is None:
        return 0
    if not x.numel():
        return 16  # near no tensor; a kernel must not read it
    low, high, names = memory.storages[x.untyped_storage().data_ptr()]
    first = memory.add(", ".join(names), low, high - low)
    return first + x.data_ptr() - low


def _scratch(memory: GlobalMemory, metadata, grid: tuple[int, int, int]) -> bytes:
    """The kernel's scratch memory, from the allocator that was set for it, as on the chip."""
    size = metadata.global_scratch_size
    if not size:
        return bytes(8)
    size *= grid[0] * grid[1] * grid[2] * metadata.num_ctas
    buffer = _allocation._allocator.get()(size, metadata.global_scratch_align, 0)
    _register(memory, "global scratch", buffer)
    memory.keep = buffer
    return struct.pack("<Q", _address(memory, buffer))


def _descriptor(memory: GlobalMemory, value, meta: dict | None) -> list[bytes]:
    """The parameters of a host-made tensor descriptor: its map, then its shape and strides."""
    sizes = [struct.pack("<i", n) for n in value.shape]
    steps = [struct.pack("<q", n) for n in value.strides]
    if meta is None:  # before sm_90: pointers, and the shape and strides twice
        wide = [struct.pack("<q", n) for n in value.shape]
        base = struct.pack("<Q", _address(memory, value.base))
        return [base, *wide, *steps, struct.pack("<b", value.padding == "nan"), *sizes, *steps]
    made = TensorMap.host(
        _address(memory, value.base), meta["swizzle"], meta["elem_size"],
        TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]], meta["block_size"], value.shape,
        value.strides, int(value.padding == "nan"),
    )  # fmt: skip
    return [bytes(made.pack()), *sizes, *steps]


def _float(kind: str, value: float) -> bytes:
    """As Triton's launcher packs it: bf16 is cut, not rounded."""
    if kind == "fp16":
        return struct.pack("<e", value)
    if kind == "bf16":
        return struct.pack("<f", value)[2:]
    if kind in ("fp32", "f32"):
        return struct.pack("<f", value)
    return struct.pack("<d", value)


def install(capability: int = 80, options: Options | None = None) -> PtxDriver:
    """Make all Triton kernels of this process run here, compiled for `capability` (80 or 90)."""
    if capability not in MULTIPROCESSORS:
        raise ValueError(f"capability is {capability}; known are {sorted(MULTIPROCESSORS)}")
    if not isinstance(triton.language.cdiv, triton.runtime.JITFunction):
        raise RuntimeError("Triton was imported with TRITON_INTERPRET=1: it compiles nothing here")
    triton.knobs.runtime.interpret = False  # also if the environment asks for it later
    driver = PtxDriver(capability, options or Options())
    triton.runtime.driver.set_active(driver)
    return driver


@contextlib.contextmanager
def edited(driver: PtxDriver, edit: Callable[[str, str], str]):
    """Run kernels with their PTX changed by `edit(name, text)`."""
    driver.edit = edit
    try:
        yield
    finally:
        driver.edit = None
