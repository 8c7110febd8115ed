"""What others ship, executed the same way: Liger, fla, flash-attn's rotary, FlexAttention.

``--peers FOLDER`` names where they lie: ``pip install --no-deps --target FOLDER liger-kernel
fla-core einops``, and flash-attn's ``flash_attn/ops/triton/rotary.py`` out of its sdist. What is
not there is named on the page. They are imported without a GPU: they only ask which chip there is.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.counted import flex, textbook
from benchmarks.counted.attention import (
    BF16,
    HEAD_DIMS,
    HEADS,
    backward_case,
    check_forward,
    forward_case,
    inputs,
)
from benchmarks.counted.case import Case, Grid, Later, Part, first, spread
from hrvlm_kernels.triton_kernels.tilings import Tiling

NAMES = {
    "liger_kernel.ops": "liger-kernel 0.8.5",
    "fla.ops": "fla-core 0.6.0",
    "flash_attn.ops": "flash-attn 2.8.3 (its Triton rotary)",
}
# Of the textbook's tilings the best one counts; by chip.
TEXTBOOK = {
    80: (Tiling(128, 64, 4, 3), Tiling(128, 64, 8, 3)),
    90: (Tiling(128, 64, 4, 3), Tiling(128, 128, 8, 2)),
}
FLEX, FLA = "FlexAttention", "fla parallel_attn (causal)"
SIZES = ("n=201", "n=577", "n=2309", "n=4101")  # they take images of one length


class MissingError(RuntimeError):
    """A peer that is not installed where ``--peers`` says."""


def load(name: str, folder: Path | None) -> ModuleType:
    """A module of a peer.

    Raises:
        MissingError: it is not there.
    """
    what = next(title for prefix, title in NAMES.items() if name.startswith(prefix))
    if folder is None or not (folder / name.partition(".")[0]).is_dir():
        raise MissingError(f"{what} is not installed")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    with (
        mock.patch("torch.cuda.get_device_name", lambda index=0: "NVIDIA H100"),
        mock.patch("torch.cuda.get_device_capability", lambda index=0: (9, 0)),
    ):
        return importlib.import_module(name)


def rotary(folder: Path | None) -> ModuleType:
    """flash-attn's file alone: its package needs CUDA."""
    path = None if folder is None else folder / "flash_attn/ops/triton/rotary.py"
    if path is None or not path.is_file():
        raise MissingError(f"{NAMES['flash_attn.ops']} is not installed")
    spec = importlib.util.spec_from_file_location("peer_rotary", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def heads_last(grid: Grid) -> list[Part]:
    """A grid of tiles, then heads: a full tile and the last one, of the first head."""
    tiles, others = grid[0], float(grid[1] * grid[2])
    last = [([tiles - 1], others)]
    return [([0], (tiles - 1) * others), *last] if tiles > 1 else last


def middle_and_last(grid: Grid) -> list[Part]:
    """The same under a causal mask: each full tile does as much more than the one before it.

    So the middle one, or two, have the mean of all full ones.
    """
    full, others = grid[0] - 1, float(grid[1] * grid[2])
    last = [([full], others)]
    middle = sorted({(full - 1) // 2, full // 2})
    return [(middle, full * others / len(middle)), *last] if full else last


def _dense(size: str, head_dim: int) -> tuple[Case, list[Tensor], Tensor, Tensor]:
    """Our case of that size, for its work; q, k and v without other tensors between; outputs."""
    case = forward_case(size, head_dim, False)
    n = int(size.removeprefix("n="))
    q, k, v = (a.contiguous() for a in inputs([n], head_dim)[1])
    return case, [q, k, v], torch.zeros_like(q), torch.zeros(HEADS, n)


def _textbook(tiling: Tiling) -> str:
    return f"textbook FA2 {tiling.rows}x{tiling.step}, {tiling.num_warps} warps"


def textbook_case(tiling: Tiling, size: str, head_dim: int) -> Case:
    """FlashAttention-2 as the paper has it."""
    case, tensors, out, lse = _dense(size, head_dim)
    return replace(
        case,
        variant=_textbook(tiling),
        role="peer",
        start=partial(textbook.start_flash_attention_2, *tensors, out, lse, tiling),
        samples={"flash_attention_2": heads_last},
        check=partial(check_forward, out, *tensors),
    )


def flex_case(chip: int, size: str, head_dim: int) -> Case:
    """FlexAttention's template."""
    case, tensors, out, lse = _dense(size, head_dim)
    return replace(
        case,
        variant=FLEX,
        role="peer",
        start=partial(flex.start, chip, *tensors, out, lse),
        samples={"flex_attention": heads_last},
        check=partial(check_forward, out, *tensors),
    )


def _chip_of_fla(module: ModuleType, chip: int) -> Any:
    """It asks how much shared memory there is."""
    shared = {80: ("ampere",), 90: ("ampere", "hopper")}[chip]
    return mock.patch.object(module, "check_shared_mem", lambda arch, index=None: arch in shared)


def fla_case(folder: Path | None, chip: int, size: str, head_dim: int) -> Case:
    """Fla's softmax attention: causal, so that a score counts where key <= query."""
    module = load("fla.ops.attn.parallel", folder)
    case, tensors, _, _ = _dense(size, head_dim)
    n = len(tensors[0])
    scores = HEADS * n * (n + 1) / 2
    results: list[Tensor] = []

    def start() -> None:
        # What no sampled program writes is zero.
        with _chip_of_fla(module, chip), mock.patch("torch.empty", torch.zeros):
            batch = [a[None] for a in tensors]
            results.append(module.parallel_attn_fwd(*batch, None, None, head_dim**-0.5)[0])

    return replace(
        case,
        variant=FLA,
        role="peer",
        start=start,
        units=scores,
        flops=4 * scores * head_dim,
        samples={"parallel_attn_fwd": middle_and_last},
        check=lambda: check_forward(results[0][0].nan_to_num(), *tensors, causal=True),
    )


def fla_backward_case(folder: Path | None, chip: int, size: str, head_dim: int) -> Case:
    """Likewise its backward."""
    module = load("fla.ops.attn.parallel", folder)
    ours = backward_case(size, head_dim, False)
    n = int(size.removeprefix("n="))
    q, k, v = (a.contiguous()[None] for a in inputs([n], head_dim)[1])
    out, g = torch.randn_like(q), torch.randn_like(q)
    lse = torch.randn(1, n, HEADS) + 10
    scores = HEADS * n * (n + 1) / 2

    def start() -> None:
        with _chip_of_fla(module, chip):
            module.parallel_attn_bwd(q, k, v, out, None, lse, g, scale=head_dim**-0.5)

    return replace(
        ours,
        variant=FLA,
        role="peer",
        start=start,
        units=scores,
        flops=10 * scores * head_dim,
        samples={"parallel_attn_bwd_kernel_d": middle_and_last},
    )


def liger_rope(folder: Path | None, ours: Case, q: Tensor, k: Tensor) -> Case:
    """One position a token, cos and sin from a table in bfloat16."""
    module = load("liger_kernel.ops.rope", folder)
    n, _, head_dim = q.shape
    angle = torch.rand(1, n, head_dim // 2)
    cos, sin = (torch.cat((f(angle), f(angle)), -1).to(BF16) for f in (torch.cos, torch.sin))
    both = [a.contiguous()[None].transpose(1, 2) for a in (q, k)]
    return replace(
        ours,
        variant="Liger (1-D, tables)",
        role="peer",
        start=lambda: module.rope_forward(*both, cos, sin),
        samples={"rope": spread(8)},
    )


def flash_attn_rope(folder: Path | None, ours: Case, q: Tensor) -> Case:
    """Likewise; q alone, so half of the work."""
    module = rotary(folder)
    n, _, head_dim = q.shape
    cos, sin = (f(torch.rand(n, head_dim // 2)).to(BF16) for f in (torch.cos, torch.sin))
    dense = q.contiguous()[None]

    def start() -> None:
        with mock.patch("torch.cuda.device", lambda index: nullcontext()):
            module.apply_rotary(dense, cos, sin)

    return replace(
        ours,
        variant="flash-attn rotary (1-D, tables)",
        role="peer",
        start=start,
        units=ours.units / 2,
        least=ours.least / 2,
        samples={"rotary": spread(8)},
    )


def liger_norm(folder: Path | None, ours: Case, x: Tensor, weight: Tensor, bias: Tensor) -> Case:
    """LayerNorm alone: nothing is added, nothing changes places."""
    module = load("liger_kernel.ops.layer_norm", folder)
    return replace(
        ours,
        variant="Liger layer_norm",
        role="peer",
        start=lambda: module.layer_norm_forward(x, weight, bias, 1e-5),
        samples={"layer_norm": spread(8)},
    )


def liger_swiglu(folder: Path | None, ours: Case, gate: Tensor, up: Tensor) -> Case:
    """From two dense tensors."""
    module = load("liger_kernel.ops.swiglu", folder)
    dense = gate.contiguous(), up.contiguous()
    return replace(
        ours,
        variant="Liger swiglu",
        role="peer",
        start=lambda: module.swiglu_forward(*dense),
        samples={"swiglu": spread(4)},
    )


def matmul_case(ours: Case, a: Tensor, weight: Tensor, config: Any) -> Case:
    """The product alone, of rows that were shuffled before."""
    out = torch.zeros(a.shape[0], weight.shape[0], dtype=BF16)
    return replace(
        ours,
        variant=f"textbook matmul {config.block_m}x{config.block_n}, already shuffled",
        role="peer",
        start=lambda: textbook.start_matmul(a, weight, out, config),
        samples={"matmul": first},
    )


def attention(chip: int, folder: Path | None) -> Iterator[Callable[[], Case]]:
    """All of them, made one by one; one that is missing raises MissingError when it is made."""
    for head_dim in HEAD_DIMS:
        for size in SIZES:
            name = "attention forward", f"{size} D={head_dim}"
            for tiling in TEXTBOOK[chip]:
                make: Callable[[], Case] = partial(textbook_case, tiling, size, head_dim)
                yield Later((*name, _textbook(tiling)), make)
            yield Later((*name, FLEX), partial(flex_case, chip, size, head_dim))
            yield Later((*name, FLA), partial(fla_case, folder, chip, size, head_dim))


def backwards(chip: int, folder: Path | None) -> Iterator[Callable[[], Case]]:
    """Likewise of the backward."""
    for head_dim in HEAD_DIMS:
        for size in SIZES:
            name = "attention backward", f"{size} D={head_dim}", FLA
            yield Later(name, partial(fla_backward_case, folder, chip, size, head_dim))
