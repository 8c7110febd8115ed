"""The entries of products with more in their epilogues: ours against torch's and a pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compiled import jobs
from benchmarks.tuning.rows import (
    TOKENS,
    Call,
    Key,
    TunedOp,
    dtype_of,
    gemm_candidates,
    size_keys,
)
from hrvlm.verification import rules
from hrvlm_kernels.ops.linear_gelu import linear_gelu, takes_kernel
from hrvlm_kernels.ops.linear_rope_2d import linear_rope_2d
from hrvlm_kernels.ops.linear_swiglu import linear_swiglu
from hrvlm_kernels.ops.rope_2d import rope_2d, rope_table

SIZES = ((384, 1536), (1024, 4096), (4096, 8192))  # C and F of DINOv3's S, L and 7B
QKV_SIZES = ((384, 1152), (1024, 3072), (4096, 12288))
HEAD_DIM = 64


def _gelu_inputs(tokens: int, channels: int, width: int, key: Key, device: str) -> list[Tensor]:
    shapes = (tokens, channels), (width, channels), (width,)
    x, weight, bias = (torch.randn(*shape, device=device) for shape in shapes)
    return [a.to(dtype_of(key)) for a in (x, weight / channels**0.5, bias)]


def _swiglu_inputs(tokens: int, channels: int, width: int, key: Key, device: str) -> list[Tensor]:
    x, gate, gate_bias = _gelu_inputs(tokens, channels, width, key, device)
    _, up, up_bias = _gelu_inputs(1, channels, width, key, device)
    return [x, gate, up, gate_bias, up_bias]


@lru_cache(maxsize=4)
def _positions(tokens: int, device: str) -> tuple[Tensor, Tensor]:
    coords = torch.rand(tokens, 2, device=device) * 2 - 1
    return coords, 100.0 ** (-4 * torch.arange(HEAD_DIM // 4, device=device) / HEAD_DIM)


@lru_cache(maxsize=4)
def _with_table(tokens: int, device: str) -> tuple[Tensor, ...]:
    return *_positions(tokens, device), rope_table(*_positions(tokens, device))


def _rotated(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """By the kernel, or torch's product and the pass over k that attention then needs."""
    tokens, device = len(x), str(x.device)
    if backend != "auto":
        return linear_rope_2d(x, weight, bias, _positions(tokens, device), backend=backend)
    if takes_kernel("linear_rope_2d", backend, x):
        return linear_rope_2d(x, weight, bias, _with_table(tokens, device))
    qkv = F.linear(x, weight, bias).unflatten(1, (3, -1, HEAD_DIM))
    rope_2d(qkv[:, 1], qkv[:, 1, :0], *_positions(tokens, device))
    return qkv


def _entry(
    name: str,
    op: Callable[..., Tensor],
    inputs: Callable[..., list[Tensor]],
    sizes: tuple[tuple[int, int], ...] = SIZES,
) -> TunedOp:
    products = 2 if op is linear_swiglu else 1

    def gate(key: Key, device: str) -> None:
        tensors = inputs(300, 80, 192, key, device)
        plain, exact = (
            op(*(a.to(dtype) for a in tensors), backend="eager")
            for dtype in (dtype_of(key), torch.float64)
        )
        ours, plain, exact = (a.flatten(1) for a in (op(*tensors), plain, exact))
        for f in rules.contraction(ours, exact, plain):
            assert f.passed, f"{name}, {f.part}: {f.error:.3e} > {f.limit:.3e}"

    def calls(key: Key, device: str) -> list[Call]:
        """By "auto": without a row, torch's products."""
        return [
            Call(
                f"C={channels} F={width}",
                partial(op, *inputs(TOKENS, channels, width, key, device)),
                2 * products * TOKENS * channels * width,
            )
            for channels, width in sizes
        ]

    return TunedOp(
        name.upper(), size_keys, lambda key: [None, *gemm_candidates(key)], gate, calls,
        lambda key, config: jobs.linear_job(name, dtype_of(key), config), counted=False,
    )  # fmt: skip


LINEAR_OPS = {
    "linear_gelu": _entry("linear_gelu", linear_gelu, _gelu_inputs),
    "linear_swiglu": _entry("linear_swiglu", linear_swiglu, _swiglu_inputs),
    "linear_rope_2d": _entry("linear_rope_2d", _rotated, _gelu_inputs, QKV_SIZES),
}
