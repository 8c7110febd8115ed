"""torch.cuda as it would be with one H200, and torch's functions that take a device."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .moved_bytes import launched
from .record import RECORD, Launch
from .torch_tensors import DEVICE, MODE, PretendedTensor, is_cuda
from .triton_driver import CAPABILITY, MAX_SHARED, MULTIPROCESSORS

PROPERTIES = SimpleNamespace(
    name="NVIDIA H200 (pretended)",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=150 * 10**9,
    multi_processor_count=MULTIPROCESSORS,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65_536,
    warp_size=32,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=MAX_SHARED,
    shared_memory_per_multiprocessor=233_472,
    L2_cache_size=60 << 20,
    gcnArchName="",
    is_integrated=False,
    is_multi_gpu_board=0,
    uuid="pretended",
    pci_bus_id=0,
    pci_device_id=0,
    pci_domain_id=0,
)


class Event:
    """Tells the host's time: what it measures means nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time: float | None = None

    def record(self, stream: object = None) -> None:
        """Take the host's time."""
        self.time = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds to `end`."""
        if self.time is None or end.time is None:
            raise RuntimeError("both events must be recorded before calculating elapsed time")
        return max(1e-6, 1e3 * (end.time - self.time))

    def synchronize(self) -> None:
        """Nothing runs."""

    def query(self) -> bool:
        """True."""
        return True

    def wait(self, stream: object = None) -> None:
        """Nothing runs."""


class Stream:
    """One of many that all do nothing."""

    cuda_stream = 0
    device = DEVICE

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        """Nothing runs."""

    def wait_event(self, event: object) -> None:
        """Nothing runs."""

    def synchronize(self) -> None:
        """Nothing runs."""

    def record_event(self, event: Event | None = None) -> Event:
        """A recorded event."""
        event = event or Event()
        event.record()
        return event


class CUDAGraph:
    """Remembers what was done while it was captured; a replay is one launch and does it again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.captured: list[Callable[[], object]] = []

    def pool(self) -> tuple[int, int]:
        """An id of its memory pool."""
        return (0, 1)

    def replay(self) -> None:
        """Write the same tensors anew."""
        RECORD.launches.append(Launch("graph replay", (1, 1, 1)))
        with torch.no_grad():
            for again in self.captured:
                again()


