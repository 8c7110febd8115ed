"""What ``python -m benchmarks.tuning`` tunes of varlen_attention; see rows.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

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
)
from hrvlm_kernels import varlen_attention
from hrvlm_kernels.packed_tables import SHORT_SEQLEN
from hrvlm_kernels.triton_kernels.tilings import Tiling
from tests.kernels.attention_cases import check_kernel, make_case

SIZES = (201, 2309, 4101)  # tokens of an image of 224, 768 and 1024 px
GATE_LENGTHS = (201, 577, 64, 0, 1, 63, 65, 127, 128, 129)


def _16_bit_keys(head_dims: Sequence[int]) -> Callable[[str], list[Key]]:
    return lambda chip: [(chip, head_dim, 2) for head_dim in head_dims]


def _forward_candidates(key: Key) -> list[Tiling]:
    chip, head_dim, size = key
    if size == 4:
        return [Tiling(32, 32, warps, 2) for warps in (4, 8)]
    tiles = [(128, 128), (128, 64), (128, 32), (64, 64), (64, 32)]
    plain = [Tiling(*tile, w, s) for tile, w, s in product(tiles, (4, 8), (2, 3))]
    if chip != "sm_90":
        return plain
    ahead = [
        Tiling(128, step, 8, s, "ahead")
        for step, s in product((128, 64) if head_dim < 128 else (64,), (2, 3))
    ]
    return [*ahead, *plain]


def _short_candidates(key: Key) -> list[Tiling | None]:
    return [None, *(Tiling(rows, SHORT_SEQLEN, w, 1) for rows, w in product((64, 128), (4, 8)))]


def _backward_candidates(key: Key) -> list[Tiling]:
    if key[2] == 4:
        return [Tiling(32, step, w, 2) for step, w in product((32, 16), (4, 8))]
    tiles = [(128, 64), (128, 32), (128, 16), (64, 64), (64, 32), (64, 16)]
    return [Tiling(*tile, w, s) for tile, w, s in product(tiles, (4, 8), (2, 3))]


def _attention_gate(rope: bool, deterministic: bool) -> Callable[[Key, str], None]:
    def gate(key: Key, device: str) -> None:
        options = {"head_dim": key[1], "dtype": dtype_of(key), "rope": rope, "device": device}
        lengths = [min(n, SHORT_SEQLEN) for n in GATE_LENGTHS] if rope else GATE_LENGTHS
        check_kernel(make_case(lengths, heads=2, **options), deterministic=deterministic)

    return gate


def _forward_calls(key: Key, device: str, *, rope: bool = False) -> list[Call]:
    def call(n: int) -> Call:
        case = _attention_case(key, n, device, rope)

        @torch.no_grad()
        def run() -> object:
            return varlen_attention(*case.inputs, case.packed, rope=case.rope, backend="triton")

        return Call(f"n={n}", run, _attention_flops(key, n, products=2))

    return [call(n) for n in SIZES if not rope or n <= SHORT_SEQLEN]


def _backward_calls(key: Key, device: str, *, deterministic: bool = True) -> list[Call]:
    def call(n: int) -> Call:
        case = _attention_case(key, n, device, rope=False)
        leaves = [a.detach().requires_grad_() for a in case.inputs]
        out = varlen_attention(*leaves, case.packed, deterministic=deterministic, backend="triton")

        def run() -> object:
            return torch.autograd.grad(out, leaves, case.g, retain_graph=True)

        return Call(f"n={n}", run, _attention_flops(key, n, products=5))

    return [call(n) for n in SIZES]


def _lengths(n: int) -> list[int]:
    return [n] * max(1, TOKENS // n)


def _attention_flops(key: Key, n: int, products: int) -> int:
    return 2 * products * HEADS * key[1] * sum(n * n for n in _lengths(n))


def _attention_case(key: Key, n: int, device: str, rope: bool) -> Any:
    lengths = _lengths(n)
    options = {"head_dim": key[1], "dtype": dtype_of(key), "rope": rope, "device": device}
    return make_case(lengths, heads=HEADS, **options)


ATTENTION_OPS = {
    "forward": TunedOp(
        "FORWARD", attention_keys, _forward_candidates, _attention_gate(False, True),
        _forward_calls, attention_job(attention_jobs.forward_job),
    ),
    "short": TunedOp(
        "SHORT", _16_bit_keys((32, 64, 128)), _short_candidates, _attention_gate(True, True),
        lambda key, device: _forward_calls(key, device, rope=True),
        attention_job(attention_jobs.short_job),
    ),
    "dq": TunedOp(
        "DQ", attention_keys, _backward_candidates, _attention_gate(False, True),
        _backward_calls, attention_job(attention_jobs.dq_job),
    ),
    "dkdv": TunedOp(
        "DKDV", attention_keys, _backward_candidates, _attention_gate(False, True),
        _backward_calls, attention_job(attention_jobs.dkdv_job),
    ),
    "atomic": TunedOp(
        "ATOMIC", _16_bit_keys((32, 64)), _backward_candidates, _attention_gate(False, False),
        lambda key, device: _backward_calls(key, device, deterministic=False),
        attention_job(attention_jobs.dkdv_job, atomic=True),
    ),
}  # fmt: skip
