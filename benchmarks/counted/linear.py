"""Products with an activation or a rotation in their epilogues, and the same with a pass for it.

One tile of a product stands for all, one of q for those of v. What the epilogue adds counts as
serial, though the products of another program may run beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.counted import textbook
from benchmarks.counted.attention import (
    BF16,
    HEADS,
    PACKS,
    ROTATED_HEAD_DIMS,
    forward_case,
    positions,
)
from benchmarks.counted.case import Case, Grid, Later, Part, first, spread
from hrvlm_kernels.ops import linear_gelu as gelu_op
from hrvlm_kernels.ops import linear_swiglu as swiglu_op
from hrvlm_kernels.triton_kernels import (
    bias_gelu,
    linear_gelu,
    linear_rope_2d,
    linear_swiglu,
    rope_2d,
    swiglu,
)

TOKENS = 4096
ROTATED = "rotated in the product"
PASS = "the same product, then rope_2d"
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


class _QKV:
    """The product that makes q, k and v of a pack, 16 heads, with their rotation."""

    def __init__(self, chip: int, size: str, head_dim: int):
        rng = torch.Generator().manual_seed(0)
        n, width = sum(PACKS[size]), HEADS * head_dim
        self.config = linear_gelu.configs_of("LINEAR_ROPE_2D", f"sm_{chip}", BF16)[0]
        self.rope, self.table = positions(n, head_dim, rng), torch.zeros(n, head_dim)
        angle = 2 * torch.pi * self.rope[0][:, :, None] * self.rope[1]
        self.exact = torch.stack((angle.cos(), angle.sin()), 1).flatten(1)
        self.x = torch.zeros(n, width, dtype=BF16)
        self.x[: self.config.block_m].normal_(generator=rng)  # the tile that runs
        self.weight = torch.randn(3 * width, width, generator=rng).div(width**0.5).to(BF16)
        self.out = torch.zeros(n, 3, HEADS, head_dim, dtype=BF16)
        self.moved = 2.0 * (self.x.numel() + self.weight.numel() + self.out.numel())
        self.sharing = {"linear_rope": self.moved + self.table.nbytes, "linear": self.moved}

    def start(self) -> None:
        linear_rope_2d.forward(self.x, self.weight, None, self.exact, self.out)

    def start_plain(self) -> None:
        textbook.start_linear(self.x, self.weight, self.out.view(len(self.x), -1), self.config)

    def start_pass(self) -> None:
        q, k, _ = self.out.unbind(1)
        rope_2d.rotate_heads(q, k, *self.rope, False, q, k)

    def check(self) -> None:
        """The tile that ran is right."""
        head_dim = self.table.shape[1]
        rows, heads = min(len(self.x), self.config.block_m), self.config.block_n // head_dim
        qkv = self.x[:rows].float() @ self.weight[: heads * head_dim].float().T
        left, right = qkv.unflatten(1, (heads, head_dim)).chunk(2, -1)
        cos, sin = self.exact[:rows, None].chunk(2, -1)
        exact = torch.cat((left * cos - right * sin, right * cos + left * sin), -1)
        error = (self.out[:rows, 0, :heads].float() - exact).norm() / exact.norm()
        assert error < 0.01, f"off by {error:.3f}"


def rotations(chip: int) -> Iterator[Later]:
    """Of every pack: the kernel, then the product without it and a pass over q and k."""
    for head_dim in ROTATED_HEAD_DIMS:
        for size in PACKS:
            for variant in ("shipped", PASS):
                name = "linear_rope_2d", _size_of(size, head_dim), variant
                yield Later(name, partial(_rotation_case, chip, size, head_dim, variant))


def _size_of(size: str, head_dim: int) -> str:
    return f"{size} C={HEADS * head_dim} D={head_dim}"


def _rotation_case(chip: int, size: str, head_dim: int, variant: str) -> Case:
    qkv = _QKV(chip, size, head_dim)
    ours = Case(
        op="linear_rope_2d",
        size=_size_of(size, head_dim),
        variant="shipped",
        start=qkv.start,
        plain=qkv.start_plain,
        unit="element",
        units=qkv.out.numel(),
        samples={"linear": first},
        flops=2 * qkv.x.numel() * qkv.weight.shape[0],
        least=qkv.moved + qkv.table.nbytes,
        sharing=qkv.sharing,
        check=qkv.check,
    )
    if variant == "shipped":
        return ours
    return replace(
        ours,
        variant=variant,
        role="peer",
        start=lambda: (qkv.start_plain(), qkv.start_pass()),
        plain=None,
        samples={"linear": first, "rope_2d": spread(4)},
        check=None,
    )


def _rotated_tiles(grid: Grid) -> list[Part]:
    """A tile of q, for those of q and k: v's do nothing more."""
    return [([0], grid[0] * 2 / 3)]


def attention_of_rotated(chip: int) -> Iterator[Later]:
    """The forward with RoPE, rotated in the product: what that adds there, the table, attention."""
    for head_dim in ROTATED_HEAD_DIMS:
        for size in PACKS:
            name = "attention forward with RoPE", f"{size} D={head_dim}", ROTATED
            yield Later(name, partial(_attention_case, chip, size, head_dim))


def _attention_case(chip: int, size: str, head_dim: int) -> Case:
    qkv, attention = _QKV(chip, size, head_dim), forward_case(size, head_dim, rotate=False)
    return replace(
        attention,
        op="attention forward with RoPE",
        variant=ROTATED,
        start=lambda: (qkv.start(), rope_2d.write_table(*qkv.rope, qkv.table), attention.start()),
        plain=qkv.start_plain,
        epilogue_alone=True,
        samples={"linear": _rotated_tiles, **attention.samples},
        sharing={**qkv.sharing, **attention.sharing},
        check=qkv.check,
    )
