"""rope_2d against other rotary embeddings, forward and backward, and a plain copy of q and k.

    python -m pytest benchmarks/bench_rope_2d.py

About 64k tokens: 16 heads of 64 or 8 of 128, in images of 224, 768 and 1024 px, and the mixed draw.
The work is moving q and k: the bytes counted are both read and written once, and the copy is the
bound. "backward" runs the backward alone, over the graph of one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import rope_peers
from benchmarks.case import OURS, Case, Outputs, Prepared, Rival, Run, Settings
from benchmarks.mixed_sizes import MIXED_GRIDS, PREFIX_TOKENS
from hrvlm_kernels import PackedGrids, reference, rope_2d

SUITE, DEVICE, BUDGET_S = "rope_2d", "cuda", 20

TOKENS = 65536
HEADS = {64: 16, 128: 8}


def image_sets(settings: Settings) -> dict[str, list[tuple[int, int]]]:
    """Patch grids by what they are called in names."""
    if settings.small:
        return {"n=14": [(3, 3)] * 3, "mixed": [(2, 5), (4, 3), (1, 1)]}
    sets = {}
    for side in (14, 48, 64):
        n = PREFIX_TOKENS + side * side
        sets[f"n={n}"] = [(side, side)] * max(1, round(TOKENS / n))
    return sets | {"mixed": MIXED_GRIDS}


def cases(settings: Settings) -> Iterator[Case]:
    """The forward of both head sizes, then the backward."""
    dtype = torch.bfloat16 if settings.device.type == "cuda" else torch.float32
    for direction in ("forward", "backward"):
        for head_dim, heads in HEADS.items():
            heads = 2 if settings.small else heads
            for name, grids in image_sets(settings).items():
                tokens = sum(PREFIX_TOKENS + hp * wp for hp, wp in grids)
                parameters = {"images": name, "segments": len(grids), "tokens": tokens}
                shape = {"heads": heads, "head_dim": head_dim, "direction": direction}
                yield Case(
                    name=f"{direction}, D={head_dim}, {name}",
                    group=f"{direction}, D={head_dim}",
                    op="rope_2d",
                    parameters=parameters | shape,
                    prepare=_preparer(settings, grids, (heads, head_dim), direction, dtype),
                    dtype=dtype,
                    bytes=4 * tokens * heads * head_dim * dtype.itemsize,
                )


def _preparer(
    settings: Settings,
    grids: list[tuple[int, int]],
    heads: tuple[int, int],
    direction: str,
    dtype: torch.dtype,
) -> Callable[[], Prepared]:
    return lambda: _prepare(settings.device, grids, heads, direction, dtype)


def _prepare(
    device: torch.device,
    grids: list[tuple[int, int]],
    heads: tuple[int, int],
    direction: str,
    dtype: torch.dtype,
) -> Prepared:
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=PREFIX_TOKENS, device=device)
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    q, k, _ = randn(packed.total_tokens, 3, *heads).unbind(1)
    grads = randn(packed.total_tokens, *heads), randn(packed.total_tokens, *heads)
    inv_freq = 100.0 ** (-4 * torch.arange(heads[1] // 4, device=device) / heads[1])
    backend = "triton" if device.type == "cuda" else "eager"

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rope_2d(q, k, packed.coords, inv_freq, backend=backend)

    def expected() -> Outputs:
        def exact(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            return reference.rope_2d(q, k, packed.coords, inv_freq, upcast=torch.float32)

        return _runner(exact, (q.float(), k.float()), [g.float() for g in grads], direction)()

    def peer(make: rope_peers.MakeRotate) -> Callable[[], Run]:
        return lambda: _runner(make(packed, inv_freq, dtype), (q, k), grads, direction)

    rivals = [Rival(OURS, lambda: _runner(ours, (q, k), grads, direction), role="ours")]
    rivals += [
        Rival(name, peer(make), compiles="compiled" in name)
        for name, make in rope_peers.PEERS.items()
    ]
    rivals.append(Rival("copy of q and k", lambda: lambda: [_copy(q), _copy(k)], role="bound"))
    return Prepared(rivals, expected)


def _copy(a: Tensor) -> Tensor:
    return a.clone(memory_format=torch.contiguous_format)


def _runner(
    rotate: rope_peers.Rotate,
    inputs: tuple[Tensor, ...],
    grads: tuple[Tensor, ...] | list[Tensor],
    direction: str,
) -> Run:
    """A function that computes the rotated q and k, or their gradients from one forward."""
    if direction == "forward":

        def forward() -> Outputs:
            with torch.no_grad():
                return rotate(*inputs)

        return forward
    leaves = [a.detach().requires_grad_() for a in inputs]
    with torch._functorch.config.patch(donated_buffer=False):
        out = rotate(*leaves)
        torch.autograd.grad(out, leaves, grads, retain_graph=True)
    return lambda: torch.autograd.grad(out, leaves, grads, retain_graph=True)


def bench_rope_2d(run_case, case):
    run_case(case)
