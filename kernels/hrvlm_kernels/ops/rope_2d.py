"""rope_2d: DINOv3's axial rotary position embedding on packed q and k.

    angle[t, j]         = 2 pi * y[t] * inv_freq[j]            j in [0, D/4)
    angle[t, D/4 + j]   = 2 pi * x[t] * inv_freq[j]
    first  = a[:D/2] * cos(angle) - a[D/2:] * sin(angle)
    second = a[D/2:] * cos(angle) + a[:D/2] * sin(angle)

for each head vector ``a`` of token t (DINOv3's ``layers/rope_position_encoding.py`` and
``layers/attention.py``: the D/2 angles are tiled twice and the halves rotated). Angle, cos, sin and
the rotation are float32 whatever the dtype of q and k. Tokens at (0, 0), the prefix tokens, pass
through unchanged. The backward is the inverse rotation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import cpu_rope
from ..backends import check_floats, choose_backend
from ..replay import replayed
from .torch_op import add_op_namespace_prefix, ops, register, register_backward, run_directly


def _empty_outputs(
    q: Tensor, k: Tensor, coords: Tensor, inv_freq: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return q_out, torch.empty(k.shape, dtype=k.dtype, device=k.device)


def _save_positions(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, coords, inv_freq, inverse = inputs
    ctx.save_for_backward(coords, inv_freq)
    ctx.inverse = inverse


def _rotate_back(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor | None, ...]:
    coords, inv_freq = ctx.saved_tensors
    # The rotation is linear, and the same op again: higher derivatives need nothing more.
    q_grad, k_grad = ops.rope_2d(q_grad, k_grad, coords, inv_freq, not ctx.inverse)
    return q_grad, k_grad, None, None, None


register(
    "rope_2d",
    "(Tensor q, Tensor k, Tensor coords, Tensor inv_freq, bool inverse) -> (Tensor, Tensor)",
    "rope_2d:rotate_heads",
    fake=_empty_outputs,
    setup_context=_save_positions,
    backward=_rotate_back,
)


def _empty_table(coords: Tensor, inv_freq: Tensor) -> Tensor:
    shape = coords.shape[0], 4 * inv_freq.shape[0]
    return torch.empty(shape, dtype=torch.float32, device=coords.device)


register_backward(
    "rope_table",
    "(Tensor coords, Tensor inv_freq) -> Tensor",
    "rope_2d:write_table",
    fake=_empty_table,
)


@replayed
def _write_rotated(q: Tensor, k: Tensor, coords: Tensor, inv_freq: Tensor) -> tuple[()]:
    from ..triton_kernels.rope_2d import rotate_heads

    rotate_heads(q, k, coords, inv_freq, False, q, k)
    return ()


@torch.library.custom_op(add_op_namespace_prefix("rope_2d_"), mutates_args=("q", "k"))
def _rope_2d_in_place(q: Tensor, k: Tensor, coords: Tensor, inv_freq: Tensor) -> None:
    _write_rotated(q, k, coords, inv_freq)


def _rope_2d_directly(q: Tensor, k: Tensor, coords: Tensor, inv_freq: Tensor) -> None:
    _write_rotated(q, k, coords, inv_freq)
    torch.autograd.graph.increment_version((q, k))


run_directly("rope_2d_", _rope_2d_directly)


class _RotatedInPlace(torch.autograd.Function):
    """Records that `a` is being rotated in place; the rotation itself follows.

    Autograd refuses a Function that changes two views at once, which q and k of one qkv are.
    Recording one after the other and rotating both afterwards keeps a single launch, and what
    autograd refuses raises before any data change.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, coords: Tensor, inv_freq: Tensor) -> Tensor:
        ctx.save_for_backward(coords, inv_freq)
        ctx.mark_dirty(a)
        return a

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        coords, inv_freq = ctx.saved_tensors
        grad, _ = ops.rope_2d(grad, grad[:, :0], coords, inv_freq, True)
        return grad, None, None


