"""The kernels around the products against ATen.

    python -m pytest benchmarks/bench_fused_ops.py

All of them move memory and compute next to nothing: the bytes counted are inputs read once and
outputs written once, and the share is that of a copy. "backward" runs the backward alone, over the
graph of one forward. Shapes are those of one layer on images of 768 px.

    residual_layer_norm  x + scale * update, and the norm of it
    swiglu               silu(gate) * up; gate and up are products of their own, or ("halves of one
                         product") the two halves of one
    normalize_patchify   uint8 images to normalised patches, as a batch or a list of mixed sizes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import (
    MIXED_GRIDS,
    OURS,
    PATCH_SIZE,
    Case,
    Outputs,
    Prepared,
    Rival,
    Run,
    Settings,
    runner,
)
from benchmarks.encoder_models import Grids
from hrvlm.images.patches import pack_images, patchify
from hrvlm.images.processor import IMAGENET
from hrvlm_kernels import normalize_patchify, reference, residual_layer_norm, swiglu

SUITE, DEVICE, BUDGET_S = "fused_ops", "cuda", 45

EPS = 1e-5
ALONE, BACKWARD = "forward", "backward"
Function = Callable[..., Tensor | tuple[Tensor, ...]]


class Op(NamedTuple):
    """An elementwise op.

    Attributes:
        ours: Takes the op's inputs and `backend`.
        aten: The same of torch's own ops.
        wide: How many of the inputs are ``[T, C]``; the others are ``[C]``.
        narrow: How many are ``[C]``.
        trips: Times that a ``[T, C]`` tensor is read or written, forward and backward.
    """

    ours: Function
    aten: Function
    wide: int
    narrow: int
    trips: dict[str, int]


def aten_residual(
    x: Tensor, update: Tensor, scale: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """What the encoder runs."""
    out = torch.addcmul(x, update, scale)
    return out, F.layer_norm(out, weight.shape, weight, bias, EPS)


def our_residual(*inputs: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The op."""
    return residual_layer_norm(*inputs, EPS, backend=backend)  # type: ignore[misc, arg-type]


ELEMENTWISE = {
    "residual_layer_norm": Op(our_residual, aten_residual, 2, 3, {ALONE: 4, BACKWARD: 6}),
    "swiglu": Op(swiglu, reference.swiglu, 2, 0, {ALONE: 3, BACKWARD: 5}),
}
# Width, and images of 768 px; the model of 7B with --full.
SHAPES = {
    "residual_layer_norm": {"ViT-L": (1024, 28), "ViT-7B": (4096, 7)},
    "swiglu": {"ViT-H+": (5120, 14), "ViT-7B": (8192, 7)},
}
TOKENS_768 = 2309


def cases(settings: Settings) -> Iterator[Case]:
    """The ops, one after the other."""
    dtype = torch.bfloat16 if settings.device.type == "cuda" else torch.float32
    for name in ELEMENTWISE:
        for direction in (ALONE, BACKWARD):
            for model, (width, count) in SHAPES[name].items():
                tokens, full_only = count * TOKENS_768, model == "ViT-7B"
                if settings.small:
                    width, tokens = 48, 20
                    if full_only:
                        continue
                yield Case(
                    name=f"{name} {direction}, {model}",
                    group=f"{name}, {direction}",
                    op=name,
                    parameters={
                        "images": f"{model}, 768 px",
                        "segments": count,
                        "tokens": tokens,
                        "width": width,
                        "direction": direction,
                    },
                    prepare=_preparer(settings, name, (tokens, width), direction, dtype),
                    dtype=dtype,
                    bytes=ELEMENTWISE[name].trips[direction] * tokens * width * dtype.itemsize,
                    full_only=full_only,
                )
    yield from _patchify_cases(settings, dtype)


def _preparer(
    settings: Settings, name: str, shape: tuple[int, int], direction: str, dtype: torch.dtype
) -> Callable[[], Prepared]:
    return lambda: _prepare(settings.device, ELEMENTWISE[name], shape, direction, dtype)


