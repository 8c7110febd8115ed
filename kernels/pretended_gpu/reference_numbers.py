"""The numbers of hrvlm_kernels' ops on the pretended GPU, from the package's own references.

An op runs as on a GPU first, so that its launcher's Python runs and its launches are recorded, and
what it allocated is then filled. Everything is computed in float32 and rounded once.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.utils._pytree import tree_map

from .record import RECORD, Op
from .torch_tensors import IMPLEMENTATIONS, MODE, inner, operands

_LOG2_E = 1.4426950408889634
# What torch has set aside inside an op is of a thread: another one has gradients.
_elsewhere = ThreadPoolExecutor(1)


def install(*, numbers: bool) -> None:
    """Import hrvlm_kernels, and run its ops here."""
    impl = torch.library.Library.impl

    def impl_and_keep(self: Any, name: str, run: Any, key: str = "", **rest: Any) -> None:
        if key == "CUDA":
            _keep(f"{self.ns}::{name}", run, numbers)
        impl(self, name, run, key, **rest)

    torch.library.Library.impl = impl_and_keep  # type: ignore[method-assign,assignment]
    try:
        from hrvlm_kernels import ops, qkv_attention  # noqa: F401

        for found in pkgutil.iter_modules(ops.__path__):
            importlib.import_module(f"{ops.__name__}.{found.name}")
    finally:
        torch.library.Library.impl = impl  # type: ignore[method-assign]
    for module in [m for name, m in sys.modules.items() if name.startswith("hrvlm_kernels.")]:
        for op in vars(module).values():
            if isinstance(op, CustomOpDef):
                _keep(op._qualname, op._init_fn, numbers)


def _keep(qualified: str, run: Callable[..., Any], numbers: bool) -> None:
    reference = REFERENCES[qualified.partition("::")[2]] if numbers else None

    def pretended(*args: Any, **kwargs: Any) -> Any:
        with MODE:
            out = run(*args, **kwargs)
        if RECORD.counts_ops:
            RECORD.ops.append(Op(qualified, False, operands((args, kwargs)), operands(out)))
        if reference is not None:
            inner_args, inner_kwargs = tree_map(inner, (args, kwargs))

            def fill() -> None:
                with RECORD.counting(False):
                    _fill(out, _elsewhere.submit(reference, *inner_args, **inner_kwargs).result())

            fill()
            RECORD.capture(fill)
        return out

    IMPLEMENTATIONS[qualified] = pretended


def _fill(outs: Any, numbers: Any) -> None:
    if numbers is None:  # it wrote into its arguments
        return
    pair = isinstance(outs, (tuple, list))
    for out, new in zip(outs if pair else [outs], numbers if pair else [numbers], strict=True):
        if new is None:
            continue
        if out.shape != new.shape or out.dtype != new.dtype:
            raise RuntimeError(
                f"the op allocated {out.dtype} {tuple(out.shape)}, its reference gives "
                f"{new.dtype} {tuple(new.shape)}"
            )
        out.data_on_cpu.copy_(new.detach())


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [a.detach().float().requires_grad_() for a in tensors]


def _normed(leaves: list[Tensor], eps: float) -> Tensor:
    """LayerNorm of x, weight and bias."""
    x, weight, bias = leaves
    return F.layer_norm(x, x.shape[1:], weight, bias, eps)


def _rope_2d(
    q: Tensor, k: Tensor, coords: Tensor, inv_freq: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    from hrvlm_kernels import reference

    signed = -coords if inverse else coords
    rotated = reference.rope_2d(q, k, signed, inv_freq, upcast=torch.float32)
    prefix = (coords == 0).all(1)[:, None, None]  # unchanged, NaN and all
    q_out, k_out = (
        torch.where(prefix, a, b.to(a.dtype)) for a, b in zip((q, k), rotated, strict=True)
    )
    return q_out, k_out


def _rope_table(coords: Tensor, inv_freq: Tensor) -> Tensor:
    angle = (2 * math.pi * coords)[:, :, None] * inv_freq  # [T, 2, D / 4]
    return torch.stack((angle.cos(), angle.sin()), 1).flatten(1)


def _linear_rope_2d(x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor) -> Tensor:
    bias = None if bias is None else bias.float()
    qkv = F.linear(x.float(), weight.float(), bias).unflatten(1, (3, -1, table.shape[1]))
    left, right = qkv[:, :2].chunk(2, -1)
    cos, sin = table[:, None, None].chunk(2, -1)
    qk = torch.cat((left * cos - right * sin, right * cos + left * sin), -1)
    return torch.cat((qk, qkv[:, 2:]), 1).to(x.dtype)


def _rope_2d_in_place(q: Tensor, k: Tensor, coords: Tensor, inv_freq: Tensor) -> None:
    q_out, k_out = _rope_2d(q.clone(), k.clone(), coords, inv_freq, False)
    q.copy_(q_out)
    k.copy_(k_out)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, rope: Any, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, by torch's attention for CPUs: some images have 4,101 tokens."""
    from hrvlm_kernels import reference

    if rope[0] is not None:
        q, k = reference.rope_2d(q, k, *rope, upcast=torch.float32)
    group = q.shape[1] // k.shape[1]
    outs, lses = [q.new_zeros(0, *q.shape[1:]).float()], [q.new_zeros(q.shape[1], 0).float()]
    lengths = [n for n in cu_seqlens.diff().tolist() if n]
    empty = q.shape[0] - sum(lengths)  # rows of no segment, behind all others
    pieces = [a.float().split([*lengths, empty])[:-1] for a in (q, k, v)]
    for rows in zip(*pieces, strict=True):
        q_i, k_i, v_i = (a.transpose(0, 1)[None] for a in rows)  # [1, H, n, D]
        k_i, v_i = (a.repeat_interleave(group, 1) for a in (k_i, v_i))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_i, k_i, v_i, scale=scale
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    outs.append(q.new_zeros(empty, *q.shape[1:]).float())
    lses.append(q.new_zeros(q.shape[1], empty).float())
    return torch.cat(outs), torch.cat(lses, dim=1)


