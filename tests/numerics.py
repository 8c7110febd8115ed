"""What counts as right: the rules of the numerics, one function each.

A contraction (attention, projection, encoder) may err at most `factor` times as much, against
float64, as the eager version in the same precision does: over the whole tensor, in every segment,
and in the worst row. RoPE is elementwise and has an elementwise bound.
"""

import itertools

import torch
from torch import Tensor

from hrvlm_kernels import PackedGrids

# A baseline may be exact by luck (zeros, one-token segments); the error of one rounding is always
# allowed.
_ROUNDINGS = 2.0


def assert_contraction(
    out: Tensor,
    oracle: Tensor,
    baseline: Tensor,
    packed: PackedGrids | None = None,
    *,
    factor: float = 2.0,
) -> None:
    """`out` errs at most `factor` times as much as `baseline`, against the float64 `oracle`.

    Rows are dim 0. With `packed` (and T rows) the rule also holds for each segment.
    """
    assert out.shape == oracle.shape == baseline.shape, (out.shape, oracle.shape, baseline.shape)
    assert out.dtype == baseline.dtype and oracle.dtype == torch.float64
    assert torch.isfinite(out).all(), "not finite"
    assert torch.isfinite(oracle).all(), "the oracle is not finite"
    if out.numel() == 0:
        return
    eps = torch.finfo(out.dtype).eps
    error, allowed = (out.double() - oracle).flatten(1), (baseline.double() - oracle).flatten(1)
    size = oracle.flatten(1)
    parts = {"whole": slice(None)}
    if packed is not None and out.shape[0] == packed.total_tokens:
        ends = packed.cu_seqlens.tolist()
        parts |= {
            f"segment {i}": slice(a, b)
            for i, (a, b) in enumerate(itertools.pairwise(ends))
            if a < b
        }
    for name, rows in parts.items():
        limit = factor * allowed[rows].norm() + _ROUNDINGS * eps * size[rows].norm()
        assert error[rows].norm() <= limit, f"{name}: error {error[rows].norm():.3e} > {limit:.3e}"
    worst = factor * allowed.norm(dim=1).max() + _ROUNDINGS * eps * size.norm(dim=1).max()
    assert error.norm(dim=1).max() <= worst, (
        f"worst row: {error.norm(dim=1).max():.3e} > {worst:.3e}"
    )


def assert_rope(out: Tensor, a: Tensor, coords: Tensor, inv_freq: Tensor) -> None:
    """`out` is `a` ``[T, H, D]`` rotated: elementwise within rounding of float64 on the quantised
    input.

    The bound is ``eps/2 |ref| + 4 eps32 (|a cos| + |b sin|)`` plus what the rounding of the float32
    angle can do: an angle of size w rounded three times is off by at most ``1.5 eps32 w``, and
    moves the output by that much times ``|a sin| + |b cos|``.
    """
    assert out.shape == a.shape and out.dtype == a.dtype
    eps, eps32 = torch.finfo(a.dtype).eps, torch.finfo(torch.float32).eps
    angles = 2 * torch.pi * coords.double()[:, :, None] * inv_freq.double()
    angles = angles.flatten(1).tile(2)[:, None]
    first, second = a.double().chunk(2, -1)
    b = torch.cat((-second, first), -1)
    cos, sin = angles.cos(), angles.sin()
    ref = a.double() * cos + b * sin
    angle_error = 1.5 * eps32 * angles.abs()
    bound = (
        0.5 * eps * ref.abs()
        + 4 * eps32 * ((a.double() * cos).abs() + (b * sin).abs())
        + angle_error * ((a.double() * sin).abs() + (b * cos).abs())
        + 0.5 * torch.finfo(a.dtype).smallest_normal * eps
    )
    excess = (out.double() - ref).abs() - bound
    assert torch.isfinite(out).all(), "not finite"
    assert (excess <= 0).all(), f"worst excess {excess.max():.3e} at {excess.argmax().item()}"


def relative_error(out: Tensor, expected: Tensor) -> float:
    """``|out - expected| / |expected|`` over the whole tensor, in float64."""
    out, expected = out.double(), expected.double()
    return ((out - expected).norm() / expected.norm().clamp_min(1e-300)).item()
