"""pixel_shuffle_linear against a copy and a GEMM, forward and backward, and the bare GEMM.

    python -m pytest benchmarks/bench_pixel_shuffle_linear.py

C = 1024, N = 1024 or 4096, about 16k tokens in images of 224 px (factor 2: 14 patches are no
multiple of 4), 768 and 1024 px (factor 4), one image of 1024 px, and the mixed draw with its sides
rounded to multiples of 4 patches, as the image processor does. The bare GEMM multiplies rows that
are shuffled already: the bound. "backward" gives the gradients of x, weight and bias, over the
graph of one forward. "after LayerNorm" begins with the encoder's last norm, where ours has two
routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import (
    MIXED_SIZES,
    OURS,
    PREFIX_TOKENS,
    Case,
    Outputs,
    Prepared,
    Rival,
    Run,
    Settings,
    runner,
)
from hrvlm.images.geometry import token_grid
from hrvlm_kernels import (
    PackedGrids,
    layer_norm_pixel_shuffle_linear,
    pixel_shuffle_linear,
    reference,
)

SUITE, DEVICE, BUDGET_S = "pixel_shuffle_linear", "cuda", 25

TOKENS = 16384
EPS = 1e-5
DIRECTIONS = ("forward after LayerNorm", "forward", "backward")


class Shape(NamedTuple):
    """What is shuffled and projected: grids, factor, C and N."""

    grids: list[tuple[int, int]]
    factor: int
    channels: int
    width: int


Project = Callable[[Tensor, Tensor, Tensor], Tensor]
MakeProject = Callable[[PackedGrids, int], Project]


def shuffle(x: Tensor, packed: PackedGrids, factor: int) -> Tensor:
    """View, permute and contiguous, as in nanoVLM: a batch of equal sizes, or image by image."""
    grids, prefix, s = packed.grids or (), packed.num_prefix_tokens, factor
    if len(set(grids)) == 1:
        hp, wp = grids[0]
        patches = x.unflatten(0, (len(grids), packed.max_seqlen))[:, prefix:]
        return _shuffled(patches, hp, wp, s).flatten(0, 1)
    rows = [
        _shuffled(part[None, prefix:], hp, wp, s)[0]
        for part, (hp, wp) in zip(x.split(packed.lengths), grids, strict=True)
    ]
    return torch.cat(rows)


def _shuffled(patches: Tensor, hp: int, wp: int, s: int) -> Tensor:
    """``[B, hp*wp, C]`` to ``[B, gh*gw, s*s*C]``."""
    batch, _, channels = patches.shape
    x = patches.reshape(batch, hp // s, s, wp // s, s, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, -1, s * s * channels)


def copy_and_gemm(packed: PackedGrids, factor: int) -> Project:
    """View, permute, contiguous, and the library's GEMM."""
    return lambda x, weight, bias: F.linear(shuffle(x, packed, factor), weight, bias)


def gather_and_gemm(packed: PackedGrids, factor: int) -> Project:
    """One gather by an index made beforehand, and the library's GEMM."""
    index = packed.shuffle_index(factor)
    return lambda x, weight, bias: F.linear(x[index].flatten(1), weight, bias)


# What the name calls compiled is to be compiled with all that comes before it.
PEERS: dict[str, MakeProject] = {
    "view, permute, contiguous + GEMM": copy_and_gemm,
    "the same, compiled": copy_and_gemm,
    "index + GEMM": gather_and_gemm,
}


def image_sets(settings: Settings) -> dict[str, tuple[list[tuple[int, int]], int]]:
    """Patch grids and factor by what they are called in names."""
    if settings.small:
        return {"224 px": ([(4, 4)] * 3, 2), "mixed": ([(2, 4), (4, 6)], 2)}
    sets = {}
    for side, factor in ((14, 2), (48, 4), (64, 4)):
        count = max(1, round(TOKENS / (PREFIX_TOKENS + side * side)))
        sets[f"{16 * side} px"] = [(side, side)] * count, factor
    sets["one of 1024 px"] = [(64, 64)], 4
    snapped = (token_grid(h, w, max_img_size=1024, allow_upscale=False) for h, w in MIXED_SIZES)
    return sets | {"mixed": ([size.patch_grid for size in snapped], 4)}