def _varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, tiles_64: Tensor, tiles_128: Tensor,
    short_segments: Tensor, coords: Tensor | None, inv_freq: Tensor | None, table: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _attend(q, k, v, cu_seqlens, (coords, inv_freq), scale)
    return out.to(q.dtype), lse * _LOG2_E


def _varlen_attention_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
    tiles_64: Tensor, tiles_128: Tensor, short_segments: Tensor, coords: Tensor | None,
    inv_freq: Tensor | None, table: Tensor | None, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    leaves = _leaves(q, k, v)
    q_leaf, k_leaf, v_leaf = leaves
    exact, _ = _attend(q_leaf, k_leaf, v_leaf, cu_seqlens, (coords, inv_freq), scale)
    return tuple(a.to(q.dtype) for a in torch.autograd.grad(exact, leaves, g.float()))


def _pixel_shuffle_linear(
    x: Tensor, index: Tensor, cu_seqlens: Tensor, weight: Tensor, bias: Tensor | None, prefix: int
) -> Tensor:
    return _linear(x[index.long()].flatten(1), weight, bias).to(x.dtype)


def _pixel_shuffle_linear_dx(
    dy: Tensor, weight: Tensor, index: Tensor, cu_seqlens: Tensor, prefix: int, tokens: int
) -> Tensor:
    width = weight.shape[1] // index.shape[1]
    rows = (dy.float() @ weight.float()).view(-1, width)
    return torch.zeros(tokens, width).index_copy(0, index.flatten().long(), rows).to(dy.dtype)


def _pixel_shuffle_linear_dweight(dy: Tensor, x: Tensor, index: Tensor) -> Tensor:
    return (dy.float().T @ x[index.long()].flatten(1).float()).to(x.dtype)


