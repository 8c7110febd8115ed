"""What ``python -m benchmarks.tune`` tunes: each op's table, candidates, gate and timed calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from benchmarks.tile_table_file import Table
from hrvlm_kernels import (
    PackedGrids,
    layer_norm_pixel_shuffle,
    pixel_shuffle_linear,
    rope_2d,
    tile_tables,
    varlen_attention,
)
from hrvlm_kernels.packed_grids import SHORT_SEQLEN
from hrvlm_kernels.tilings import GemmConfig, NormConfig, RopeConfig, Tiling
from tests.kernels import shipped, shipped_attention
from tests.kernels.attention_cases import check_kernel, make_case

SIZES = (201, 2309, 4101)  # tokens of an image of 224, 768 and 1024 px
HEADS, CHANNELS, TOKENS = 16, 1024, 16_384
_GATE_LENGTHS = (201, 577, 64, 0, 1, 63, 65, 127, 128, 129)
_FACTOR = 4

Key = tuple[Any, ...]
Run = Callable[[], object]


@dataclass(frozen=True)
class TunedOp:
    """One table and how to choose its rows; keys are those of the table.

    A candidate of None means no row: what runs instead is timed like the others.
    """

    table: str
    keys: Callable[[str], Sequence[Key]]
    candidates: Callable[[Key], Sequence[Any]]
    gate: Callable[[Key, str], None]  # raises AssertionError
    calls: Callable[[Key, str], Sequence[tuple[str, Run]]]
    job: Callable[[Key, Any], shipped.Job]


def candidates_of(op: TunedOp, key: Key) -> list[Any]:
    """What is in the table now, then the op's other candidates."""
    current = getattr(tile_tables, op.table).get(key, ())
    return list(dict.fromkeys((*current, *op.candidates(key))))


@contextmanager
def row(table: str, key: Key, config: Any) -> Iterator[None]:
    """Let the kernels see one row as `config`, or not at all when None."""
    rows: Table = getattr(tile_tables, table)
    before = dict(rows)
    rows.pop(key, None)
    if config is not None:
        rows[key] = (config,)
    try:
        yield
    finally:
        rows.clear()
        rows.update(before)


def dtype_of(key: Key) -> torch.dtype:
    """The dtype that the rows with this key are tuned in."""
    return {2: torch.bfloat16, 4: torch.float32}[key[-1]]


def _attention_keys(chip: str) -> list[Key]:
    return [(chip, head_dim, size) for head_dim in (32, 64, 128) for size in (2, 4)]


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
    specialised = [
        Tiling(rows, step, 4, s, "specialised")
        for (rows, step), s in product([(128, 128), (128, 64), (64, 128)], (2, 3))
        if head_dim < 128 or step == 64
    ]
    gluon = [
        Tiling(128, step, 4, buffers, "gluon")
        for step, buffers in product((64, 128), (2, 3))
        if head_dim >= 64 and head_dim * step * buffers <= 24_576
    ]
    return [*ahead, *specialised, *gluon, *plain]


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
        lengths = [min(n, SHORT_SEQLEN) for n in _GATE_LENGTHS] if rope else _GATE_LENGTHS
        check_kernel(make_case(lengths, heads=2, **options), deterministic=deterministic)

    return gate


def _forward_calls(key: Key, device: str, *, rope: bool = False) -> list[tuple[str, Run]]:
    def call(n: int) -> Run:
        case = _attention_case(key, n, device, rope)

        @torch.no_grad()
        def run() -> object:
            return varlen_attention(*case.inputs, case.packed, rope=case.rope, backend="triton")

        return run

    return [(f"n={n}", call(n)) for n in SIZES if not rope or n <= SHORT_SEQLEN]


def _backward_calls(key: Key, device: str, *, deterministic: bool = True) -> list[tuple[str, Run]]:
    def call(n: int) -> Run:
        case = _attention_case(key, n, device, rope=False)
        leaves = [a.detach().requires_grad_() for a in case.inputs]
        out = varlen_attention(*leaves, case.packed, deterministic=deterministic, backend="triton")
        return lambda: torch.autograd.grad(out, leaves, case.g, retain_graph=True)

    return [(f"n={n}", call(n)) for n in SIZES]