def _prepare(
    device: torch.device, op: Op, shape: tuple[int, int], direction: str, dtype: torch.dtype
) -> Prepared:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    inputs = [randn(*shape) for _ in range(op.wide)] + [randn(shape[1]) for _ in range(op.narrow)]
    outputs = 2 if op.narrow else 1
    grads = [randn(*shape) for _ in range(outputs)]
    backend = "triton" if device.type == "cuda" else "eager"

    def ours(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return op.ours(*inputs, backend=backend)

    def started(function: Function) -> Callable[[], Run]:
        return lambda: runner(function, inputs, grads, direction)

    def compiled() -> Run:
        return runner(torch.compile(op.aten, dynamic=False), inputs, grads, direction)

    def halves() -> Run:
        parts = torch.cat(inputs, dim=1).chunk(2, dim=1)
        return runner(ours, parts, grads, direction)

    def expected() -> Outputs:
        wide = [a.float() for a in inputs]
        return runner(op.aten, wide, [g.float() for g in grads], direction)()

    rivals = [
        Rival(OURS, started(ours), role="ours"),
        Rival("ATen, eager", started(op.aten)),
        Rival("ATen, compiled", compiled, compiles=True),
    ]
    if not op.narrow:
        rivals.append(Rival("hrvlm, halves of one product", halves))
    return Prepared(rivals, expected)


def _patchify_cases(settings: Settings, dtype: torch.dtype) -> Iterator[Case]:
    sets = {"1024 px": [(64, 64)] * 16, "mixed": MIXED_GRIDS}
    if settings.small:
        sets = {"1024 px": [(2, 3)] * 2, "mixed": [(2, 3), (1, 2)]}
    for name, grids in sets.items():
        pixels = sum(hp * wp for hp, wp in grids) * PATCH_SIZE**2
        yield Case(
            name=f"normalize_patchify, {name}",
            group="normalize_patchify",
            op="normalize_patchify",
            parameters={"images": name, "count": len(grids), "direction": ALONE},
            prepare=_patchify_preparer(settings.device, grids, dtype),
            dtype=dtype,
            bytes=3 * pixels * (1 + dtype.itemsize),
        )


def _patchify_preparer(
    device: torch.device, grids: Grids, dtype: torch.dtype
) -> Callable[[], Prepared]:
    def prepare() -> Prepared:
        generator = torch.Generator(device).manual_seed(0)
        options = {"generator": generator, "device": device, "dtype": torch.uint8}
        shapes = [(3, PATCH_SIZE * hp, PATCH_SIZE * wp) for hp, wp in grids]
        images = [torch.randint(256, shape, **options) for shape in shapes]  # type: ignore[call-overload]
        uniform = len(set(grids)) == 1
        given = torch.stack(images) if uniform else images
        backend = "triton" if device.type == "cuda" else "eager"

        def ours() -> Outputs:
            rows, _ = normalize_patchify(given, PATCH_SIZE, *IMAGENET, dtype=dtype, backend=backend)
            return [rows]

        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in IMAGENET)

        def normalized(pixels: Tensor) -> Tensor:
            return pixels.float().mul(1 / 255).sub_(mean).div_(std)

        def eager() -> Outputs:
            if uniform:
                return [patchify(normalized(given), PATCH_SIZE).flatten(0, 1).to(dtype)]
            rows, _ = pack_images([normalized(image) for image in images], PATCH_SIZE)
            return [rows.to(dtype)]

        def compiled() -> Run:
            def rows(images: list[Tensor]) -> Tensor:
                return reference.normalize_patchify(images, PATCH_SIZE, *IMAGENET).to(dtype)

            run = torch.compile(rows, dynamic=False)
            return lambda: [run([given])]

        rivals = [Rival(OURS, lambda: ours, role="ours"), Rival("ATen, eager", lambda: eager)]
        if uniform:  # mixed sizes would be a graph for each
            rivals.append(Rival("ATen, compiled", compiled, compiles=True))
        return Prepared(rivals, eager)

    return prepare


def bench_fused_ops(run_case, case):
    run_case(case)
