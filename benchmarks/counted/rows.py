"""Kernels that go over rows or bytes, and the projection: what is counted of them.

The elementwise ones do the same for every row, so that one pack stands for all: an image of 768 px.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.counted import linear, peers
from benchmarks.counted.attention import BF16, inputs
from benchmarks.counted.case import Case, Grid, Part, Sample, first, spread
from hrvlm_kernels import PackedGrids
from hrvlm_kernels.ops import linear_residual_layer_norm as norms
from hrvlm_kernels.ops.bias_gelu import bias_gelu
from hrvlm_kernels.ops.layer_norm_pixel_shuffle import layer_norm_pixel_shuffle
from hrvlm_kernels.ops.normalize_patchify import normalize_patchify
from hrvlm_kernels.ops.residual_layer_norm import residual_layer_norm
from hrvlm_kernels.ops.rope_2d import rope_2d
from hrvlm_kernels.ops.swiglu import swiglu
from hrvlm_kernels.triton_kernels import pixel_shuffle_linear as projection
from hrvlm_kernels.triton_kernels import pixel_shuffle_linear_backward as projection_backward
from hrvlm_kernels.triton_kernels.launch import cdiv
from hrvlm_kernels.triton_kernels.tilings import GemmConfig

GRID = (48, 48)
WIDTHS = (384, 768, 1024, 1280, 4096)  # DINOv3's S, B, L, H+ and 7B
PLAIN = (1536, 4096)  # between the products of S and L
GATED = (5120, 4304)  # H+; a width that no power of two divides
PROJECTIONS = ((384, 576), (1024, 1024), (1024, 4096))  # channels, features
FACTOR = 4
FEW = "pixel_shuffle_linear, few tokens"
SMALL_TILES = GemmConfig(64, 64, 64, 4, 4)  # of the textbook, for few tokens

Makers = Iterator[Callable[[], Case]]
Samples = Mapping[str, Sample]
NORM: Samples = {"gradients": spread(4), "layer_norm": spread(8)}


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BF16)


def _gradient(out: Tensor | tuple[Tensor, ...], leaves: list[Tensor]) -> Callable[[], object]:
    outs = (out,) if isinstance(out, Tensor) else out
    given = [torch.randn_like(a) for a in outs]
    return lambda: torch.autograd.grad(outs, leaves, given, retain_graph=True)


def rope_cases(folder: Path | None, head_dim: int) -> Makers:
    """Q and k of a packed product, and the peers."""
    n = 2309
    _, (q, k, _), rope = inputs([n], head_dim)
    elements = 2 * q.numel()
    ours = Case(
        op="rope_2d",
        size=f"D={head_dim}",
        variant="shipped",
        start=lambda: rope_2d(q, k, *rope, backend="triton"),
        unit="element",
        units=elements,
        least=2 * 2 * elements + 8 * n,
        samples={"rope_2d": spread(8)},
    )
    yield lambda: ours
    yield partial(peers.liger_rope, folder, ours, q, k)
    yield partial(peers.flash_attn_rope, folder, ours, q)


def norm_cases(folder: Path | None, width: int, op: str) -> Makers:
    """A norm, forward and backward; Liger's reads and writes once, as the shuffled one does."""
    packed = PackedGrids.from_grids([GRID])
    t = packed.total_tokens
    x, update = (_randn(t, width).requires_grad_() for _ in range(2))
    scale, weight, bias = (torch.randn(width).requires_grad_() for _ in range(3))
    leaves = [x, weight, bias]
    shuffled = partial(layer_norm_pixel_shuffle, x, packed, FACTOR, weight, bias, backend="triton")
    fused = partial(residual_layer_norm, x, update, scale, weight, bias, backend="triton")

    case = partial(_case, t, width, f"C={width}", NORM)
    if op == "residual_layer_norm":
        yield lambda: case(op, fused, 4, vectors=3)
        more = [*leaves, update, scale]
        yield lambda: case(f"{op} backward", _gradient(fused(), more), 6)
        return
    norm = case(op, shuffled, 2, vectors=2)
    yield lambda: norm
    yield lambda: case(f"{op} backward", _gradient(shuffled(), leaves), 3)
    yield partial(peers.liger_norm, folder, norm, x.detach(), weight.detach(), bias.detach())