def _attention_case(key: Key, n: int, device: str, rope: bool) -> Any:
    lengths = [n] * max(1, TOKENS // n)
    options = {"head_dim": key[1], "dtype": dtype_of(key), "rope": rope, "device": device}
    return make_case(lengths, heads=HEADS, **options)


def _grids(device: str) -> list[tuple[str, PackedGrids]]:
    """Images of 256, 768 and 1024 px: patch grids that the factor divides."""
    packs = []
    for side in (16, 48, 64):
        grids = [(side, side)] * max(1, TOKENS // side**2)
        packed = PackedGrids.from_grids(grids, num_prefix_tokens=5, device=device)
        packs.append((f"{side * 16} px", packed))
    return packs


def _gemm_candidates(key: Key) -> list[GemmConfig]:
    if key[1] == 4:
        tiles = [(64, 64, 16), (64, 64, 32), (32, 32, 16)]
        return [GemmConfig(*tile, 4, s) for tile, s in product(tiles, (2, 3, 4))]
    tiles = [(128, 128, 64), (128, 128, 32), (128, 64, 64), (64, 64, 64), (64, 64, 32)]
    return [GemmConfig(*tile, w, s) for tile, w, s in product(tiles, (4, 8), (3, 4))]


def _gemm_calls(key: Key, device: str) -> list[tuple[str, Run]]:
    def call(packed: PackedGrids) -> Run:
        dtype, width = dtype_of(key), _FACTOR**2 * CHANNELS
        x = torch.randn(packed.total_tokens, CHANNELS, device=device, dtype=dtype)
        weight = torch.randn(CHANNELS, width, device=device, dtype=dtype) / width**0.5
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        rows = packed.shuffle_index(_FACTOR).shape[0]
        g = torch.randn(rows, CHANNELS, device=device, dtype=dtype)

        def run() -> object:
            out = pixel_shuffle_linear(x, packed, _FACTOR, weight, backend="triton")
            return torch.autograd.grad(out, leaves, g)

        return run

    return [(name, call(packed)) for name, packed in _grids(device)]


def _gemm_gate(key: Key, device: str) -> None:
    from tests.kernels import test_pixel_shuffle_linear as shuffle

    shuffle.check_all(_FACTOR, 80, 130, dtype_of(key), device=device)


def _rope_candidates(key: Key) -> list[RopeConfig]:
    return [
        RopeConfig(t, h, w) for t, h, w in product((2, 4, 8, 16), (4, 8, 16), (2, 4, 8))
        if 1024 <= t * h * key[1] // 2 <= 8192
    ]  # fmt: skip


def _rope_calls(key: Key, device: str) -> list[tuple[str, Run]]:
    def call(packed: PackedGrids) -> Run:
        shape = packed.total_tokens, 3, HEADS, key[1]
        qkv = torch.randn(shape, device=device, dtype=dtype_of(key))
        inv_freq = torch.rand(key[1] // 4, device=device)
        return lambda: rope_2d(qkv[:, 0], qkv[:, 1], packed.coords, inv_freq, backend="triton")

    return [(name, call(packed)) for name, packed in _grids(device)]


def _rope_gate(key: Key, device: str) -> None:
    from tests.kernels import test_rope_2d as rope

    for check in (rope.check_forward, rope.check_backward):
        check(key[1], dtype_of(key), device=device)


def _norm_keys(chip: str) -> list[Key]:
    return [(chip, width) for width in (512, 1024, 2048, 4096, 8192)]


def _norm_candidates(key: Key) -> list[NormConfig]:
    most = max(1, 4096 // key[1])
    return [NormConfig(r, w) for r, w in product((1, 2, 4, 8), (4, 8, 16)) if r <= most]


def _norm_calls(key: Key, device: str, *, backward: bool) -> list[tuple[str, Run]]:
    def call(packed: PackedGrids) -> Run:
        x = torch.randn(packed.total_tokens, key[1], device=device, dtype=torch.bfloat16)
        weight = torch.ones(key[1], device=device)
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        options = {"backend": "triton"}
        out = layer_norm_pixel_shuffle(x, packed, _FACTOR, weight, None, 1e-5, **options)
        if backward:
            g = torch.randn_like(out)
            return lambda: torch.autograd.grad(out, leaves, g, retain_graph=True)
        return lambda: layer_norm_pixel_shuffle(x, packed, _FACTOR, weight, None, 1e-5, **options)

    return [(name, call(packed)) for name, packed in _grids(device)]


def _norm_gate(key: Key, device: str) -> None:
    from tests.kernels import test_layer_norm_pixel_shuffle as norm

    norm.check_all(_FACTOR, key[1], torch.float16, device=device)


def _attention_job(make: Callable[..., shipped.Job], **options: Any) -> Any:
    return lambda key, config: make(key[1], dtype_of(key), config, **options)


def _norm_op(table: str, backward: bool) -> TunedOp:
    return TunedOp(
        table,
        _norm_keys,
        _norm_candidates,
        _norm_gate,
        lambda key, device: _norm_calls(key, device, backward=backward),
        lambda key, config: shipped.layer_norm_job(key[1], torch.bfloat16, config, backward),
    )


OPS = {
    "forward": TunedOp(
        "FORWARD", _attention_keys, _forward_candidates, _attention_gate(False, True),
        _forward_calls, _attention_job(shipped_attention.forward_job),
    ),
    "short": TunedOp(
        "SHORT", _16_bit_keys((32, 64, 128)), _short_candidates, _attention_gate(True, True),
        lambda key, device: _forward_calls(key, device, rope=True),
        _attention_job(shipped_attention.short_job),
    ),
    "dq": TunedOp(
        "DQ", _attention_keys, _backward_candidates, _attention_gate(False, True),
        _backward_calls, _attention_job(shipped_attention.dq_job),
    ),
    "dkdv": TunedOp(
        "DKDV", _attention_keys, _backward_candidates, _attention_gate(False, True),
        _backward_calls, _attention_job(shipped_attention.dkdv_job),
    ),
    "atomic": TunedOp(
        "ATOMIC", _16_bit_keys((32, 64)), _backward_candidates, _attention_gate(False, False),
        lambda key, device: _backward_calls(key, device, deterministic=False),
        _attention_job(shipped_attention.dkdv_job, atomic=True),
    ),
    "gemm": TunedOp(
        "GEMM", lambda chip: [(chip, 2), (chip, 4)], _gemm_candidates, _gemm_gate, _gemm_calls,
        lambda key, config: shipped.pixel_shuffle_job("forward", dtype_of(key), config),
    ),
    "rope": TunedOp(
        "ROPE", _attention_keys, _rope_candidates, _rope_gate, _rope_calls,
        _attention_job(shipped.rope_job),
    ),
    "norm_forward": _norm_op("NORM_FORWARD", False),
    "norm_backward": _norm_op("NORM_BACKWARD", True),
}  # fmt: skip