def cases(settings: Settings) -> Iterator[Case]:
    """With the norm first, which decides its route: time may run out."""
    dtype = torch.bfloat16 if settings.device.type == "cuda" else torch.float32
    channels = 32 if settings.small else 1024
    for direction in DIRECTIONS:
        for width in (4 * channels, channels):
            for name, (grids, factor) in image_sets(settings).items():
                shape = Shape(grids, factor, channels, width)
                yield _case(settings, name, shape, direction, dtype)


def _case(settings: Settings, name: str, shape: Shape, direction: str, dtype: torch.dtype) -> Case:
    grids, factor, channels, width = shape
    patches = sum(hp * wp for hp, wp in grids)
    tokens = patches + PREFIX_TOKENS * len(grids)
    products = 2 if direction == "backward" else 1
    elements = patches * channels + factor**2 * channels * width + patches // factor**2 * width
    relation = "N=C" if width == channels else f"N={width // channels}C"
    return Case(
        name=f"{direction}, {relation}, {name}",
        group=f"{direction}, {relation}",
        op=SUITE if direction in ("forward", "backward") else "layer_norm_pixel_shuffle",
        parameters={
            "images": name,
            "segments": len(grids),
            "tokens": tokens,
            "factor": factor,
            "channels": channels,
            "width": width,
            "direction": direction,
        },
        prepare=lambda: _prepare(settings.device, shape, direction, dtype),
        dtype=dtype,
        flops=2 * products * patches * channels * width,
        bytes=products * elements * dtype.itemsize,
    )


def _prepare(device: torch.device, shape: Shape, direction: str, dtype: torch.dtype) -> Prepared:
    grids, factor, channels, _ = shape
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=PREFIX_TOKENS, device=device)
    inputs, norm, g = _random(packed, shape, dtype)
    x = inputs[0]
    backend = "triton" if device.type == "cuda" else "eager"
    normed = direction.endswith("LayerNorm")

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return pixel_shuffle_linear(x, packed, factor, weight, bias, backend=backend)

    def route(name: str) -> Project:
        return lambda x, weight, bias: layer_norm_pixel_shuffle_linear(
            x, packed, factor, *norm, EPS, weight, bias, route=name, backend=backend
        )

    def peer(name: str) -> Callable[[], Run]:
        def build() -> Run:
            project = PEERS[name](packed, factor)

            def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                if normed:
                    x = F.layer_norm(x, (channels,), *norm, EPS)
                return project(x, weight, bias)

            if "compiled" in name:
                run = torch.compile(run, dynamic=False)
            return runner(run, inputs, g, direction)

        return build

    def expected() -> Outputs:
        x, *rest = (a.float() for a in inputs)
        if normed:
            x = F.layer_norm(x, (channels,), *(a.float() for a in norm), EPS)
        return runner(
            lambda x, weight, bias: reference.pixel_shuffle_linear(x, packed, factor, weight, bias),
            (x, *rest), g.float(), direction,
        )()  # fmt: skip

    def bare_gemm() -> Run:
        shuffled = reference.pixel_shuffle(x, packed, factor)
        return runner(F.linear, (shuffled, *inputs[1:]), g, direction)

    projects = {OURS: ours}
    if normed:
        projects = {OURS: route("auto")} | {
            f"hrvlm, route {name}": route(name) for name in ("fused", "layernorm_gemm")
        }
    rivals = [
        Rival(
            name,
            lambda project=project: runner(project, inputs, g, direction),
            role="ours" if name == OURS else "peer",
        )
        for name, project in projects.items()
    ]
    rivals += [Rival(name, peer(name), compiles="compiled" in name) for name in PEERS]
    rivals.append(Rival("bare GEMM", bare_gemm, role="bound"))
    return Prepared(rivals, expected)


def _random(
    packed: PackedGrids, shape: Shape, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """x, weight and bias; weight and bias of the norm; the gradient of the output."""
    generator = torch.Generator(packed.device).manual_seed(0)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*size, generator=generator, device=packed.device)
        return (values * scale).to(dtype)

    inner, width = shape.factor**2 * shape.channels, shape.width
    inputs = (
        randn(packed.total_tokens, shape.channels),
        randn(width, inner, scale=inner**-0.5),
        randn(width),
    )
    norm = (1 + randn(shape.channels, scale=0.1)).to(dtype), randn(shape.channels)
    return inputs, norm, randn(packed.shuffle_index(shape.factor).shape[0], width)


def bench_pixel_shuffle_linear(run_case, case):
    run_case(case)
