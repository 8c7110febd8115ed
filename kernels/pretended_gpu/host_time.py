"""The host's time of an op on the null driver, replayed against Triton's own way, in one run.

    PYTHONPATH=kernels:. python -m pretended_gpu.host_time

:func:`by_triton` is the way that every launch took before kernels were bound and calls replayed:
all checks, torch's dispatcher for the op, and ``JITFunction.run``. It is a time of Python and C on
this CPU, and nothing of a GPU.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

from . import null_driver

RECORDED = "with a gradient"  # the one call that records it


@contextmanager
def by_triton() -> Iterator[None]:
    """Launch as before inside the block."""
    import triton

    from hrvlm_kernels import replay, triton_kernels
    from hrvlm_kernels.ops import torch_op

    changes: list[Any] = [
        mock.patch.object(torch_op, "_route", lambda args: "torch"),
        mock.patch.object(replay, "place", None),
    ]
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


class Times(NamedTuple):
    """Of one call."""

    before: float  # microseconds by Triton's way, the least of all rounds
    now: float  # likewise, as it is
    ratio: float  # the median of the rounds


def measure(run: Callable[[], object], *, rounds: int = 15, calls: int = 40) -> Times:
    """Of `run`, in rounds in which both ways take turns."""
    times = []
    for _ in range(rounds):
        both = []
        for way in (by_triton, nullcontext):
            with way():
                for _ in range(3):
                    run()
                begun = time.process_time_ns()
                for _ in range(calls):
                    run()
                both.append((time.process_time_ns() - begun) / calls / 1e3)
        times.append(both)
    before, now = (min(column) for column in zip(*times, strict=True))
    return Times(before, now, median(new / old for old, new in times))


def ops() -> dict[str, Callable[[], object]]:
    """What layers of ViT-L launch, as calls without arguments."""
    import torch

    from hrvlm_kernels import PackedGrids, residual_layer_norm, swiglu, varlen_attention
    from hrvlm_kernels.ops.bias_gelu import bias_gelu
    from hrvlm_kernels.ops.linear_residual_layer_norm import shifted_layer_norm
    from hrvlm_kernels.ops.torch_op import ops as kernels

    def rows(width: int) -> Any:
        return torch.randn(201, width).bfloat16()

    def attention(grid: tuple[int, int]) -> Callable[[], object]:
        packed = PackedGrids.from_grids([grid], num_prefix_tokens=5)
        q, k, v = torch.randn(packed.total_tokens, 3, 16, 64).bfloat16().unbind(1)
        rope = packed.coords, torch.rand(16)
        return lambda: varlen_attention(q, k, v, packed, rope=rope, backend="triton")

    x, update, g, h = (rows(1024) for _ in range(4))
    gate, up = rows(4096), rows(4096)
    w, b, scale = (torch.rand(1024).bfloat16() for _ in range(3))
    up_bias, shift = torch.rand(4096).bfloat16(), torch.rand(1024)
    product, weight = (torch.rand(1024, 64).bfloat16() for _ in range(2))
    parts = torch.rand(3, 132, 1024)
    leaf = rows(4096).requires_grad_()

    return {
        "shifted_layer_norm": lambda: shifted_layer_norm(x, shift, w, b, 1e-5),
        "attention, 224 px": attention((14, 14)),
        "attention, 288 px": attention((18, 18)),
        "swiglu": lambda: swiglu(gate, up, backend="triton"),
        "by torch's dispatcher": lambda: torch.ops.hrvlm_kernels.swiglu.default(gate, up),
        "residual_layer_norm": lambda: residual_layer_norm(
            x, update, scale, w, b, backend="triton"
        ),
        "its backward": lambda: kernels.biased_residual_layer_norm_backward(
            g, h, x, scale, w, 1e-5, 132
        ),
        "gradients of a product": lambda: kernels.linear_residual_gradients(
            product, weight, scale, b, parts, w
        ),
        "bias_gelu": lambda: bias_gelu(gate, up_bias),
        RECORDED: lambda: bias_gelu(leaf, up_bias),
    }


def new_layouts(rounds: int = 240) -> dict[str, float]:
    """Milliseconds of CPU time of a layout of 64 images in a mix that was not seen before.

    The 10th percentile of the rounds, by what else was seen: each of the sizes, or none. A GPU's
    layouts are all written into the same pinned memory, and here each is dropped before the next.
    A CPU's are kept, 64 of them: the first third of the rounds fills memory that the process never
    had before, and is left out; in it the sizes are seen for the first time, too.
    """
    import random

    from hrvlm_kernels import PackedGrids, packed_grids, packed_tables

    rng, taken = random.Random(0), {}
    sizes = [(4 * rng.randint(4, 16), 4 * rng.randint(4, 16)) for _ in range(200)]
    for what in ("sizes seen", "sizes seen, and layouts kept", "sizes not seen"):
        times = []
        for _ in range(rounds):
            mix = rng.choices(sizes, k=64)
            if "kept" not in what:
                packed_grids._build_cached.cache_clear()
            if "not" in what:
                for value in vars(packed_tables).values():
                    getattr(value, "cache_clear", lambda: None)()
            start = time.process_time()
            PackedGrids.from_grids(mix, num_prefix_tokens=5, shuffle_factors=(4,))
            times.append((time.process_time() - start) * 1000)
        times = times[rounds // 3 :]
        taken[what] = sorted(times)[len(times) // 10]
    return taken


def main() -> None:
    """Print the table."""
    import torch

    driver = null_driver.install()
    for name, run in ops().items():
        with torch.set_grad_enabled(name == RECORDED):
            run()
            before = driver.launches()
            run()
            launches = driver.launches() - before
            old, new, ratio = measure(run)
        print(f"{name:22} {launches} launches  {old:6.1f} us  {new:6.1f} us  {ratio:.2f}")
    for name, milliseconds in new_layouts().items():
        print(f"a new layout of 64 images, {name}: {milliseconds:.2f} ms")


if __name__ == "__main__":
    main()
