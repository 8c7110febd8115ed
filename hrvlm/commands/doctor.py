"""What is installed here, what hardware there is, and which backend runs each op and why."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from typing import Any

import torch

from hrvlm_kernels import explain_backend
from hrvlm_kernels.backends import BACKENDS, interpreted

from .. import __version__
from ..machine import first_line, installed_version, nvidia_driver

CORE = (
    "torch",
    "torchvision",
    "triton",
    "transformers",
    "huggingface-hub",
    "safetensors",
    "numpy",
    "Pillow",
)
# By the extra of pyproject.toml that brings them.
EXTRAS = {
    "flash-attn": ("flash-attn",),
    "train": ("accelerate", "datasets", "tensorboard"),
    "serve": ("fastapi", "openai", "uvicorn"),
    "scale": ("ray",),
    "dev": ("pytest", "timm"),
}
# Compiled packages that may be installed and still not load (built for another torch, say).
_COMPILED = {"torchvision": "torchvision", "triton": "triton", "flash-attn": "flash_attn"}


def diagnose() -> dict[str, Any]:
    """Everything ``hrvlm doctor`` shows, as plain data.

    Returns:
        ``hrvlm``, ``python``, ``platform``; ``packages`` and ``extras``, names to versions (None if
        absent); ``cpu``, ``gpus``, ``driver``; ``backends``, for each backend the ops and what runs
        them or why nothing can; ``problems``, sentences about what is broken.
    """
    packages = {name: installed_version(name) for name in CORE}
    extras = {
        extra: {name: installed_version(name) for name in names} for extra, names in EXTRAS.items()
    }
    installed = packages | extras["flash-attn"]
    return {
        "hrvlm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "extras": extras,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": nvidia_driver(),
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "cpu": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "triton_interpreter": interpreted(),
        "backends": {name: _explained(name) for name in BACKENDS},
        "problems": _problems(installed),
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
    }


def _explained(backend: str) -> dict[str, str]:
    lines = (line.partition(": ") for line in explain_backend(backend).splitlines())
    return {op: what for op, _, what in lines}


def _problems(installed: dict[str, str | None]) -> list[str]:
    problems = []
    for distribution, module in _COMPILED.items():
        if installed[distribution] is None:
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken binary raises anything
            version = installed[distribution]
            problems.append(f"{distribution} {version} does not import: {first_line(error)}")
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        build = torch.version.cuda or torch.version.hip or "the CPU only"
        problems.append(f"nvidia-smi is here, but torch (built for {build}) sees no GPU")
    return problems
