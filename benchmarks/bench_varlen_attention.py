"""varlen_attention against other attention kernels, forward and backward.

    python -m pytest benchmarks/bench_varlen_attention.py

About 16k tokens of 16 heads of 64 or 8 heads of 128, in segments of 201, 2309 and 4101 tokens
(images of 224, 768 and 1024 px with 5 prefix tokens), and the mixed draw (64k tokens). Useful FLOPs
are 4 H D sum n_i^2 forward and 10 H D sum n_i^2 backward (5 products for 2).

"backward" runs the backward alone, over the graph of one forward; ours is deterministic, its peers
where their name says so. "... with RoPE" lets ours rotate q and k inside the attention;
its peers rotate them in a pass of ours first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import attention_peers
from benchmarks.case import (
    MIXED_GRIDS,
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
from hrvlm_kernels import PackedGrids, reference, rope_2d, varlen_attention

SUITE, DEVICE, BUDGET_S = "varlen_attention", "cuda", 50

TOKENS = 16384
SIDES = (14, 48, 64)  # patches: 224, 768 and 1024 px
HEADS = {64: 16, 128: 8}
DIRECTIONS = ("forward", "backward", "forward with RoPE", "backward with RoPE")
COMPILED = ("FlexAttention, document mask", "flash-attn-4")


def image_sets(settings: Settings) -> dict[str, list[tuple[int, int]]]:
    """Patch grids by what they are called in names."""
    if settings.small:
        return {"n=14": [(3, 3)] * 3, "mixed": [(2, 5), (4, 3), (1, 1)]}
    sets = {}
    for side in SIDES:
        n = PREFIX_TOKENS + side * side
        sets[f"n={n}"] = [(side, side)] * max(1, round(TOKENS / n))
    return sets | {"mixed": MIXED_GRIDS}


def cases(settings: Settings) -> Iterator[Case]:
    """Head size 64 first, what DINOv3 runs first: time may run out."""
    dtype = torch.bfloat16 if settings.device.type == "cuda" else torch.float32
    for head_dim in HEADS:
        for direction in DIRECTIONS:
            for name, grids in image_sets(settings).items():
                yield _case(settings, name, grids, head_dim, direction, dtype)


def _case(
    settings: Settings,
    name: str,
    grids: list[tuple[int, int]],
    head_dim: int,
    direction: str,
    dtype: torch.dtype,
) -> Case:
    heads = 2 if settings.small else HEADS[head_dim]
    lengths = [PREFIX_TOKENS + hp * wp for hp, wp in grids]
    backward = direction.startswith("backward")
    products = 5 if backward else 2
    tensors = 8 if backward else 4  # q, k, v, out, and their gradients
    return Case(
        name=f"{direction}, D={head_dim}, {name}",
        group=f"{direction}, D={head_dim}",
        op="varlen_attention",
        parameters={
            "images": name,
            "segments": len(lengths),
            "tokens": sum(lengths),
            "longest": max(lengths),
            "heads": heads,
            "head_dim": head_dim,
            "direction": direction,
        },
        prepare=lambda: _prepare(settings, grids, heads, head_dim, direction, dtype),
        dtype=dtype,
        flops=2 * products * heads * head_dim * sum(n * n for n in lengths),
        bytes=tensors * sum(lengths) * heads * head_dim * dtype.itemsize,
    )


def _prepare(
    settings: Settings,
    grids: list[tuple[int, int]],
    heads: int,
    head_dim: int,
    direction: str,
    dtype: torch.dtype,
) -> Prepared:
    device = settings.device
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=PREFIX_TOKENS, device=device)
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    # q, k and v are slices of one product, as in a model.
    q, k, v = randn(packed.total_tokens, 3, heads, head_dim).unbind(1)
    g = randn(packed.total_tokens, heads, head_dim)
    inv_freq = 100.0 ** (-4 * torch.arange(head_dim // 4, device=device) / head_dim)
    rope = (packed.coords, inv_freq) if "RoPE" in direction else None
    backend = "triton" if device.type == "cuda" else "sdpa"

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, packed, rope=rope, backend=backend)

    def peer(make: Callable[[PackedGrids], attention_peers.Attention]) -> Callable[[], Run]:
        def build() -> Run:
            attend = make(packed)
            if rope is None:
                return runner(attend, (q, k, v), g, direction)
            rotated = "auto" if device.type == "cuda" else "eager"
            return runner(
                lambda q, k, v: attend(*rope_2d(q, k, *rope, backend=rotated), v),
                (q, k, v), g, direction,
            )  # fmt: skip

        return build

    def expected() -> Outputs:
        exact = [a.float() for a in (q, k, v)]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if rope is not None:
                q, k = reference.rope_2d(q, k, *rope)
            return reference.varlen_attention(q, k, v, packed)[0]

        return runner(attend, exact, g.float(), direction)()

    rivals = [Rival(OURS, lambda: runner(ours, (q, k, v), g, direction), role="ours")]
    peers = attention_peers.PEERS
    if not direction.startswith("backward"):
        peers = peers | {"Gluon candidate": attention_peers.gluon_candidate}
    else:
        peers = peers | attention_peers.DETERMINISTIC
    rivals += [
        Rival(name, peer(make), compiles=name.startswith(COMPILED) and device.type == "cuda")
        for name, make in peers.items()
    ]
    return Prepared(rivals, expected)


def bench_varlen_attention(run_case, case):
    run_case(case)
