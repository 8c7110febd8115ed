"""What ``python -m benchmarks.tuning`` tunes of varlen_attention; see rows.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch

from benchmarks.compiled import attention_jobs
from benchmarks.tuning.rows import (
    HEADS,
    TOKENS,
    Call,
    Key,
    TunedOp,
    attention_job,
    attention_keys,
    dtype_of,
    verified,
)
from hrvlm_kernels import PackedGrids, varlen_attention
from hrvlm_kernels.packed_tables import SHORT_SEQLEN
from hrvlm_kernels.triton_kernels.tilings import Tiling

SIZES = (201, 2309, 4101)  # tokens of an image of 224, 768 and 1024 px
GATE_LENGTHS = (201, 577, 64, 0, 1, 63, 65, 127, 128, 129)


def _16_bit_keys(head_dims: Sequence[int]) -> Callable[[str], list[Key]]:
    return lambda chip: [(chip, head_dim, 2) for head_dim in head_dims]


def _keys(chip: str) -> list[Key]:
    return attention_keys(chip, (64, 128, 32, 80, 96))


def _forward_candidates(key: Key) -> list[Tiling]:
    chip, _, size = key
    if size == 4:
        return [Tiling(32, 32, warps, 2) for warps in (4, 8)]
    tiles = [(128, 128), (128, 64), (128, 32), (64, 64), (64, 32)]
    plain = [Tiling(*tile, w, s) for tile, w, s in product(tiles, (4, 8), (2, 3))]
    if chip != "sm_90":
        return plain
    tiles = [((128, 128), 8), ((128, 64), 8), ((64, 128), 4), ((64, 64), 4)]
    ahead = [Tiling(*tile, w, s, "ahead") for (tile, w), s in product(tiles, (2, 3))]
    return [*ahead, *plain]


def _short_candidates(key: Key) -> list[Tiling | None]:
    return [None, *(Tiling(rows, SHORT_SEQLEN, w, 1) for rows, w in product((64, 128), (4, 8)))]


def _backward_candidates(key: Key) -> list[Tiling]:
    if key[2] == 4:
        return [Tiling(32, step, w, 2) for step, w in product((32, 16), (4, 8))]
    tiles = [(128, 64), (128, 32), (128, 16), (64, 64), (64, 32), (64, 16)]
    return [Tiling(*tile, w, s) for tile, w, s in product(tiles, (4, 8), (2, 3))]


def _attention_gate(rope: bool) -> Callable[[Key, str], None]:
    def gate(key: Key, device: str) -> None:
        lengths = [min(n, SHORT_SEQLEN) for n in GATE_LENGTHS] if rope else GATE_LENGTHS
        options = {"lengths": lengths, "rope": rope}
        verified("varlen_attention", dtype_of(key), device, head_dim=key[1], **options)

    return gate


def _forward_calls(key: Key, device: str, *, rope: bool = False) -> list[Call]:
    def call(n: int) -> Call:
        packed, qkv = _packed_qkv(key, n, device)
        q, k, v = qkv.unbind(1)
        positions = None
        if rope:
            coords = torch.rand(packed.total_tokens, 2, device=device) * 2 - 1
            positions = coords, torch.rand(key[1] // 4, device=device)

        @torch.no_grad()
        def run() -> object:
            return varlen_attention(q, k, v, packed, rope=positions, backend="triton")

        return Call(f"n={n}", run, _attention_flops(key, n, products=2))

    return [call(n) for n in SIZES if not rope or n <= SHORT_SEQLEN]


def _backward_calls(key: Key, device: str) -> list[Call]:
    def call(n: int) -> Call:
        packed, qkv = _packed_qkv(key, n, device)
        leaves = [a.requires_grad_() for a in qkv.unbind(1)]
        out = varlen_attention(*leaves, packed, backend="triton")
        g = torch.randn_like(out)

        def run() -> object:
            return torch.autograd.grad(out, leaves, g, retain_graph=True)

        return Call(f"n={n}", run, _attention_flops(key, n, products=5))

    return [call(n) for n in SIZES]


def _lengths(n: int) -> list[int]:
    return [n] * max(1, TOKENS // n)


def _attention_flops(key: Key, n: int, products: int) -> int:
    return 2 * products * HEADS * key[1] * sum(n * n for n in _lengths(n))


def _packed_qkv(key: Key, n: int, device: str) -> tuple[PackedGrids, torch.Tensor]:
    """q, k and v are slices of one tensor, as in the encoder."""
    packed = PackedGrids.from_lengths(_lengths(n), device=device)
    shape = packed.total_tokens, 3, HEADS, key[1]
    return packed, torch.randn(shape, device=device, dtype=dtype_of(key))


ATTENTION_OPS = {
    "forward": TunedOp(
        "FORWARD", _keys, _forward_candidates, _attention_gate(False),
        _forward_calls, attention_job(attention_jobs.forward_job, rope=True),
    ),
    "short": TunedOp(
        "SHORT", _16_bit_keys((32, 64, 128)), _short_candidates, _attention_gate(True),
        lambda key, device: _forward_calls(key, device, rope=True),
        attention_job(attention_jobs.short_job),
    ),
    "dq": TunedOp(
        "DQ", _keys, _backward_candidates, _attention_gate(False),
        _backward_calls, attention_job(attention_jobs.dq_job, rope=True),
    ),
    "dkdv": TunedOp(
        "DKDV", _keys, _backward_candidates, _attention_gate(False),
        _backward_calls, attention_job(attention_jobs.dkdv_job, rope=True),
    ),
}  # fmt: skip
