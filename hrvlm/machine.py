"""The machine underneath: devices, dtypes by name, versions. torch is imported when it is asked."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Bytes of a number, by torch's name for its dtype: all that weights are stored in.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Those that an encoder runs in; DINOv3's activations overflow float16.
MODEL_DTYPES = ("float32", "bfloat16")


def check_dtype(name: str, among: Sequence[str], argument: str = "dtype") -> str:
    """The name of a dtype, if it is one of those.

    Raises:
        ValueError: it isn't; the message names the argument.
    """
    if name not in among:
        raise ValueError(f"{argument} must be one of {', '.join(among)}; got {name!r}")
    return name


def torch_dtype(name: str, among: Sequence[str] = tuple(DTYPE_BYTES)) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ValueError: the name is none of `among`.
    """
    import torch

    dtype: torch.dtype = getattr(torch, check_dtype(name, among))
    return dtype


def default_dtype(device: torch.device) -> str:
    """Name of the dtype that an encoder runs in unless told: bfloat16 on a GPU, else float32."""
    return "float32" if device.type == "cpu" else "bfloat16"


def pick_device(device: str | None) -> torch.device:
    """The device of that name; by default the GPU if there is one, else the CPU.

    Raises:
        ValueError: torch has no such device here.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {device!r} can't be used: {first_line(error)}") from error
    return chosen


def synchronize(device: torch.device) -> None:
    """Wait for everything queued on `device`."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


def device_name(device: torch.device) -> str:
    """What the maker calls the GPU or CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def describe_device(device: torch.device) -> dict[str, Any]:
    """The device and the versions that a time depends on, as plain data."""
    import torch

    packages = ("torch", "triton", "transformers", "torchvision", "timm", "Pillow", "flash-attn")
    gpu = device.type == "cuda"
    return {
        "type": device.type,
        "device": device_name(device),
        "driver": nvidia_driver() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "hip": torch.version.hip if gpu else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{name.lower().replace("-", "_"): installed_version(name) for name in packages},
        "flash_attn_4": installed_version("flash-attn-4"),
    }


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution; None if it is absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_driver() -> str | None:
    """Version of the NVIDIA driver, which torch does not tell."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    versions = out.stdout.split()
    return versions[0] if versions else None


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