def _layer_norm_pixel_shuffle(
    x: Tensor, index: Tensor, cu_seqlens: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
    prefix: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    bias = None if bias is None else bias.float()
    normed = F.layer_norm(x.float(), x.shape[1:], weight.float(), bias, eps)
    return normed.to(dtype)[index.long()].flatten(1)


def _layer_norm_pixel_shuffle_backward(
    dy: Tensor, x: Tensor, index: Tensor, cu_seqlens: Tensor, weight: Tensor, eps: float,
    prefix: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    leaves = _leaves(x, weight, torch.zeros_like(weight))
    rows = _normed(leaves, eps)[index.long()].flatten(1)
    dx, *sums = torch.autograd.grad(rows, leaves, dy.float())
    return dx.to(x.dtype), torch.stack(sums)


def _residual_layer_norm(
    x: Tensor, update: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    out = torch.addcmul(x.float(), update.float(), scale.float()).to(x.dtype)
    bias = None if bias is None else bias.float()
    normed = F.layer_norm(out.float(), out.shape[-1:], weight.float(), bias, eps)
    return out, normed.to(x.dtype)


def _residual_layer_norm_backward(
    g: Tensor, h: Tensor, out: Tensor, update: Tensor, scale: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = _leaves(out, weight, torch.zeros_like(weight))
    normed = _normed(leaves, eps)
    dout, dw, db = torch.autograd.grad(normed, leaves, h.float())
    dx = dout + g.float()
    sums = torch.stack([(dx * update.float()).sum(0), dw, db])
    return dx.to(out.dtype), (dx * scale.float()).to(out.dtype), sums


def _biased_residual_layer_norm(
    x: Tensor, update: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor,
    bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shift = torch.zeros_like(scale) if shift is None else shift
    update = update.float() + shift.float()
    return _residual_layer_norm(x, update, scale, weight, bias, eps)


def _biased_residual_layer_norm_backward(
    g: Tensor, h: Tensor, out: Tensor, scale: Tensor, weight: Tensor, eps: float, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As of an update of ones, of whose factor the gradient is the sum of dx."""
    ones = torch.ones_like(out)
    dx, dupdate, sums = _residual_layer_norm_backward(g, h, out, ones, scale, weight, eps)
    return dx, dupdate, F.pad(sums[:, None], (0, 0, 0, count - 1))


def _linear_residual_gradients(
    product: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, parts: Tensor,
    norm_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    product, factor, sums = product.float(), scale.float(), parts.sum(1)
    dscale = (product * weight.float()).sum(1)
    if bias is not None:
        dscale = dscale + bias.float() * sums[0]
    vectors = torch.stack([dscale, factor * sums[0]]).to(scale.dtype)
    return (factor[:, None] * product).to(weight.dtype), vectors, sums[1:].to(norm_weight.dtype)


def _shifted_layer_norm(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    shifted = x.float() if shift is None else x.float() + shift.float()
    bias = None if bias is None else bias.float()
    return F.layer_norm(shifted, shifted.shape[1:], weight.float(), bias, eps).to(x.dtype)


def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x.float() + bias.float()).to(x.dtype)


def _bias_gelu_backward(g: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    leaves = _leaves(x, bias)
    grads = torch.autograd.grad(F.gelu(leaves[0] + leaves[1]), leaves, g.float())
    return grads[0].to(x.dtype), grads[1].to(bias.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.gelu(_linear(x, weight, bias)).to(x.dtype)


def _linear_swiglu(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None
) -> Tensor:
    return _swiglu(_linear(x, gate, gate_bias), _linear(x, up, up_bias)).to(x.dtype)


def _qkv_attention_backward(
    g: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, tiles_64: Tensor,
    tiles_128: Tensor, short_segments: Tensor, coords: Tensor | None, inv_freq: Tensor | None,
    table: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    leaves = _leaves(*qkv.unbind(1))
    q, k, v = leaves
    exact, _ = _attend(q, k, v, cu_seqlens, (None, None), scale)  # they come rotated
    dq, dk, dv = torch.autograd.grad(exact, leaves, g.float())
    if coords is not None and inv_freq is not None:
        dq, dk = _rope_2d(dq, dk, coords, inv_freq, True)
    return torch.stack([dq, dk, dv], 1).to(qkv.dtype)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def _swiglu_backward(g: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    leaves = _leaves(gate, up)
    product = F.silu(leaves[0]) * leaves[1]
    return tuple(a.to(gate.dtype) for a in torch.autograd.grad(product, leaves, g.float()))


def _normalize_patchify(
    images: list[Tensor], patch_size: int, mean: list[float], std: list[float], dtype: torch.dtype
) -> Tensor:
    from hrvlm_kernels import reference

    return reference.normalize_patchify(images, patch_size, mean, std).to(dtype)


REFERENCES: dict[str, Callable[..., Any]] = {
    "bias_gelu": _bias_gelu,
    "bias_gelu_backward": _bias_gelu_backward,
    "biased_residual_layer_norm": _biased_residual_layer_norm,
    "biased_residual_layer_norm_backward": _biased_residual_layer_norm_backward,
    "layer_norm_pixel_shuffle": _layer_norm_pixel_shuffle,
    "layer_norm_pixel_shuffle_backward": _layer_norm_pixel_shuffle_backward,
    "linear_gelu": _linear_gelu,
    "linear_rope_2d": _linear_rope_2d,
    "linear_residual_gradients": _linear_residual_gradients,
    "linear_swiglu": _linear_swiglu,
    "normalize_patchify": _normalize_patchify,
    "pixel_shuffle_linear": _pixel_shuffle_linear,
    "pixel_shuffle_linear_dweight": _pixel_shuffle_linear_dweight,
    "pixel_shuffle_linear_dx": _pixel_shuffle_linear_dx,
    "qkv_attention_backward": _qkv_attention_backward,
    "residual_layer_norm": _residual_layer_norm,
    "residual_layer_norm_backward": _residual_layer_norm_backward,
    "rope_2d": _rope_2d,
    "rope_2d_": _rope_2d_in_place,
    "rope_table": _rope_table,
    "shifted_layer_norm": _shifted_layer_norm,
    "swiglu": _swiglu,
    "swiglu_backward": _swiglu_backward,
    "varlen_attention": _varlen_attention,
    "varlen_attention_backward": _varlen_attention_backward,
}
