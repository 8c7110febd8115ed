"""What a device reaches at best, for the rooflines: copying and multiplying."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hrvlm.measuring.timing import Run, take_turns


class Ceilings(NamedTuple):
    """What the device reaches at best, measured.

    Attributes:
        copy_bytes_per_second: Of a large copy, bytes read plus bytes written.
        flops_per_second: Of a large matrix product.
        product: Size and dtype of that product.
    """

    copy_bytes_per_second: float
    flops_per_second: float
    product: str


def measure_ceilings(device: torch.device, *, small: bool = False) -> Ceilings:
    """Copy bandwidth and the rate of a matrix product, on random data.

    A GPU copies 1 GiB and multiplies 8192^3 in bfloat16. The CPU copies 256 MiB and multiplies
    2048^3 in float32; `small` divides all sides by 4.
    """
    gpu = device.type != "cpu"
    count = (2**28 if gpu else 2**26) // (16 if small else 1)
    side = (8192 if gpu else 2048) // (4 if small else 1)
    dtype = torch.bfloat16 if gpu else torch.float32
    source = torch.rand(count, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    runs: dict[str, Run] = {
        "copy": lambda: target.copy_(source),
        "product": lambda: torch.mm(a, b, out=product),
    }
    for run in runs.values():
        run()
    timings = take_turns(runs, device, budget_s=1.0, max_rounds=20)
    return Ceilings(
        copy_bytes_per_second=2 * 4 * count / timings["copy"].median,
        flops_per_second=2 * side**3 / timings["product"].median,
        product=f"{side}^3 {str(dtype).removeprefix('torch.')}",
    )
