"""Which kernel of torch's scaled_dot_product_attention ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

# By what the name of the operation behind it has; on the CPU "flash" has another implementation.
_KERNELS = {
    "scaled_dot_product_cudnn": "cuDNN",
    "scaled_dot_product_flash": "flash",
    "scaled_dot_product_efficient": "efficient",
    "scaled_dot_product_attention_math": "math",
}


def sdpa_of(run: Callable[[], Result]) -> tuple[Result, str | None]:
    """What `run` returns, and the kernels of its attention: "cuDNN", say, or "flash, math".

    By the names of the operations that the host queues, so that compiled code is seen too. None
    where there is none of these: no attention, another library's, or a CUDA graph's replay.
    """
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, acc_events=True) as profile:
        result = run()
    names = {event.key for event in profile.key_averages()}
    found = [kernel for part, kernel in _KERNELS.items() if any(part in name for name in names)]
    return result, ", ".join(found) or None