def _case(
    t: int, width: int, size: str, samples: Samples,
    op: str, start: Callable[[], object], tensors: int, *, vectors: int = 0,
) -> Case:  # fmt: skip
    """So many ``[T, C]`` move; of a norm's forward also so many float32 ``[C]``, which all read."""
    least = tensors * 2.0 * t * width
    return Case(
        op=op,
        size=size,
        variant="shipped",
        start=start,
        unit="element",
        units=t * width,
        least=least,
        samples=samples,
        sharing={"layer_norm": least + 4 * vectors * width} if vectors else {},
    )


def training_norm_cases(width: int, op: str) -> Makers:
    """The norm behind a product and a residual, with the product's gradients; and that of a fold.

    The products themselves are torch's, and not counted.
    """
    t = GRID[0] * GRID[1]
    case = partial(_case, t, width, f"C={width}", NORM)
    x, a, square = _randn(t, width), _randn(t, width), _randn(width, width)
    bias, scale, weight, norm_bias = (torch.randn(width) for _ in range(4))
    if op == "shifted_layer_norm":
        fold = partial(norms.shifted_layer_norm, x, bias, weight, norm_bias, 1e-5)
        yield lambda: case(op, fold, 2, vectors=3)
        return
    leaves = [b.requires_grad_() for b in (x, a, square, bias, scale, weight, norm_bias)]
    both = partial(norms.linear_residual_layer_norm, *leaves, 1e-5)
    yield lambda: case(op, both, 4, vectors=4)
    yield lambda: case(f"{op} backward", _gradient(both(), leaves), 5)


def gelu_cases(width: int) -> Makers:
    """GELU and the bias before it, as a pass of its own."""
    t = GRID[0] * GRID[1]
    x, bias = _randn(t, width).requires_grad_(), torch.randn(width).requires_grad_()
    case = partial(_case, t, width, f"F={width}", {"bias_gelu": spread(8)})
    yield lambda: case("bias_gelu", partial(bias_gelu, x.detach(), bias.detach()), 2)
    yield lambda: case("bias_gelu backward", _gradient(bias_gelu(x, bias), [x, bias]), 3)


def swiglu_cases(folder: Path | None, width: int) -> Makers:
    """Gate and up are halves of a product."""
    t = 64
    gate, up = (a.requires_grad_() for a in _randn(t, 2 * width).chunk(2, 1))
    ours = Case(
        op="swiglu",
        size=f"F={width}",
        variant="shipped",
        start=partial(swiglu, gate, up, backend="triton"),
        unit="element",
        units=t * width,
        least=3 * 2 * t * width,
        samples={"swiglu": spread(10)},
    )
    yield lambda: ours
    yield lambda: replace(
        ours,
        op="swiglu backward",
        start=_gradient(swiglu(gate, up, backend="triton"), [gate, up]),
        least=5 * 2 * t * width,
    )
    yield partial(peers.liger_swiglu, folder, ours, gate.detach(), up.detach())


def patchify_cases(patch: int) -> Makers:
    """An image of 24 x 24 patches."""
    images = torch.randint(0, 256, (1, 3, 24 * patch, 24 * patch), dtype=torch.uint8)
    mean = (0.5, 0.5, 0.5)
    yield lambda: Case(
        op="normalize_patchify",
        size=f"p={patch}",
        variant="shipped",
        start=lambda: normalize_patchify(images, patch, mean, mean, dtype=BF16, backend="triton"),
        unit="element",
        units=images.numel(),
        least=3 * images.numel(),
        samples={"normalize_patchify": spread(8)},
    )


def projection_cases(chip: int, channels: int, features: int) -> Makers:
    """Forward, dx and dweight of eight images of 1024 px; one tile stands for all."""
    packed = PackedGrids.from_grids([(64, 64)] * 8, num_prefix_tokens=5)
    index, k = packed.shuffle_index(FACTOR), FACTOR**2 * channels
    rows = index.shape[0]
    x, weight, bias = _randn(packed.total_tokens, channels), _randn(features, k), _randn(features)
    dy, out = _randn(rows, features), torch.zeros(rows, features, dtype=BF16)
    least = 2.0 * (rows * k + features * k + rows * features)

    def case(part: str, start: Callable[[], object]) -> Case:
        return Case(
            op=f"pixel_shuffle_linear{part}",
            size=f"C={channels} N={features}",
            variant="shipped",
            start=start,
            unit="thousand product",
            units=rows * features * k / 1000,
            flops=2 * rows * features * k,
            least=least,
            samples={"add_parts": spread(4), "zero_prefix": spread(2), "pixel_shuffle": first},
            sharing=dict.fromkeys(
                ("linear_forward", "linear_dx", "linear_dweight", "matmul"), least
            ),
        )

    whole = case("", lambda: projection.forward(x, index, weight, bias, out, parts=1))
    yield lambda: whole
    if channels * features <= 2**20:
        grads = torch.zeros_like(x), torch.zeros_like(weight)
        layout = index, packed.cu_seqlens, packed.num_prefix_tokens
        dx = partial(projection_backward.backward_dx, dy, weight, *layout, grads[0])
        dweight = partial(projection_backward.backward_dweight, dy, x, index, grads[1])
        yield lambda: case(" dx", dx)
        yield lambda: case(" dweight", dweight)
    config = projection.select_configs(f"sm_{chip}", BF16)[0]
    yield lambda: peers.matmul_case(whole, _randn(rows, k), weight, config)


