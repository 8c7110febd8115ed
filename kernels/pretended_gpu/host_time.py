"""The host's time of an op on the null driver, bound against Triton's own way, in one run.

    PYTHONPATH=kernels:. python -m pretended_gpu.host_time

:func:`by_triton` is the way that every launch took before kernels were bound: torch's dispatcher
for the op, and ``JITFunction.run``. It is a time of Python and C on this CPU, and nothing of a GPU.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from . import null_driver


@contextmanager
def by_triton() -> Iterator[None]:
    """Launch as before inside the block."""
    import triton

    from hrvlm_kernels import triton_kernels
    from hrvlm_kernels.ops import torch_op

    changes = [mock.patch.object(torch_op, "_needs_no_dispatch", lambda args: False)]
    for found in pkgutil.iter_modules(triton_kernels.__path__):
        module = importlib.import_module(f"{triton_kernels.__name__}.{found.name}")
        for name, value in vars(module).copy().items():
            if name in ("cdiv", "next_power_of_2"):
                changes.append(mock.patch.object(module, name, getattr(triton, name)))
            elif getattr(value, "__module__", None) == module.__name__:
                run: Any = getattr(value, "run", None)
                if hasattr(run, "by_triton"):
                    changes.append(mock.patch.object(value, "run", run.by_triton))
    for change in changes:
        change.start()
    try:
        yield
    finally:
        for change in changes:
            change.stop()


def microseconds(run: Callable[[], object], *, rounds: int = 9, calls: int = 60) -> list[float]:
    """Of `run`: as before, and bound; the least of rounds that take turns."""
    best = [float("inf")] * 2
    for _ in range(rounds):
        for i, way in enumerate((by_triton, _bound)):
            with way():
                run()
                begun = time.process_time_ns()
                for _ in range(calls):
                    run()
                best[i] = min(best[i], (time.process_time_ns() - begun) / calls / 1e3)
    return best


@contextmanager
def _bound() -> Iterator[None]:
    yield


def ops() -> dict[str, Callable[[], object]]:
    """What a layer of ViT-L launches in inference, as calls without arguments."""
    import torch

    from hrvlm_kernels import PackedGrids, residual_layer_norm, swiglu, varlen_attention
    from hrvlm_kernels.ops.linear_residual_layer_norm import shifted_layer_norm
    from hrvlm_kernels.triton_kernels import residual_layer_norm as kernels

    def attention(grid: tuple[int, int]) -> Callable[[], object]:
        packed = PackedGrids.from_grids([grid], num_prefix_tokens=5)
        q, k, v = torch.randn(packed.total_tokens, 3, 16, 64).bfloat16().unbind(1)
        rope = packed.coords, torch.rand(16)
        return lambda: varlen_attention(q, k, v, packed, rope=rope, backend="triton")

    x, gate = torch.randn(201, 1024).bfloat16(), torch.randn(201, 4096).bfloat16()
    w, shift, out = x[0].clone(), x[0].float(), torch.empty_like(x)
    kernel = kernels.residual_layer_norm_forward
    constants = {"C": 1024, "HAS_UPDATE": False, "HAS_SHIFT": True, "HAS_BIAS": True}
    tile = {"BR": 1, "BC": 1024, "num_warps": 4}
    rest = (None, out, 201, 1024, 1, 0, 0, 1e-5)
    return {
        "a kernel alone": lambda: kernel[(201,)](
            x, None, None, shift, w, w, *rest, **constants, **tile
        ),
        "shifted_layer_norm": lambda: shifted_layer_norm(x, shift, w, w, 1e-5),
        "residual_layer_norm": lambda: residual_layer_norm(x, x, w, w, w, backend="triton"),
        "swiglu": lambda: swiglu(gate, gate, backend="triton"),
        "attention, 224 px": attention((14, 14)),
        "attention, 288 px": attention((18, 18)),
    }


def main() -> None:
    """Print the table."""
    import torch

    driver = null_driver.install()
    with torch.no_grad():
        for name, run in ops().items():
            run()
            before = driver.launches()
            run()
            launches = driver.launches() - before
            old, new = microseconds(run)
            print(f"{name:22} {launches} launches  {old:6.1f} us  {new:6.1f} us  {new / old:.2f}")


if __name__ == "__main__":
    main()
