"""varlen_attention: bidirectional softmax attention inside each segment of a packed batch.

    out[t, h] = sum_u softmax_u(scale * q[t, h] . k[u, h]) v[u, h]       u over the segment of t
    lse[h, t] = log2 sum_u exp(scale * q[t, h] . k[u, h])                kept for the backward

FlashAttention-2 (Dao 2023) over a list of tiles made on the host: no padding, no mask, nothing
between segments. Windows (Qwen2.5-VL's tower, say) are just more, shorter segments:
``PackedGrids.from_cu_seqlens(cu_window_seqlens)``.

The kernels are in triton_kernels/varlen_attention*.py. Only tensors and numbers cross the border of
the torch ops, so that one graph of torch.compile serves all packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .. import cpu_attention, cpu_rope
from ..attention_problem import Problem, folds_rope
from ..backends import autocasts, check_floats, choose_backend, installed
from ..packed_grids import PackedGrids, check_packed
from ..replay import replayed
from ..traced_grids import TracedGrids
from .rope_2d import check_constant, check_rope_inputs, check_table, rope_2d, rope_table
from .torch_op import ops, register, register_backward

MAX_HEAD_DIM = 128

_LAYOUT = (
    "Tensor cu_seqlens, Tensor tiles_64, Tensor tiles_128, Tensor short_segments, Tensor? coords, "
    "Tensor? inv_freq, Tensor? table, float scale"
)


def _empty_outputs(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    return out, lse


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _attention_grad(ctx: Any, g: Tensor, _: None) -> tuple[Tensor | None, ...]:
    grads = ops.varlen_attention_backward(g, *ctx.saved_tensors, ctx.scale)
    return *grads, *[None] * 8


def _backward_arguments(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *layout: Any
) -> tuple[Any, ...]:
    return Problem.from_arguments(q, k, v, *layout), g, out, lse


def _empty_grads(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in (q, k, v))
    return dq, dk, dv


register(
    "varlen_attention",
    f"(Tensor q, Tensor k, Tensor v, {_LAYOUT}) -> (Tensor, Tensor)",
    "varlen_attention:forward",
    fake=_empty_outputs,
    setup_context=_save,
    backward=_attention_grad,
    arguments=lambda *args: (Problem.from_arguments(*args),),
)
register_backward(
    "varlen_attention_backward",
    f"(Tensor g, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_LAYOUT}) "
    "-> (Tensor, Tensor, Tensor)",
    "varlen_attention_backward:backward",
    fake=_empty_grads,
    arguments=_backward_arguments,
)


@replayed
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: PackedGrids,
    scale: float | None = None,
    *,
    rope: tuple[Tensor, ...] | None = None,
    deterministic: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Attention of each image over itself.

    Under autocast q, k and v are cast to autocast's dtype, as scaled_dot_product_attention does.

    Args:
        q: ``[T, H, D]``, D up to 128 for the kernels; may be a strided slice of a packed qkv (the
            kernels copy a tensor only if its last stride is not 1).
        k: ``[T, Hk, D]``; Hk divides H, and each head of k serves ``H / Hk`` neighbours of q.
        v: As `k`.
        packed: Layout of the T tokens.
        scale: Factor of the scores; ``D ** -0.5`` when None.
        rope: ``(coords, inv_freq)`` of :func:`hrvlm_kernels.rope_2d`: the result, and the gradients
            of q and k, are those of rotating both first. The kernels then rotate q, dq and dk while
            they have them in registers, and k in a pass of its own or, in images of up to 256
            tokens on chips where that pays, in registers too. A third tensor is the table of
            :func:`hrvlm_kernels.ops.rope_2d.rope_table`, for callers with many layers: without it
            every call of the kernels writes one.
        deterministic: Of backend "flash_attn" alone, with flash-attn's meaning: whether its
            backward gives the same bits for the same inputs. That of the kernels always does;
            "sdpa" and "eager" follow ``torch.use_deterministic_algorithms``.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`. "flash_attn" is the package of
            that name or, where only torch has the kernel, ``torch.nn.attention.varlen``.

    Returns:
        ``[T, H, D]`` in the dtype of `q`, or autocast's.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        RuntimeError: the backend asked for can't run here; or, from the kernels, a gradient of
            the gradient was asked for.
    """
    check_packed(packed, q=q, k=k, v=v)
    check_floats(q=q, k=k, v=v)
    q, k, v = _as_autocast(q, k, v)
    check_attention_inputs(q, k, v, packed)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    coords, inv_freq, table = (*(rope or (None, None)), None)[:3]
    if coords is not None and inv_freq is not None:
        check_rope_inputs(q, k, coords, inv_freq)
        check_table(q, table)
    chosen = "sdpa" if isinstance(packed, TracedGrids) else _choose(q, backend)
    if chosen == "triton":
        check_constant(coords, inv_freq)
        if scale <= 0:  # the kernels take the largest q.k for the largest score
            q, scale = (-q, -scale) if scale else (q * 0, 1.0)
        out, _ = ops.varlen_attention(q, k, v, *packed.segments, coords, inv_freq, table, scale)
        return out
    if coords is not None and inv_freq is not None:
        if chosen == "sdpa" and cpu_rope.takes(coords, inv_freq, q, k):
            cos, sin = cpu_rope.cos_and_sin(coords, inv_freq, table)
            q, k = cpu_rope.rotated((q, k), cos, sin, heads_first=True)
        else:
            q, k = rope_2d(q, k, coords, inv_freq, backend=backend)
    if chosen == "flash_attn":
        return _flash_attn(q, k, v, packed, scale, deterministic)
    if isinstance(packed, TracedGrids):
        return packed.attention(q, k, v, scale)
    if chosen == "sdpa":
        return _sdpa(q, k, v, packed, scale)
    from .. import reference

    return reference.varlen_attention(q, k, v, packed, scale)[0]


