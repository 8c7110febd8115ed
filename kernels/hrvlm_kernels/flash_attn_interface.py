"""flash-attn's own function over the kernels of this package: switch by changing an import.

    from flash_attn import flash_attn_varlen_func
    from hrvlm_kernels.flash_attn_interface import flash_attn_varlen_func

Code that knows its lengths on the host should call :func:`hrvlm_kernels.varlen_attention` with a
:class:`hrvlm_kernels.PackedGrids`: reading ``cu_seqlens`` back from a GPU, as has to be done here,
waits for it, and breaks a graph of torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .ops.varlen_attention import varlen_attention
from .packed_grids import PackedGrids

# cu_seqlens -> (its version counter, its layout): the layers of a model share one tensor.
_layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Bidirectional attention inside each sequence, with the signature of flash-attn 2.

    The lengths are read from `cu_seqlens_q` once per tensor: as long as the same tensor comes, and
    nothing has been written to it, the layout is taken from a cache. Tensors made under
    ``torch.inference_mode`` do not tell whether they were written to and are read at each call.

    Args:
        q: ``[T, H, D]``, D up to 128; float32 is fine as well.
        k: ``[T, Hk, D]``; Hk divides H.
        v: As `k`.
        cu_seqlens_q: ``[B + 1]`` int32, ``[0, n0, n0 + n1, ...]``, on any device.
        cu_seqlens_k: The same tensor, or an equal one.
        max_seqlen_q: Not below the longest sequence; otherwise not needed.
        max_seqlen_k: As `max_seqlen_q`.
        dropout_p: 0.
        softmax_scale: Factor of the scores; ``D ** -0.5`` when None.
        causal: False.
        window_size: ``(-1, -1)``: sequences that are windows already (Qwen2.5-VL) work, sliding
            windows do not.
        softcap: 0.
        alibi_slopes: None.
        deterministic: Either: the backward gives the same bits for the same inputs in any case.
            flash-attn has the argument.
        return_attn_probs: False.
        block_table: None.

    Returns:
        ``[T, H, D]``.

    Raises:
        NotImplementedError: an argument asks for what the kernels do not do.
        ValueError: shapes, lengths, dtypes or devices do not fit together.
    """
    window = tuple(window_size) if window_size is not None else (-1, -1)
    for name, value, only in (
        ("dropout_p", dropout_p, 0.0),
        ("causal", bool(causal), False),
        ("window_size", window, (-1, -1)),
        ("softcap", softcap or 0.0, 0.0),
        ("return_attn_probs", bool(return_attn_probs), False),
    ):
        if value != only:
            raise NotImplementedError(f"{name} must be {only}, got {value}")
    for name, tensor in (("alibi_slopes", alibi_slopes), ("block_table", block_table)):
        if tensor is not None:
            raise NotImplementedError(f"{name} must be None")
    packed = _layout(cu_seqlens_q, q.device)
    if (
        cu_seqlens_k is not cu_seqlens_q
        and _layout(cu_seqlens_k, q.device).lengths != packed.lengths
    ):
        raise NotImplementedError("cu_seqlens_k must equal cu_seqlens_q: this is self-attention")
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest < packed.max_seqlen:
            raise ValueError(f"{name} is {longest}, the longest sequence has {packed.max_seqlen}")
    return varlen_attention(q, k, v, packed, softmax_scale, deterministic=deterministic)


def _layout(cu_seqlens: Tensor, device: torch.device) -> PackedGrids:
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 [B + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.is_inference():
        return PackedGrids.from_cu_seqlens(cu_seqlens, device=device)
    version, packed = _layouts.get(cu_seqlens, (None, None))
    if version != cu_seqlens._version or packed.device != device:
        packed = PackedGrids.from_cu_seqlens(cu_seqlens, device=device)
        _layouts[cu_seqlens] = cu_seqlens._version, packed
    return packed