@contextlib.contextmanager
def graph(cuda_graph: CUDAGraph, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Capture: whatever makes the host wait raises."""
    RECORD.captured = cuda_graph.captured
    try:
        yield
    finally:
        RECORD.captured = None


class _DeviceGuard(contextlib.nullcontext[None]):
    def __init__(self, device: object) -> None:
        super().__init__()


def _set_sync_debug_mode(mode: str | int) -> None:
    RECORD.sync_mode = mode if isinstance(mode, str) else ("default", "warn", "error")[mode]


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _fakes() -> dict[str, Any]:
    nothing = _always(None)
    return {
        "CUDAGraph": CUDAGraph,
        "Event": Event,
        "Stream": Stream,
        "_lazy_init": nothing,
        "_sleep": RECORD.waits.append,
        "current_device": _always(0),
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "device": _DeviceGuard,
        "device_count": _always(1),
        "empty_cache": nothing,
        "get_arch_list": _always([f"sm_{CAPABILITY[0]}{CAPABILITY[1]}"]),
        "get_device_capability": _always(CAPABILITY),
        "get_device_name": _always(PROPERTIES.name),
        "get_device_properties": _always(PROPERTIES),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "graph": graph,
        "ipc_collect": nothing,
        "is_available": _always(True),
        "is_bf16_supported": _always(True),
        "is_current_stream_capturing": lambda: RECORD.captured is not None,
        "is_initialized": _always(True),
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "max_memory_allocated": _always(2_000_000),
        "max_memory_reserved": _always(2_000_000),
        "mem_get_info": _always((10**11, 10**11)),
        "memory_allocated": _always(1_000_000),
        "memory_reserved": _always(1_000_000),
        "memory_stats": lambda device=None: defaultdict(int),
        "reset_max_memory_allocated": nothing,
        "reset_peak_memory_stats": nothing,
        "set_device": nothing,
        "set_rng_state": nothing,
        "set_rng_state_all": nothing,
        "set_sync_debug_mode": _set_sync_debug_mode,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": nothing,
    }


def install() -> None:
    """Replace what would ask a driver, in this process."""
    # These look at torch.cuda once, when they are imported: before it is a fake.
    for module in ("torch._dynamo", "torch._inductor.config"):
        importlib.import_module(module)
    for name, fake in _fakes().items():
        setattr(torch.cuda, name, fake)
    _replace_profiler()
    _replace_generator()
    _replace_constructors()
    _replace_autocast()
    _replace_moves()


class Profile(contextlib.AbstractContextManager["Profile"]):
    """Tells what was started on the device, each as an event with a name and no time."""

    def __enter__(self) -> Profile:
        self._begun = len(RECORD.ops), len(RECORD.launches)
        self._counting = RECORD.counting()
        self._counting.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._counting.__exit__(*error)
        ops, launches = self._begun
        self._names = launched(RECORD.ops[ops:], RECORD.launches[launches:])

    def events(self) -> list[SimpleNamespace]:
        """In the order of their kinds: aten ops, then Triton kernels."""
        kind = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
        return [SimpleNamespace(name=name, device_type=kind) for name in self._names]


def _replace_profiler() -> None:
    """Where it is asked for the device alone; the host's profile is torch's own."""
    real = torch.profiler.profile

    def profile(*, activities: Any = None, **options: Any) -> Any:
        if activities and set(activities) == {torch.profiler.ProfilerActivity.CUDA}:
            return Profile()
        return real(activities=activities, **options)

    torch.profiler.profile = profile  # type: ignore[assignment,misc]


def _replace_generator() -> None:
    real = torch.Generator

    class Generator(real):  # type: ignore[misc,valid-type]
        def __new__(cls, device: Any = "cpu") -> Any:
            return super().__new__(cls, "cpu")

    torch.Generator = Generator  # type: ignore[misc]


def _replace_constructors() -> None:
    """torch.tensor and torch.as_tensor make a CPU tensor first, as on a GPU: an upload."""
    tensor, as_tensor = torch.tensor, torch.as_tensor

    def pretended_tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        if is_cuda(device):
            return tensor(data, **options).to("cuda")
        return tensor(data, device=device, **options)

    def pretended_as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        if isinstance(data, PretendedTensor):
            return data.to(dtype=dtype or data.dtype, device=device or DEVICE)
        if is_cuda(device):
            return as_tensor(data, dtype=dtype).to("cuda")
        return as_tensor(data, dtype=dtype, device=device)

    torch.tensor, torch.as_tensor = pretended_tensor, pretended_as_tensor  # type: ignore[assignment]


def _replace_autocast() -> None:
    """Autocast to a GPU's dtype acts on the data, which are on the CPU."""
    real = torch.autocast

    class Autocast(contextlib.ContextDecorator):
        def __init__(
            self,
            device_type: str,
            dtype: torch.dtype | None = None,
            enabled: bool = True,
            cache_enabled: bool | None = None,
        ) -> None:
            self.parts = [real(device_type, dtype, enabled, cache_enabled)]
            if device_type == "cuda":
                self.parts.append(real("cpu", dtype or torch.bfloat16, enabled, cache_enabled))

        def __enter__(self) -> Autocast:
            for part in self.parts:
                part.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            for part in reversed(self.parts):
                part.__exit__(*error)

    for owner in (torch, torch.amp):
        owner.autocast = Autocast  # type: ignore[attr-defined]


def _replace_moves() -> None:
    """`.to`, `.cpu`, `.cuda` and pinning, between the CPU and the pretended GPU."""
    real_to = torch.Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args = tuple(_with_index(a) for a in args)
        if "device" in kwargs:
            kwargs["device"] = _with_index(kwargs["device"])
        if not isinstance(self, PretendedTensor):
            return real_to(self, *args, **kwargs)
        device, dtype = _target(args, kwargs)
        if device is not None and device.type == "cpu":
            RECORD.sync("to(cpu)")
            MODE.moving.to_cpu = True
            try:
                options = {} if dtype is None else {"dtype": dtype}
                return torch.ops.aten._to_copy(self, device=device, **options)
            finally:
                MODE.moving.to_cpu = False
        if device is None:
            return real_to(self, *args, **kwargs)
        if dtype is not None and dtype != self.dtype:
            return real_to(self, dtype)
        return self.clone() if kwargs.get("copy") else self

    def cpu(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu") if isinstance(self, PretendedTensor) else self

    def pin_memory(self: Tensor, *args: Any) -> Tensor:
        pinned = self.clone()
        pinned.is_pretended_pinned = True  # type: ignore[attr-defined]
        return pinned

    torch.Tensor.to = to  # type: ignore[method-assign,assignment]
    torch.Tensor.cpu = cpu  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self.to(DEVICE)  # type: ignore[method-assign]
    torch.Tensor.pin_memory = pin_memory  # type: ignore[method-assign,assignment]
    # Module.to would put a wrapper's data into the parameter it has; it has to make a new one.
    torch._has_compatible_shallow_copy_type = lambda a, b: (
        not (  # type: ignore[assignment]
            isinstance(a, PretendedTensor) or isinstance(b, PretendedTensor)
        )
    )


def _with_index(a: Any) -> Any:
    return DEVICE if isinstance(a, (str, torch.device)) and str(a) == "cuda" else a


def _target(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and dtype that a `.to` asks for."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for a in args:
        if isinstance(a, Tensor):
            device, dtype = a.device, a.dtype
        elif isinstance(a, torch.dtype):
            dtype = a
        elif isinstance(a, (str, torch.device, int)) and not isinstance(a, bool):
            device = a
    return None if device is None else torch.device(device), dtype