def few_tokens_cases(chip: int, channels: int, features: int) -> Makers:
    """The forward of one image of 1024 px that has the chip to itself: a sum in parts."""
    packed = PackedGrids.from_grids([(64, 64)], num_prefix_tokens=5)
    index, k = packed.shuffle_index(FACTOR), FACTOR**2 * channels
    rows = index.shape[0]
    x, weight, bias = _randn(packed.total_tokens, channels), _randn(features, k), _randn(features)
    out = torch.zeros(rows, features, dtype=BF16)

    def count(config: GemmConfig) -> tuple[int, int]:
        tiles = cdiv(rows, config.block_m) * cdiv(features, config.block_n)
        return tiles, FACTOR**2 * cdiv(channels, config.block_k)

    def check() -> None:
        exact = weight[:64].float() @ x[index[0]].flatten().float() + bias[:64].float()
        error = (out[0, :64].float() - exact).norm() / exact.norm()
        assert error < 0.01, f"off by {error:.3f}"

    config = projection.select_configs(f"sm_{chip}", BF16)[0]
    parts = projection.plan_product(config, count, x, None).parts
    read, written = 2.0 * (rows + features) * k, 2.0 * rows * features
    ours = Case(
        op=FEW,
        size=f"C={channels} N={features}",
        variant="shipped",
        start=lambda: projection.forward(x, index, weight, bias, out),
        unit="thousand product",
        units=rows * features * k / 1000,
        flops=2 * rows * features * k,
        least=read + written,
        samples={"add_parts": spread(4), "pixel_shuffle": parts_of_a_tile},
        sharing={"linear_forward": read + (2 * parts if parts > 1 else 1) * written},
        alone=True,
        check=check,
    )
    yield lambda: ours
    shuffled = replace(ours, sharing={"matmul": read + written}, check=None)
    for tiles in (config, SMALL_TILES):
        yield partial(peers.matmul_case, shuffled, _randn(rows, k), weight, tiles)


def parts_of_a_tile(grid: Grid) -> list[Part]:
    """A grid of tiles, then parts of their sums: all parts of the first tile, which add up."""
    return [(range(0, grid[0] * grid[1], grid[0]), float(grid[0]))]


def makers(chip: int, folder: Path | None) -> Iterator[tuple[str, Callable[[], Makers]]]:
    """(op, what makes its cases one by one)."""
    for head_dim in (64, 128):
        yield "rope_2d", partial(rope_cases, folder, head_dim)
    for channels, features in PROJECTIONS:
        yield "pixel_shuffle_linear", partial(projection_cases, chip, channels, features)
        yield FEW, partial(few_tokens_cases, chip, channels, features)
    for width in WIDTHS:
        for op in ("layer_norm_pixel_shuffle", "residual_layer_norm"):
            yield op, partial(norm_cases, folder, width, op)
        for op in ("shifted_layer_norm", "linear_residual_layer_norm"):
            yield op, partial(training_norm_cases, width, op)
    for width in PLAIN:
        yield "bias_gelu", partial(gelu_cases, width)
    for op, sizes in linear.SIZES.items():
        for channels, features in sizes:
            yield op, partial(linear.cases, op, chip, channels, features)
    yield "linear_rope_2d", partial(linear.rotations, chip)
    yield "attention forward with RoPE", partial(linear.attention_of_rotated, chip)
    for width in GATED:
        yield "swiglu", partial(swiglu_cases, folder, width)
    for patch in (16, 14):
        yield "normalize_patchify", partial(patchify_cases, patch)
