"""``hrvlm doctor``: versions, hardware, and which backend runs each op and why."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from typing import Any

import typer

from .. import __version__
from ..machine import first_line, installed_version, nvidia_driver
from .command import FAILURE, command
from .tables import print_line, print_table, quantity

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


def show(found: dict[str, Any]) -> None:
    """The findings of ``hrvlm doctor``."""
    lines = {
        "hrvlm": found["hrvlm"],
        "python": f"{found['python']} on {found['platform']}",
        **{name: version or "absent" for name, version in found["packages"].items()},
        **{
            f"extra: {extra}": ", ".join(f"{n} {v or 'absent'}" for n, v in names.items())
            for extra, names in found["extras"].items()
        },
        "CUDA": found["cuda"] or found["hip"] or "torch is built without",
        "driver": found["driver"] or "none found",
        **{
            f"GPU {i}": f"{gpu['name']}, capability {gpu['capability']}, "
            f"{quantity(gpu['memory_bytes'], 'B', base=1024)}"
            for i, gpu in enumerate(found["gpus"])
        },
        "CPU": f"{found['cpu']['cores']} cores, {found['cpu']['threads']} threads for torch, "
        f"{found['cpu']['capability']}",
    }
    if found["triton_interpreter"]:
        lines["TRITON_INTERPRET"] = "1: kernels run in the interpreter, which is for tests"
    print_table(["", ""], list(lines.items()), left=2, header=False)
    print_table(
        ["backend", "op", "what runs"],
        [
            (backend, op, what)
            for backend, ops in found["backends"].items()
            for op, what in ops.items()
        ],
        left=3,
    )
    for problem in found["problems"]:
        print_line(f"PROBLEM: {problem}")


def _check(found: dict[str, Any]) -> None:
    if found["problems"]:
        raise typer.Exit(FAILURE)


@command(show=show, check=_check)
def doctor() -> dict[str, Any]:
    """Versions, hardware, which backend runs an op and why."""
    return diagnose()


def diagnose() -> dict[str, Any]:
    """Everything ``hrvlm doctor`` shows, as plain data.

    Returns:
        ``hrvlm``, ``python``, ``platform``; ``packages`` and ``extras``, names to versions (None if
        absent); ``cpu``, ``gpus``, ``driver``; ``backends``, for each backend the ops and what runs
        them or why nothing can; ``problems``, sentences about what is broken.
    """
    import torch

    from hrvlm_kernels.backends import BACKENDS, interpreted

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
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
    }


def _explained(backend: str) -> dict[str, str]:
    from hrvlm_kernels import explain_backend

    lines = (line.partition(": ") for line in explain_backend(backend).splitlines())
    return {op: what for op, _, what in lines}


def _problems(installed: dict[str, str | None]) -> list[str]:
    import torch

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
