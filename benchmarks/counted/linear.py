"""The up-projection with its activation, and the same product with the activation in a pass.

One tile of a product stands for all. What bias and activation add to it counts as serial, though
the products of another program may run beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.counted import textbook
from benchmarks.counted.attention import BF16
from benchmarks.counted.case import Case, first, spread
from hrvlm_kernels.ops import linear_gelu as gelu_op
from hrvlm_kernels.ops import linear_swiglu as swiglu_op
from hrvlm_kernels.triton_kernels import bias_gelu, linear_gelu, linear_swiglu, swiglu

TOKENS = 4096
SIZES = {  # C and F of DINOv3's S and L, of H+ and 7B
    "linear_gelu": ((384, 1536), (1024, 4096)),
    "linear_swiglu": ((1280, 5120), (4096, 8192)),
}


def cases(op: str, chip: int, channels: int, width: int) -> Iterator[Callable[[], Case]]:
    """The kernel, then the product without it and a pass."""
    gated, t = op == "linear_swiglu", TOKENS
    x, weight, up = (
        torch.randn(n, channels).div(channels**0.25).to(BF16) for n in (t, width, width)
    )
    bias, other_bias = torch.randn(2, width).to(BF16)
    out, z, z_up = (torch.zeros(t, width, dtype=BF16) for _ in range(3))
    config = linear_gelu.configs_of(op.upper(), f"sm_{chip}", BF16)[0]
    both = torch.cat((weight, up)) if gated else weight
    wide = torch.zeros(t, len(both), dtype=BF16)
    inputs = (x, weight, up, bias, other_bias) if gated else (x, weight, bias)

    def pass_alone() -> None:
        if gated:
            swiglu.forward(z, z_up, out)
        else:
            bias_gelu.forward(z, bias, out)

    def product_and_pass() -> None:
        textbook.start_linear(x, weight, z, config)
        if gated:
            textbook.start_linear(x, up, z_up, config)
        pass_alone()

    products = 2 if gated else 1
    moved = 2.0 * (t * channels + width * channels + t * width)
    read = 2.0 * (t * channels + products * width * channels)
    ours = Case(
        op=op,
        size=f"C={channels} F={width}",
        variant="shipped",
        start=lambda: (linear_swiglu if gated else linear_gelu).forward(*inputs, out),
        plain=lambda: textbook.start_linear(x, both, wide, config),
        unit="element",
        units=t * width,
        samples={"linear": first},
        flops=2 * products * t * width * channels,
        least=read + 2 * t * width,
        sharing={"linear": read + 2 * t * width},
        check=lambda: _check(op, inputs, out, config.block_m, config.block_n // products),
    )
    yield lambda: ours
    name = "swiglu" if gated else "bias_gelu"
    yield lambda: replace(
        ours,
        variant=f"the same product, then {name}",
        role="peer",
        start=product_and_pass,
        plain=None,
        samples={"linear": first, "_forward": spread(4)},
        sharing={"linear": moved, "_forward": 2.0 * (1 + products) * t * width},
        check=None,
    )


def _check(op: str, inputs: tuple[Tensor, ...], out: Tensor, rows: int, columns: int) -> None:
    """The tile that ran is right: the counts are of a kernel that computes it."""
    x, *others = inputs
    tile = (x[:rows].float(), *(a[:columns].float() for a in others))
    run = swiglu_op.linear_swiglu if op == "linear_swiglu" else gelu_op.linear_gelu
    exact = run(*tile, backend="eager")
    error = (out[:rows, :columns].float() - exact).norm() / exact.norm()
    assert error < 0.01, f"off by {error:.3f}"
