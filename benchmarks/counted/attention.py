"""Attention to count: ours, forward and backward, and the candidate outside the package.

Programs own a tile of one head. Those of an image execute the same but for its last tile, so a full
one and the last stand for all; of the mixed draw some tiles stand for their neighbours in the list,
which is sorted by length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.candidates import varlen_attention_gluon as gluon
from benchmarks.case import MIXED_LENGTHS
from benchmarks.counted.case import Case, Grid, Later, Part, Sample, spread
from hrvlm_kernels import PackedGrids, reference
from hrvlm_kernels.attention_problem import Problem
from hrvlm_kernels.packed_tables import SHORT_SEQLEN
from hrvlm_kernels.triton_kernels import varlen_attention as forward
from hrvlm_kernels.triton_kernels import varlen_attention_backward as backward
from hrvlm_kernels.triton_kernels.launch import architecture
from hrvlm_kernels.triton_kernels.tilings import Tiling
from hrvlm_kernels.triton_kernels.varlen_attention_short import select_short_tilings

HEADS = 16
LENGTHS = (201, 577, 2309, 4101)
HEAD_DIMS = (64, 80, 128)
ROTATED_HEAD_DIMS = (64, 128)  # those of 80 without
MIXED_TILES = 6
GLUON = "gluon 128x128"
BF16 = torch.bfloat16

Packs = dict[str, tuple[int, ...]]
PACKS: Packs = {f"n={n}": (n,) for n in LENGTHS} | {"mixed": tuple(MIXED_LENGTHS)}


def inputs(lengths: Sequence[int], head_dim: int) -> tuple[PackedGrids, tuple[Tensor, ...], Any]:
    """The pack; q, k and v as slices of one product; positions and frequencies."""
    rng = torch.Generator().manual_seed(0)
    packed = PackedGrids.from_lengths(lengths)
    qkv = drawn(rng, packed.total_tokens, 3, HEADS, head_dim)
    return packed, qkv.unbind(1), positions(packed.total_tokens, head_dim, rng)


def drawn(rng: torch.Generator, tokens: int, *shape: int) -> Tensor:
    """Normally distributed; tokens of packs longer than the longest image repeat, to save time."""
    different = min(tokens, max(LENGTHS))
    few = torch.randn(different, *shape, generator=rng).to(BF16)
    return few[torch.arange(tokens) % different] if tokens > different else few


def positions(tokens: int, head_dim: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Where the tokens lie, and the frequencies of RoPE."""
    coords = torch.rand(tokens, 2, generator=rng) * 2 - 1
    return coords, 100.0 ** (-4 * torch.arange(head_dim // 4) / head_dim)


def tiles_of(lengths: Sequence[int]) -> Sample:
    """Programs of a kernel whose grid runs over tiles and, as the fast axis, heads."""

    def choose(grid: Grid) -> list[Part]:
        tiles = grid[0] // HEADS
        if len(lengths) > 1:
            chosen = [int((i + 0.5) * tiles / MIXED_TILES) for i in range(MIXED_TILES)]
            return [([t * HEADS for t in chosen], grid[0] / MIXED_TILES)]
        last = [([(tiles - 1) * HEADS], float(HEADS))]
        return [([0], (tiles - 1) * float(HEADS)), *last] if tiles > 1 else last

    return choose


def _images(lengths: Sequence[int]) -> Sample:
    """Programs of the kernel for short images: images and, as the fast axis, heads."""

    def choose(grid: Grid) -> list[Part]:
        return spread(2)((grid[0] // HEADS * HEADS, 1, 1)) if len(lengths) > 1 else [([0], HEADS)]

    return choose


def _samples(lengths: Sequence[int]) -> dict[str, Sample]:
    return {
        "varlen_attention_short": _images(lengths),
        "varlen_attention": tiles_of(lengths),
        "rope": spread(4),
    }


Moved = dict[str, tuple[int, float]]


def _work(
    lengths: Sequence[int], head_dim: int, products: int, tensors: int, each: Moved
) -> dict[str, Any]:
    """Of all heads: scores, FLOPs of so many products, bytes of so many tensors [T, H, D] and lse.

    `each` says how many of those a kernel has to move, and for which share of the tokens.
    """
    scores, tokens = HEADS * sum(n * n for n in lengths), sum(lengths)

    def moved(count: int, of: float = tokens) -> float:
        return HEADS * of * (count * head_dim * 2.0 + 4)

    return {
        "unit": "score",
        "units": scores,
        "flops": 2 * products * scores * head_dim,
        "least": moved(tensors),
        "sharing": {name: moved(count, tokens * share) for name, (count, share) in each.items()},
    }


_FORWARD: Moved = {name: (4, 1.0) for name in ("attention", "flash", "parallel_attn")}
# dq reads q, k, v, g and out; dk and dv too, but for out.
_BACKWARD: Moved = {name: (6, 1.0) for name in ("_dq", "_dkdv", "_dkv")}


def _short_and_long(lengths: Sequence[int]) -> Moved:
    """Of a forward with RoPE, whose kernels share the images."""
    short = sum(n for n in lengths if n <= SHORT_SEQLEN) / sum(lengths)
    return {"attention_short": (4, short), "attention_forward": (4, 1 - short)}


def problem(lengths: Sequence[int], head_dim: int, rotate: bool) -> Problem:
    """As the launchers take it."""
    packed, (q, k, v), rope = inputs(lengths, head_dim)
    return Problem(q, k, v, packed.segments, rope if rotate else None, None, head_dim**-0.5)


def forward_case(
    size: str,
    head_dim: int,
    rotate: bool,
    *,
    variant: str = "shipped",
    tilings: Sequence[Tiling] | None = None,
    short_tilings: Sequence[Tiling] | None = None,
    role: str = "ours",
) -> Case:
    """The forward of a pack, with the tiles of the tables or others."""
    lengths = PACKS[size]
    x = problem(lengths, head_dim, rotate)
    out = torch.zeros_like(x.q, memory_format=torch.contiguous_format)
    lse = torch.zeros(HEADS, x.q.shape[0])
    by_length = rotate and select_short_tilings(architecture(x.q.device), head_dim, BF16)
    return Case(
        op="attention forward" + " with RoPE" * rotate,
        size=f"{size} D={head_dim}",
        variant=variant,
        start=partial(forward.forward, x, out, lse, tilings, short_tilings),
        samples=_samples(lengths),
        role=role,
        **_work(lengths, head_dim, 2, 4, _short_and_long(lengths) if by_length else _FORWARD),
    )


def backward_case(
    size: str,
    head_dim: int,
    rotate: bool,
    *,
    variant: str = "shipped",
    tilings: backward.BackwardTilings | None = None,
    role: str = "ours",
) -> Case:
    """The backward; useful are five products."""
    lengths = PACKS[size]
    packed, (q, k, v), rope = inputs(lengths, head_dim)
    x = Problem(q, k, v, packed.segments, rope if rotate else None, None, head_dim**-0.5)
    rng = torch.Generator().manual_seed(1)
    g, out = (drawn(rng, *q.shape) for _ in range(2))
    lse = torch.randn(HEADS, q.shape[0], generator=rng) + 10
    grads = [torch.zeros(q.shape, dtype=BF16) for _ in range(3)]
    return Case(
        op="attention backward" + " with RoPE" * rotate,
        size=f"{size} D={head_dim}",
        variant=variant,
        start=partial(backward.backward, x, g, out, lse, *grads, tilings),
        samples=_samples(lengths),
        role=role,
        **_work(lengths, head_dim, 5, 8, _BACKWARD),
    )


def gluon_case(size: str, head_dim: int) -> Case:
    """The candidate outside the package, without RoPE."""
    lengths = PACKS[size]
    packed, (q, k, v), _ = inputs(lengths, head_dim)
    out, lse = torch.zeros(q.shape, dtype=BF16), torch.zeros(HEADS, q.shape[0])

    def start() -> None:
        with mock.patch.object(gluon, "_scratch", _scratch):
            gluon.start(q, k, v, out, lse, packed, head_dim**-0.5, 128, 2)

    return Case(
        op="attention forward",
        size=f"{size} D={head_dim}",
        variant=GLUON,
        start=start,
        samples={"gluon": tiles_of(lengths)},
        role="candidate",
        check=partial(check_forward, out, q, k, v) if len(lengths) == 1 else None,
        **_work(lengths, head_dim, 2, 4, _FORWARD),
    )


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Room for descriptors that are made on the device."""
    room = torch.empty(size + alignment, dtype=torch.int8)
    return room[-room.data_ptr() % alignment :][:size]


def check_forward(out: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> None:
    """What was written of head 0 is right to 2 %: the counts are of a kernel that computes it."""
    written = out[:, 0].any(1)
    assert written.sum() > 0, "nothing was written"
    q, k, v = (a[:, :1].double() for a in (q, k, v))
    if causal:
        mask = torch.ones(len(q), len(q)).tril().bool()
        scores = (q[:, 0] @ k[:, 0].T * q.shape[2] ** -0.5).masked_fill(~mask, float("-inf"))
        wanted = scores.softmax(-1) @ v[:, 0]
    else:
        packed = PackedGrids.from_lengths([len(q)])
        wanted = reference.varlen_attention(q, k, v, packed, q.shape[2] ** -0.5)[0][:, 0]
    error = (out[written, 0].double() - wanted[written]).norm() / wanted[written].norm()
    assert error < 0.02, f"off by {error:.3f}"


def _later(
    make: Callable[..., Case], size: str, head_dim: int, rotate: bool = False, **options: Any
) -> Later:
    op = "attention backward" if make is backward_case else "attention forward"
    variant = GLUON if make is gluon_case else options.get("variant", "shipped")
    if make is not gluon_case:
        options["rotate"] = rotate
    name = op + " with RoPE" * rotate, f"{size} D={head_dim}", variant
    return Later(name, partial(make, size, head_dim, **options))


def _all(make: Callable[..., Case]) -> Iterator[Later]:
    for head_dim in HEAD_DIMS:
        for size in PACKS:
            for rotate in (False, True) if head_dim in ROTATED_HEAD_DIMS else (False,):
                yield _later(make, size, head_dim, rotate)


def forwards(chip: int) -> Iterator[Later]:
    """Of every pack, with and without RoPE, and the candidate."""
    yield from _all(forward_case)
    if chip == 90:
        for head_dim in ROTATED_HEAD_DIMS:
            yield from (_later(gluon_case, size, head_dim) for size in PACKS)


def backwards() -> Iterator[Later]:
    """Likewise."""
    yield from _all(backward_case)