@replayed
def rope_2d(
    q: Tensor, k: Tensor, coords: Tensor, inv_freq: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by their tokens' positions; returns new tensors.

    Args:
        q: ``[T, H, D]`` float32, float16 or bfloat16 (the torch path: also float64); any strides,
            e.g. a slice of a packed qkv.
        k: ``[T, Hk, D]``, as `q`.
        coords: ``[T, 2]`` float32 (y, x), e.g. ``PackedGrids.coords``.
        inv_freq: ``[D / 4]`` float32.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`.

    Returns:
        The rotated q and k, shapes and dtypes unchanged, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or `coords` or `inv_freq` require
            grad, which only the torch path differentiates.
        RuntimeError: the backend asked for can't run here.
    """
    check_rope_inputs(q, k, coords, inv_freq)
    if choose_backend("rope_2d", backend, q) == "triton":
        check_constant(coords, inv_freq)
        return ops.rope_2d(q, k, coords, inv_freq, False)
    return _rope_2d_eager(q, k, coords, inv_freq)


def rope_2d_(
    q: Tensor, k: Tensor, coords: Tensor, inv_freq: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """:func:`rope_2d` in place: writes into `q` and `k` and returns them.

    Works under autograd as torch's own in-place operations do: on slices ``qkv[:, 0]`` and
    ``qkv[:, 1]`` of one tensor, but not on a leaf that requires grad, nor on the outputs of
    ``unbind``, ``split`` or ``chunk``, which autograd does not let anyone change in place.

    Raises:
        ValueError: as :func:`rope_2d`, or `q` and `k` are one tensor, or one of them is expanded
            (stride 0).
        RuntimeError: the backend asked for can't run here, or autograd forbids the change.
    """
    check_rope_inputs(q, k, coords, inv_freq)
    _check_writable(q, k)
    records_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    # torch.compile makes every in-place operation functional, and loses what mark_dirty says.
    copies_back = records_grad and torch.compiler.is_compiling()
    if copies_back or choose_backend("rope_2d", backend, q) != "triton":
        q_out, k_out = rope_2d(q, k, coords, inv_freq, backend=backend)
        q.copy_(q_out)
        k.copy_(k_out)
        return q, k
    check_constant(coords, inv_freq)
    for a in (q, k):
        if records_grad and a.requires_grad:
            _RotatedInPlace.apply(a, coords, inv_freq)
    with torch.no_grad():
        ops.rope_2d_(q, k, coords, inv_freq)
    return q, k


def rope_table(coords: Tensor, inv_freq: Tensor) -> Tensor:
    """``[T, D]`` float32: cos, then sin, of each token's D / 2 angles, by a kernel.

    For the kernels of attention, whose programs have one head each: made once for a layout, it
    serves all heads of all layers.
    """
    check_constant(coords, inv_freq)
    return ops.rope_table(coords, inv_freq)


def check_table(q: Tensor, table: Tensor | None) -> None:
    """Raise ValueError unless `table`, if there is one, is of the tokens and head_dim of `q`."""
    if table is not None and (table.shape != q[:, 0].shape or table.dtype != torch.float32):
        raise ValueError(
            f"rope: its table must be float32 {list(q[:, 0].shape)}, as rope_table makes it, got "
            f"{table.dtype} {list(table.shape)}"
        )


def _rope_2d_eager(q: Tensor, k: Tensor, coords: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    if cpu_rope.takes(coords, inv_freq, q, k):
        q, k = cpu_rope.rotated((q, k), *cpu_rope.cos_and_sin(coords, inv_freq))
        return q, k
    from .. import reference

    upcast = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_out, k_out = reference.rope_2d(q, k, coords, inv_freq, upcast=upcast)
    return q_out.to(q.dtype), k_out.to(k.dtype)


def check_rope_inputs(q: Tensor, k: Tensor, coords: Tensor, inv_freq: Tensor) -> None:
    """Raise ValueError unless the four tensors fit together as :func:`rope_2d` needs them."""
    check_floats(q=q, k=k)
    if q.ndim != 3 or k.ndim != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            "q and k must be [T, H, D] with equal T and D, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    tokens, head_dim = q.shape[0], q.shape[2]
    if head_dim % 4 or head_dim == 0:
        raise ValueError(
            f"q: head_dim must be a multiple of 4 (two axes, two halves), got {head_dim}"
        )
    if q.dtype != k.dtype:
        raise ValueError(f"q and k must have one dtype, got {q.dtype} and {k.dtype}")
    if coords.shape != (tokens, 2) or coords.dtype != torch.float32:
        raise ValueError(
            f"coords must be float32 [{tokens}, 2], got {coords.dtype} {tuple(coords.shape)}"
        )
    if inv_freq.shape != (head_dim // 4,) or inv_freq.dtype != torch.float32:
        raise ValueError(
            f"inv_freq must be float32 [{head_dim // 4}], "
            f"got {inv_freq.dtype} {tuple(inv_freq.shape)}"
        )
    if len({q.device, k.device, coords.device, inv_freq.device}) > 1:
        raise ValueError(
            f"q, k, coords and inv_freq must be on one device, got {q.device}, {k.device}, "
            f"{coords.device}, {inv_freq.device}"
        )


def _check_writable(q: Tensor, k: Tensor) -> None:
    if q is k:
        raise ValueError("q and k are the same tensor, which can't be rotated in place twice")
    for name, a in (("q", q), ("k", k)):
        if any(step == 0 and size > 1 for step, size in zip(a.stride(), a.shape, strict=True)):
            raise ValueError(
                f"{name} is expanded (strides {a.stride()}) and can't be written in place"
            )


def check_constant(coords: Tensor | None, inv_freq: Tensor | None) -> None:
    """Raise ValueError where a gradient is wanted that no kernel of rotations computes."""
    for name, a in (("coords", coords), ("inv_freq", inv_freq)):
        if a is not None and a.requires_grad:
            raise ValueError(
                f"{name} requires grad, which the Triton kernels of RoPE do not compute: "
                'detach it, or use backend="eager"'
            )
