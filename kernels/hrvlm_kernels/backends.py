"""Which implementation runs an op, and why.

    auto        Triton on CUDA (sm_80 and newer) and ROCm; elsewhere "sdpa"
    triton      the kernels of this package
    flash_attn  attention by the flash-attn package; the other ops as under "auto"
    sdpa        attention by torch, one call per run of equal segments; the other ops in plain torch
    eager       plain torch with the score matrix written out: slow, and the easiest to read

An explicit choice that can't run raises and says why; only "auto" chooses.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "flash_attn", "sdpa", "eager")
# All of them, as an image meets them: what else lists ops takes their names from here.
OPS = (
    "normalize_patchify",
    "rope_2d",
    "varlen_attention",
    "residual_layer_norm",
    "swiglu",
    "layer_norm_pixel_shuffle",
    "pixel_shuffle_linear",
)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATS = (*TRITON_DTYPES, torch.float64)  # of which the kernels leave the last to torch
_MIN_CAPABILITY = (8, 0)


def check_backend(backend: str) -> str:
    """Return `backend`, or raise ValueError when it is not one of :data:`BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


def check_floats(**tensors: Tensor) -> None:
    """Raise unless what is computed with, by its names, is of :data:`FLOATS`.

    Raises:
        TypeError: it is no tensor.
        ValueError: its dtype is another one.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        _check_float(name, value.dtype)


def check_result_dtype(dtype: torch.dtype) -> None:
    """Raise unless the `dtype` asked for is one of :data:`FLOATS`.

    Raises:
        TypeError: it is no dtype.
        ValueError: it is another one.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {dtype!r}")
    _check_float("dtype", dtype)


def _check_float(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, got {dtype}")


def resolve(op: str, backend: str, x: Tensor) -> str:
    """The backend that runs `op` on tensors like `x`: "triton", "flash_attn", "sdpa" or "eager".

    Raises:
        ValueError: `backend` is not a known name.
        RuntimeError: it was asked for by name and can't run here; the message says why.
    """
    check_backend(backend)
    torch_path = "sdpa" if op == "varlen_attention" else "eager"
    if backend == "flash_attn" and op != "varlen_attention":
        backend = "auto"
    if backend == "auto":
        obstacle = _auto_obstacle(x.device, x.dtype)
        return torch_path if obstacle else "triton"
    if backend in ("sdpa", "eager"):
        return backend if op == "varlen_attention" else "eager"
    obstacle = (triton_obstacle if backend == "triton" else flash_attn_obstacle)(x.device, x.dtype)
    if obstacle:
        raise RuntimeError(f"{op}: backend {backend!r} can't run: {obstacle}")
    return backend


def makes_graph() -> bool:
    """Whether what runs is written down for elsewhere: torch.export, or torch.jit.trace.

    Not torch.compile, which takes is_exporting for true (and so do exports with ``strict=True``).
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def choose_backend(op: str, backend: str, x: Tensor) -> str:
    """:func:`resolve`, a constant to torch.compile; torch's own ops where a graph is exported.

    Device and dtype of `x` decide, never its sizes, so that one graph serves them all.
    """
    if backend == "auto" and makes_graph():
        backend = "sdpa"
    if torch.compiler.is_compiling():
        return _choose(op, backend, x.device, x.dtype)
    return resolve(op, backend, x)


def _choose(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    return resolve(op, backend, torch.empty(0, dtype=dtype, device=device))


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo.
_choose.__dict__["_dynamo_marked_constant"] = True


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels can't take tensors of `dtype` on `device`; None when they can."""
    if not installed("triton"):
        return "Triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {dtype}"
    if device.type == "cpu":
        return _cpu_obstacle(dtype)
    if device.type != "cuda":
        return f"there are no kernels for device type {device.type!r}"
    return _gpu_obstacle(device)


def _auto_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu":  # what runs kernels there is for tests: only an explicit choice does
        return "the tensors are on the CPU"
    return triton_obstacle(device, dtype)


def _cpu_obstacle(dtype: torch.dtype) -> str | None:
    if interpreted():
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly; a GPU is needed"
        return None
    if cpu_driver() is None:
        return "the tensors are on the CPU (only TRITON_INTERPRET=1 runs kernels there)"
    return None


def flash_attn_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash-attn can't take tensors of `dtype` on `device`; None when it can."""
    if not installed("flash_attn") and not installed("torch.nn.attention.varlen"):
        return "neither the flash-attn package nor torch.nn.attention.varlen is installed"
    if device.type != "cuda":
        return f"flash-attn needs a GPU, the tensors are on {device.type!r}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 and bfloat16, not {dtype}"
    return _gpu_obstacle(device)


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def cpu_driver() -> Any | None:
    """Triton's active driver, where it compiles for an NVIDIA chip and takes CPU tensors; or None.

    No driver of Triton's does: one that executes compiled kernels without a GPU has to be set.
    """
    triton = sys.modules.get("triton")
    if triton is None or interpreted():
        return None
    try:
        driver = triton.runtime.driver.active
    except RuntimeError:  # there is no GPU, and none was set
        return None
    return driver if _runs_here(driver) else None


@lru_cache(maxsize=8)
def _runs_here(driver: Any) -> bool:
    runs_here = driver.get_active_torch_device().type == "cpu"
    return runs_here and driver.get_current_target().backend == "cuda"


def explain_backend(
    backend: str = "auto",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """A line per op: which backend runs it on this machine, and why.

    Args:
        backend: The choice to explain.
        device: Default: the GPU if there is one, else the CPU.
        dtype: Default: bfloat16 on a GPU, float32 on the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    example = torch.empty(0, dtype=dtype, device=device)
    return "\n".join(f"{op}: {_explain(op, backend, example)}" for op in OPS)


def _explain(op: str, backend: str, example: Tensor) -> str:
    where = f"{example.dtype} on {example.device}".replace("torch.", "")
    try:
        chosen = resolve(op, backend, example)
    except RuntimeError as error:
        return str(error).partition(": ")[2]
    if chosen == "triton":
        return f"triton ({where})"
    if backend == "auto":
        return f"{chosen} ({where}; no Triton: {_auto_obstacle(example.device, example.dtype)})"
    return f"{chosen} ({where}; backend={backend!r})"


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`; the meta device has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def installed(name: str) -> bool:
    """Whether the module `name` is there, not merely a namespace of that name."""
    try:
        spec = getattr(sys.modules.get(name), "__spec__", None) or importlib.util.find_spec(name)
        return spec is not None and spec.origin is not None
    except (ImportError, ValueError):
        return False


@lru_cache
def _gpu_obstacle(device: torch.device) -> str | None:
    if torch.version.hip:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        major, minor = capability
        return f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, the kernels need sm_80"
    return None
