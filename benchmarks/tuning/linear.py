"""The entries of linear_gelu and linear_swiglu: products of ours against torch's and a pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
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
from hrvlm_kernels.ops.linear_gelu import linear_gelu
from hrvlm_kernels.ops.linear_swiglu import linear_swiglu

SIZES = ((384, 1536), (1024, 4096), (4096, 8192))  # C and F of DINOv3's S, L and 7B


def _gelu_inputs(tokens: int, channels: int, width: int, key: Key, device: str) -> list[Tensor]:
    shapes = (tokens, channels), (width, channels), (width,)
    x, weight, bias = (torch.randn(*shape, device=device) for shape in shapes)
    return [a.to(dtype_of(key)) for a in (x, weight / channels**0.5, bias)]


def _swiglu_inputs(tokens: int, channels: int, width: int, key: Key, device: str) -> list[Tensor]:
    x, gate, gate_bias = _gelu_inputs(tokens, channels, width, key, device)
    _, up, up_bias = _gelu_inputs(1, channels, width, key, device)
    return [x, gate, up, gate_bias, up_bias]


def _entry(name: str, op: Callable[..., Tensor], inputs: Callable[..., list[Tensor]]) -> TunedOp:
    products = 2 if op is linear_swiglu else 1

    def gate(key: Key, device: str) -> None:
        tensors = inputs(300, 80, 200, key, device)
        plain, exact = (
            op(*(a.to(dtype) for a in tensors), backend="eager")
            for dtype in (dtype_of(key), torch.float64)
        )
        for f in rules.contraction(op(*tensors), exact, plain):
            assert f.passed, f"{name}, {f.part}: {f.error:.3e} > {f.limit:.3e}"

    def calls(key: Key, device: str) -> list[Call]:
        """By "auto": without a row, torch's products."""
        return [
            Call(
                f"C={channels} F={width}",
                partial(op, *inputs(TOKENS, channels, width, key, device)),
                2 * products * TOKENS * channels * width,
            )
            for channels, width in SIZES
        ]

    return TunedOp(
        name.upper(), size_keys, lambda key: [None, *gemm_candidates(key)], gate, calls,
        lambda key, config: jobs.linear_job(name, dtype_of(key), config), counted=False,
    )  # fmt: skip


LINEAR_OPS = {
    "linear_gelu": _entry("linear_gelu", linear_gelu, _gelu_inputs),
    "linear_swiglu": _entry("linear_swiglu", linear_swiglu, _swiglu_inputs),
}