def with_rope_table(
    packed: PackedGrids, x: Tensor, inv_freq: Tensor, backend: str = "auto"
) -> PackedGrids:
    """`packed` with RoPE's table, where the attention of queries in the dtype of `x` reads one.

    A model with several layers calls it once in a forward, and hands ``packed.rope_table`` to each
    as the third tensor of `rope`.
    """
    if isinstance(packed, TracedGrids) or packed.rope_table is not None:
        return packed
    if reads_rope_table(x, 4 * inv_freq.shape[0], backend):
        return packed.with_rope_table(rope_table(packed.coords, inv_freq))
    chosen = choose_backend("varlen_attention", backend, x)
    if chosen == "sdpa" and cpu_rope.takes(packed.coords, inv_freq, x):
        return packed.with_rope_table(torch.cat(cpu_rope.cos_and_sin(packed.coords, inv_freq), 1))
    return packed


def reads_rope_table(x: Tensor, head_dim: int, backend: str = "auto") -> bool:
    """Whether the attention of queries in the dtype of `x` reads RoPE's table."""
    (x,) = _as_autocast(x)
    is_folded = folds_rope(x.dtype, head_dim)
    return is_folded and choose_backend("varlen_attention", backend, x) == "triton"


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if tensors[0].dtype == torch.float64 or not autocasts(tensors[0]):
        return tensors
    return tuple(a.to(torch.get_autocast_dtype(device)) for a in tensors)


def _choose(q: Tensor, backend: str) -> str:
    chosen = choose_backend("varlen_attention", backend, q)
    if chosen == "triton" and q.shape[-1] > MAX_HEAD_DIM:
        if backend == "auto":
            return "sdpa"
        raise RuntimeError(
            f"varlen_attention: backend {backend!r} can't run: head_dim is {q.shape[-1]}, "
            f"the kernels take up to {MAX_HEAD_DIM}"
        )
    return chosen


def _flash_attn_installed() -> bool:
    """Whether there is FlashAttention 2; FlashAttention 4 has the name as a namespace only."""
    return installed("flash_attn")


# A constant to torch.compile, which can't trace the search; see launch.py.
_flash_attn_installed.__dict__["_dynamo_marked_constant"] = True


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedGrids, scale: float, deterministic: bool
) -> Tensor:
    ends, longest = packed.cu_seqlens, packed.max_seqlen
    if _flash_attn_installed():
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q, k, v, ends, ends, longest, longest,
            softmax_scale=scale, deterministic=deterministic,
        )  # fmt: skip
    from torch.nn.attention.varlen import varlen_attn

    if q.shape[1] != k.shape[1]:
        raise RuntimeError(
            "varlen_attention: backend 'flash_attn' can't run: torch.nn.attention.varlen takes as "
            f"many heads of k as of q, got {k.shape[1]} and {q.shape[1]}; flash-attn is not "
            "installed"
        )
    return cast(Tensor, varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, packed: PackedGrids, scale: float) -> Tensor:
    outputs = [
        cpu_attention.attention(q_i, k_i, v_i, scale).transpose(1, 2).flatten(0, 1)
        for q_i, k_i, v_i in heads_by_runs(packed.lengths, q, k, v)
    ]
    if not outputs:
        return torch.zeros_like(q)
    return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs)


def heads_by_runs(lengths: Sequence[int], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Views ``[B, H, L, D]`` of each ``[T, H, D]``, per run of equally long segments."""
    runs = _runs(lengths)
    sizes = [count * length for count, length in runs]
    # split, not slices: the gradient of each slice would be a tensor of all rows.
    pieces = zip(*(a.split(sizes) for a in tensors), strict=True)
    return [
        tuple([a.unflatten(0, run).transpose(1, 2) for a in rows])
        for run, rows in zip(runs, pieces, strict=True)
    ]


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(count, length) of neighbouring segments of equal length; empty segments are left out."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][1] == length:
            runs[-1] = (runs[-1][0] + 1, length)
        elif length:
            runs.append((1, length))
    return runs


def check_attention_inputs(q: Tensor, k: Tensor, v: Tensor, packed: PackedGrids) -> None:
    """Raise ValueError unless the tensors fit the layout as :func:`varlen_attention` needs them."""
    if (
        q.ndim != 3
        or k.ndim != 3
        or k.shape != v.shape
        or q.shape[0] != k.shape[0]
        or q.shape[2] != k.shape[2]
    ):
        raise ValueError(
            "q must be [T, H, D], k and v [T, Hk, D] with equal T and D; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: its {k.shape[1]} heads must divide the {q.shape[1]} heads of q")
    packed.check_rows(q, "q")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if len({q.device, k.device, v.device, packed.device}) > 1:
        raise ValueError(
            f"q, k, v and packed must be on one device, got {q.device}, {k.device}, {v.device}, "
            f"{packed.device}"
        )
