"""What ``python -m benchmarks.tuning`` tunes: each op's table, candidates, gate and timed calls.

The parts of an entry stand in rows.py, those of varlen_attention in attention.py.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
from triton.errors import TritonError

from benchmarks.compiled import jobs
from benchmarks.tuning.attention import ATTENTION_OPS
from benchmarks.tuning.linear import LINEAR_OPS
from benchmarks.tuning.rows import (
    HEADS,
    TOKENS,
    Call,
    Key,
    Run,
    TunedOp,
    attention_job,
    attention_keys,
    dtype_of,
    gemm_candidates,
    reason,
    row,
    size_keys,
    verified,
)
from hrvlm.images.processor import IMAGENET
from hrvlm.machine import synchronize
from hrvlm_kernels import (
    PackedGrids,
    layer_norm_pixel_shuffle,
    normalize_patchify,
    pixel_shuffle_linear,
    rope_2d,
    swiglu,
)
from hrvlm_kernels.triton_kernels import tile_tables
from hrvlm_kernels.triton_kernels.launch import multiprocessors
from hrvlm_kernels.triton_kernels.tilings import BlockConfig, NormConfig, RopeConfig

CHANNELS = 1024
_FACTOR = 4


def trouble(name: str, key: Key, config: Any, device: str) -> str | None:
    """Why a candidate can't be timed: it does not compile, does not fit, or its gate is red.

    What is timed runs here once. Whatever else goes wrong is raised: the device may be unusable.
    """
    op = OPS[name]
    try:
        with row(op.table, key, config):
            op.gate(key, device)
            for call in op.calls(key, device):
                call.run()
            synchronize(torch.device(device))
    except (AssertionError, TritonError) as error:
        return reason(error)
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return None


def _grids(device: str) -> list[tuple[str, PackedGrids]]:
    """Images of 256, 768 and 1024 px: patch grids that the factor divides."""
    packs = []
    for side in (16, 48, 64):
        grids = [(side, side)] * max(1, TOKENS // side**2)
        packed = PackedGrids.from_grids(grids, num_prefix_tokens=5, device=device)
        packs.append((f"{side * 16} px", packed))
    return packs


def _gemm_calls(key: Key, device: str) -> list[Call]:
    """Forward and backward, with so many output channels that no sum is cut into parts."""

    def call(name: str, packed: PackedGrids) -> Call:
        x, weight, flops = _gemm_inputs(packed, 4 * CHANNELS, dtype_of(key), device)
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        rows = packed.shuffle_index(_FACTOR).shape[0]
        g = torch.randn(rows, weight.shape[0], device=device, dtype=x.dtype)

        def run() -> object:
            out = pixel_shuffle_linear(x, packed, _FACTOR, weight, backend="triton")
            return torch.autograd.grad(out, leaves, g)

        return Call(name, run, 3 * flops)

    return [call(name, packed) for name, packed in _grids(device)]


def _gemm_parts_candidates(key: Key) -> list[Any]:
    """What runs without a row, and the others."""
    return [*tile_tables.GEMM[key][:1], *gemm_candidates(key)]


def _gemm_parts_calls(key: Key, device: str) -> list[Call]:
    """The forward, with so few tiles that its sum is cut."""

    def call(name: str, packed: PackedGrids) -> Call:
        x, weight, flops = _gemm_inputs(packed, CHANNELS, dtype_of(key), device)
        run = partial(pixel_shuffle_linear, x, packed, _FACTOR, weight, backend="triton")
        return Call(name, run, flops)

    options: dict[str, Any] = {"num_prefix_tokens": 5, "device": device}
    one = PackedGrids.from_grids([(64, 64)], **options)
    return [call(name, packed) for name, packed in (*_grids(device), ("one of 1024 px", one))]


def _gemm_inputs(
    packed: PackedGrids, features: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """x, weight, and the FLOPs of their product."""
    width = _FACTOR**2 * CHANNELS
    x = torch.randn(packed.total_tokens, CHANNELS, device=device, dtype=dtype)
    weight = torch.randn(features, width, device=device, dtype=dtype) / width**0.5
    return x, weight, 2 * packed.shuffle_index(_FACTOR).shape[0] * width * features


def _gemm_gate(key: Key, device: str) -> None:
    """A sum that is cut into parts, then one that is not."""
    whole = 128 * multiprocessors(torch.device(device)) + 2
    for factor, features in ((_FACTOR, 130), (2, whole)):
        sizes = {"factor": factor, "channels": 80, "width": features}
        verified("pixel_shuffle_linear", dtype_of(key), device, **sizes)


def _rope_candidates(key: Key) -> list[RopeConfig]:
    return [
        RopeConfig(t, h, w) for t, h, w in product((2, 4, 8, 16), (4, 8, 16), (2, 4, 8))
        if 1024 <= t * h * key[1] // 2 <= 8192
    ]  # fmt: skip


def _rope_calls(key: Key, device: str) -> list[Call]:
    def call(packed: PackedGrids) -> Run:
        shape = packed.total_tokens, 3, HEADS, key[1]
        qkv = torch.randn(shape, device=device, dtype=dtype_of(key))
        inv_freq = torch.rand(key[1] // 4, device=device)
        return lambda: rope_2d(qkv[:, 0], qkv[:, 1], packed.coords, inv_freq, backend="triton")

    return [Call(name, call(packed)) for name, packed in _grids(device)]


def _rope_gate(key: Key, device: str) -> None:
    verified("rope_2d", dtype_of(key), device, head_dim=key[1])


def _norm_keys(chip: str) -> list[Key]:
    return [(chip, width) for width in (512, 1024, 2048, 4096, 8192)]


def _norm_candidates(key: Key) -> list[NormConfig]:
    most = max(1, 4096 // key[1])
    rows = [r for r in (1, 2, 4, 8) if r <= most and (r * key[1] >= 1024 or r == most)]
    return [NormConfig(r, w) for r, w in product(rows, (1, 2, 4, 8, 16))]


def _norm_calls(key: Key, device: str, *, backward: bool) -> list[Call]:
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

    return [Call(name, call(packed)) for name, packed in _grids(device)]


def _norm_gate(key: Key, device: str) -> None:
    verified("layer_norm_pixel_shuffle", torch.float16, device, channels=key[1])


def _block_candidates(key: Key) -> list[BlockConfig]:
    blocks = [BlockConfig(n, w) for n, w in product((512, 1024, 2048, 4096), (2, 4, 8))]
    return [c for c in blocks if 4 <= c.elements // (32 * c.num_warps) <= 32]


def _swiglu_calls(key: Key, device: str) -> list[Call]:
    """Forward and backward in the widths of ViT-7B and ViT-H+ (8192 and 5120)."""

    def call(width: int) -> Run:
        g, gate, up = torch.randn(3, TOKENS, width, device=device, dtype=dtype_of(key)).unbind()
        leaves = gate.requires_grad_(), up.requires_grad_()
        return lambda: torch.autograd.grad(swiglu(*leaves, backend="triton"), leaves, g)

    return [Call(f"F={width}", call(width)) for width in (5120, 8192)]


def _swiglu_gate(key: Key, device: str) -> None:
    verified("swiglu", dtype_of(key), device, width=5121)


def _patchify_calls(key: Key, device: str) -> list[Call]:
    def call(side: int) -> Run:
        shape = max(1, TOKENS // (side // 16) ** 2), 3, side, side
        images = torch.randint(256, shape, device=device, dtype=torch.uint8)
        options: dict[str, Any] = {"dtype": dtype_of(key), "backend": "triton"}
        return lambda: normalize_patchify(images, 16, *IMAGENET, **options)

    return [Call(f"{side} px", call(side)) for side in (224, 768, 1024)]


def _patchify_gate(key: Key, device: str) -> None:
    for patch_size in (16, 14):
        verified("normalize_patchify", dtype_of(key), device, patch_size=patch_size)


def _norm_op(table: str, backward: bool) -> TunedOp:
    return TunedOp(
        table,
        _norm_keys,
        _norm_candidates,
        _norm_gate,
        lambda key, device: _norm_calls(key, device, backward=backward),
        lambda key, config: jobs.layer_norm_job(key[1], torch.bfloat16, config, backward),
    )


OPS = ATTENTION_OPS | LINEAR_OPS | {
    "gemm": TunedOp(
        "GEMM", size_keys, gemm_candidates, _gemm_gate, _gemm_calls,
        lambda key, config: jobs.pixel_shuffle_job("forward", dtype_of(key), config),
    ),
    "gemm_parts": TunedOp(
        "GEMM_PARTS", size_keys, _gemm_parts_candidates, _gemm_gate, _gemm_parts_calls,
        lambda key, config: jobs.pixel_shuffle_job(
            "forward", dtype_of(key), config, split=True
        ),
    ),
    "rope": TunedOp(
        "ROPE", attention_keys, _rope_candidates, _rope_gate, _rope_calls,
        attention_job(jobs.rope_job),
    ),
    "norm_forward": _norm_op("NORM_FORWARD", False),
    "norm_backward": _norm_op("NORM_BACKWARD", True),
    "swiglu": TunedOp(
        "SWIGLU", size_keys, _block_candidates, _swiglu_gate, _swiglu_calls,
        lambda key, config: jobs.swiglu_job(dtype_of(key), config, backward=True),
    ),
    "patchify": TunedOp(
        "PATCHIFY", size_keys, _block_candidates, _patchify_gate, _patchify_calls,
        lambda key, config: jobs.patchify_job(dtype_of(key), config),
    ),
}  # fmt: skip
