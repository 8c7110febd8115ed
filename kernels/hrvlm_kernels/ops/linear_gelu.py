"""linear_gelu: the product before an exact GELU, with bias and GELU in its epilogue, for inference.

    out[t, f] = z Phi(z),     z = x[t] . weight[f] + bias[f],     Phi(z) = erfc(-z / sqrt(2)) / 2

(Hendrycks and Gimpel 2016, arXiv 1606.08415). The pre-activation, which a gradient would need, is
never written: four trips of a ``[T, C]`` through memory for a product of the kernels in the place
of the library's. Which of the two is faster no count can tell, so that "auto" takes this one only
on chips where it was timed and won: those with a row in the table LINEAR_GELU.

For 16-bit results, with u = abs(z) and a polynomial p of degree 9,

    z Phi(z) = max(z, 0) - u Phi(-u),     Phi(-u) = 2 ** p(u)

errs by 5e-5 of itself at most, and by 4e-7 in all: far less than rounding to 16 bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import choose_backend
from ..replay import replayed
from .torch_op import ops, register_backward


def _empty_output(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)


register_backward(
    "linear_gelu",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "linear_gelu:forward",
    fake=_empty_output,
)


@replayed
def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """``gelu(x @ weight.T + bias)``; the Triton path has no gradient.

    Args:
        x: ``[T, C]`` float32, float16 or bfloat16 on the Triton path; any strides.
        weight: ``[F, C]`` in the dtype of `x`; any strides.
        bias: ``[F]`` in the dtype of `x`, or None.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`; "triton" takes the kernel where it
            was not measured, too.

    Returns:
        ``[T, F]`` in the dtype of `x`, contiguous on the Triton path.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on the torch path torch's own errors.
        RuntimeError: "triton" can't run here, or a gradient is needed.
    """
    if not takes_kernel("linear_gelu", backend, x, weight, bias):
        return F.gelu(F.linear(x, weight, bias))
    check_product(x, weight=weight)
    if bias is not None:
        check_bias(weight, bias=bias)
    return ops.linear_gelu(x, weight, bias)


def takes_kernel(op: str, backend: str, x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernel of `op` runs: asked for by name, or faster on this chip.

    Raises:
        RuntimeError: it was asked for by name, and can't run here or has no gradient to give.
    """
    if choose_backend(op, backend, x) != "triton":
        return False
    tensors = (x, *others)
    records = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in tensors)
    if backend == "triton" and records:
        raise RuntimeError(f"{op}: backend 'triton' can't run: it has no gradient")
    return backend == "triton" or (not records and is_measured(op, x))


def is_measured(op: str, x: Tensor) -> bool:
    """Whether a GPU found the kernel of `op` faster than torch's product and a pass."""
    from ..triton_kernels.launch import architecture, tile_choices

    return bool(tile_choices(op.upper(), architecture(x.device), x.dtype.itemsize))


def check_product(x: Tensor, **weights: Tensor) -> None:
    """Raise ValueError unless `x` can be multiplied with each of the weights."""
    if x.ndim != 2:
        raise ValueError(f"x must be [T, C], got {tuple(x.shape)}")
    shapes = {tuple(weight.shape) for weight in weights.values()}
    for name, weight in weights.items():
        if weight.ndim != 2 or weight.shape[1] != x.shape[1] or len(shapes) > 1:
            raise ValueError(
                f"{name} must be [F, C] with C = {x.shape[1]} and one F, got {tuple(weight.shape)}"
            )
        if weight.dtype != x.dtype or weight.device != x.device:
            raise ValueError(
                f"{name} must be {x.dtype} on {x.device}, got {weight.dtype} on {weight.device}"
            )


def check_bias(weight: Tensor, **biases: Tensor) -> None:
    """Raise ValueError unless the biases fit the product."""
    for name, bias in biases.items():
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name} must be [{weight.shape[0]}], got {tuple(bias.shape)}")
        if bias.dtype != weight.dtype or bias.device != weight.device:
            raise ValueError(
                f"{name} must be {weight.dtype} on {weight.device}, "
                f"got {bias.dtype} on {bias.device}"
            )
