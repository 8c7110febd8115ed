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
from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

from benchmarks.attention_peers import installed
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
    Unavailable,
    runner,
)
from hrvlm_kernels import PackedGrids, reference, rope_2d
from hrvlm_kernels.reference import rope_angles

SUITE, DEVICE, BUDGET_S = "rope_2d", "cuda", 20

TOKENS = 65536
HEADS = {64: 16, 128: 8}

Rotate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# Their tables of cos and sin are made outside what is timed, since the layers of a model share
# them; ours makes the angles in the kernel.
MakeRotate = Callable[[PackedGrids, Tensor, torch.dtype], Rotate]


def transformers_rope(packed: PackedGrids, inv_freq: Tensor, dtype: torch.dtype) -> Rotate:
    """The function of transformers, with cos and sin in the dtype of the pixels as there.

    On images of one size as it runs there: ``[B, H, n, D]``, prefix tokens split off and joined
    again. Mixed sizes have no such form: the pack is one sequence, whose prefix rows have angle 0.
    """
    angles = rope_angles(packed.coords, inv_freq).tile(2)  # [T, D]
    uniform = packed.grids is not None and len(set(packed.grids)) == 1
    if uniform:
        angles = angles[packed.num_prefix_tokens : packed.lengths[0]]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    shape = (len(packed), packed.max_seqlen) if uniform else (1, packed.total_tokens)

    def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (a.unflatten(0, shape).transpose(1, 2) for a in (q, k))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q.transpose(1, 2).flatten(0, 1), k.transpose(1, 2).flatten(0, 1)

    return rotate


def transformers_rope_compiled(packed: PackedGrids, inv_freq: Tensor, dtype: torch.dtype) -> Rotate:
    """The same under torch.compile."""
    return torch.compile(transformers_rope(packed, inv_freq, dtype), dynamic=False)


def half_tables(packed: PackedGrids, inv_freq: Tensor, dtype: torch.dtype) -> Rotate:
    """flash-attn's formula, in torch: tables of ``D / 2`` and both halves written once; compiled.

    ``layers/rotary.py`` there, ``interleaved=False``.
    """
    angles = rope_angles(packed.coords, inv_freq)[:, None]  # [T, 1, D / 2]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def turn(a: Tensor) -> Tensor:
        first, second = a.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return torch.compile(lambda q, k: (turn(q), turn(k)), dynamic=False)


def flash_attn_rotary(packed: PackedGrids, inv_freq: Tensor, dtype: torch.dtype) -> Rotate:
    """flash-attn's rotary kernel, the pack as one sequence; q and k in a launch each."""
    if not installed("flash_attn.layers.rotary"):
        raise Unavailable("flash-attn is not installed")
    from flash_attn.layers.rotary import apply_rotary_emb

    angles = rope_angles(packed.coords, inv_freq)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return lambda q, k: (
        apply_rotary_emb(q[None], cos, sin)[0],
        apply_rotary_emb(k[None], cos, sin)[0],
    )


PEERS: dict[str, MakeRotate] = {
    "transformers, eager": transformers_rope,
    "transformers, compiled": transformers_rope_compiled,
    "flash-attn's formula, compiled": half_tables,
    "flash-attn's rotary kernel": flash_attn_rotary,
}


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

        return runner(exact, (q.float(), k.float()), [g.float() for g in grads], direction)()

    def peer(make: MakeRotate) -> Callable[[], Run]:
        return lambda: runner(make(packed, inv_freq, dtype), (q, k), grads, direction)

    rivals = [Rival(OURS, lambda: runner(ours, (q, k), grads, direction), role="ours")]
    rivals += [Rival(name, peer(make), compiles="compiled" in name) for name, make in PEERS.items()]
    rivals.append(Rival("copy of q and k", lambda: lambda: [_copy(q), _copy(k)], role="bound"))
    return Prepared(rivals, expected)


def _copy(a: Tensor) -> Tensor:
    return a.clone(memory_format=torch.contiguous_format)


def bench_rope_2d(run_case, case):
    run_case(case)
