"""Other implementations of attention inside the segments of a pack: a function per peer.

Each takes q, k, v ``[T, H, D]`` and a layout and returns a function of q, k, v; what can be made
once per batch (masks, tables) is made outside it, since the layers of a model share it. A peer that
can't run on these tensors raises :class:`Unavailable`, there or in its first call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.case import Unavailable
from hrvlm_kernels import PackedGrids

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def torch_varlen(packed: PackedGrids) -> Attention:
    """torch.nn.attention.varlen: FlashAttention-2 as torch ships it."""
    from torch.nn.attention.varlen import varlen_attn

    if packed.device.type != "cuda":
        raise Unavailable(f"torch.nn.attention.varlen needs a GPU, not {packed.device.type!r}")
    ends, longest = packed.cu_seqlens, packed.max_seqlen
    return lambda q, k, v: varlen_attn(q, k, v, ends, ends, longest, longest)


def flash_attn_2(packed: PackedGrids, **options: bool) -> Attention:
    """The flash-attn package."""
    if not installed("flash_attn.flash_attn_interface"):
        raise Unavailable("flash-attn is not installed")
    from flash_attn import flash_attn_varlen_func

    ends, longest = packed.cu_seqlens, packed.max_seqlen
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, **options)


def flash_attn_3(packed: PackedGrids, **options: bool) -> Attention:
    """FlashAttention-3, whose wheel is one module called flash_attn_interface."""
    if not installed("flash_attn_interface"):
        raise Unavailable("FlashAttention-3 is not installed")
    from flash_attn_interface import flash_attn_varlen_func

    ends, longest = packed.cu_seqlens, packed.max_seqlen
    return lambda q, k, v: _first(
        flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, **options)
    )


def flash_attn_4(packed: PackedGrids, **options: bool) -> Attention:
    """flash-attn-4 (CuTe DSL), whose arguments have to go by name."""
    if not installed("flash_attn.cute"):
        raise Unavailable("flash-attn-4 is not installed")
    from flash_attn.cute import flash_attn_varlen_func

    layout = {
        "cu_seqlens_q": packed.cu_seqlens,
        "cu_seqlens_k": packed.cu_seqlens,
        "max_seqlen_q": packed.max_seqlen,
        "max_seqlen_k": packed.max_seqlen,
    }
    return lambda q, k, v: _first(flash_attn_varlen_func(q, k, v, **layout, **options))


def flex_attention(packed: PackedGrids) -> Attention:
    """FlexAttention with a document mask, compiled; the block mask is made beforehand.

    Not compiled on the CPU, where only its form is of interest.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    gpu, tokens = packed.device.type == "cuda", packed.total_tokens
    lengths = torch.tensor(packed.lengths, device=packed.device)
    segment = torch.arange(len(packed), device=packed.device).repeat_interleave(lengths)

    def same_segment(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return segment[i] == segment[j]

    # Compiled, or the mask of 64k x 64k tokens would be written out.
    make = torch.compile(create_block_mask) if gpu else create_block_mask
    mask = make(same_segment, None, None, tokens, tokens, device=packed.device)
    attend = torch.compile(flex_attention, dynamic=False) if gpu else flex_attention
    return lambda q, k, v: attend(*(a.transpose(0, 1)[None] for a in (q, k, v)), block_mask=mask)[
        0
    ].transpose(0, 1)


def sdpa(packed: PackedGrids, backend: str | None = None) -> Attention:
    """scaled_dot_product_attention on a batch of equal segments.

    Args:
        packed: Its segments have one length.
        backend: "cudnn", "flash", "efficient" or "math"; default: what torch picks.
    """
    lengths = set(packed.lengths)
    if len(lengths) != 1:
        raise Unavailable("scaled_dot_product_attention takes a batch of equal lengths")
    shape = len(packed), lengths.pop()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (a.unflatten(0, shape).transpose(1, 2) for a in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(0, 1)

    if backend is None:
        return attend
    chosen = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }[backend]

    def restricted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(chosen):
            return attend(q, k, v)

    return restricted


def gluon_candidate(packed: PackedGrids) -> Attention:
    """A forward of our own that has not been measured, for sm_90; see benchmarks/candidates."""
    device = packed.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        raise Unavailable("the Gluon forward is for sm_90")
    from benchmarks.candidates.varlen_attention_gluon import gluon_attention

    return gluon_attention(packed)


PEERS: dict[str, Callable[[PackedGrids], Attention]] = {
    "torch varlen_attn (FA2)": torch_varlen,
    "SDPA cuDNN": lambda packed: sdpa(packed, "cudnn"),
    "SDPA flash": lambda packed: sdpa(packed, "flash"),
    "SDPA efficient": lambda packed: sdpa(packed, "efficient"),
    "flash-attn": flash_attn_2,
    "FlashAttention-3": flash_attn_3,
    "flash-attn-4": flash_attn_4,
    "FlexAttention, document mask": flex_attention,
}


# The same order of sums in every backward, as ours by default. The others have no such choice.
DETERMINISTIC: dict[str, Callable[[PackedGrids], Attention]] = {
    f"{name}, deterministic": lambda packed, make=make: make(packed, deterministic=True)
    for name, make in (
        ("flash-attn", flash_attn_2),
        ("FlashAttention-3", flash_attn_3),
        ("flash-attn-4", flash_attn_4),
    )
}


def installed(module: str) -> bool:
    """Whether a module can be found; its parent package is imported for that."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
