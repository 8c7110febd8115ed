"""Inputs for varlen_attention, what it should give, and the rule that compares both."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hrvlm_kernels import PackedGrids, reference
from hrvlm_kernels.attention_problem import Problem
from hrvlm_kernels.ops.varlen_attention import varlen_attention
from tests.kernels.helpers import COMPILED, gradients
from tests.numerics import assert_contraction

# n % 128 in {0, 1, 63, 64, 65, 73, 127}, n % 64 likewise, and an empty segment.
LENGTHS = (1, 5, 0, 63, 64, 65, 127, 128, 129, 201)
NAMES = ("out", "dq", "dk", "dv")
# Where a segment may end: at every row of a tile of 64, and behind wider ones. The interpreter
# takes every row by the same formula; in compiled code a row is of some thread and of some vector.
ENDS = (*range(1, 66), 129) if COMPILED else (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129)


@dataclass(frozen=True)
class Case:
    """q, k, v are slices of one packed qkv where the heads allow it; g is the cotangent."""

    packed: PackedGrids
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    rope: tuple[Tensor, Tensor] | None = None
    scale: float | None = None

    @property
    def inputs(self):
        return self.q, self.k, self.v

    @property
    def problem(self):
        """As the launchers take it."""
        scale = self.scale or self.q.shape[-1] ** -0.5
        return Problem(*self.inputs, self.packed.segments, self.rope, None, scale)


def make_case(
    lengths=LENGTHS, *, heads=1, kv_heads=None, head_dim=64, dtype=torch.float16, rope=False,
    scale=None, seed=0, device="cpu",
):  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    packed = PackedGrids.from_lengths(lengths, device=device)
    tokens, kv_heads = packed.total_tokens, kv_heads or heads

    def randn(*shape):
        return torch.randn(*shape, generator=rng).to(device, dtype)

    qkv = randn(tokens, heads + 2 * kv_heads, head_dim)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    positions = None
    if rope:
        coords = torch.rand(tokens, 2, generator=rng) * 2 - 1
        coords[::7] = 0  # as prefix tokens have
        inv_freq = 100.0 ** (-4 * torch.arange(head_dim // 4) / head_dim)
        positions = coords.to(device), inv_freq.to(device)
    return Case(packed, q, k, v, randn(tokens, heads, head_dim), positions, scale)


def kernel_results(case, **options):
    """out, dq, dk, dv of the Triton kernels."""
    options = {"rope": case.rope, "backend": "triton"} | options
    return gradients(
        lambda q, k, v: varlen_attention(q, k, v, case.packed, case.scale, **options),
        case.inputs,
        case.g,
    )


def reference_results(case, upcast=None):
    """out, dq, dk, dv of the reference: in float64, or the baseline in the dtype of the case."""

    def run(q, k, v):
        if case.rope is not None:
            q, k = reference.rope_2d(q, k, *case.rope, upcast=upcast)
        return reference.varlen_attention(q, k, v, case.packed, case.scale, upcast=upcast)[0]

    return gradients(run, [a.to(upcast or a.dtype) for a in case.inputs], case.g)


def check(case, results, names=NAMES):
    """The rule of contractions for each of `results`."""
    exact, baseline = reference_results(case, torch.float64), reference_results(case)
    by_name = dict(zip(NAMES, zip(exact, baseline, strict=True), strict=True))
    for name, result in zip(names, results, strict=True):
        terms = _terms(case).get(name)
        assert_contraction(result, *by_name[name], case.packed, terms=terms)


def check_kernel(case, **options):
    results = kernel_results(case, **options)
    check(case, results)
    return results


def _terms(case):
    """Sizes of what cancels in dq, dk and dv, for the roundings of the kernels' float32 numbers.

    ds = p (g.v - g.out) is a difference of two numbers. Eager takes the second as the mean of the
    first, so that rounding errors cancel as well where one p is near 1 (in a one-token segment it
    finds exactly 0); the flash formula rounds them apart. A sum g.v is rounded relative to |g||v|.

    dv of a lone token is g exactly, since p = 1; eager's exponent there is s - max s = 0 exactly,
    but that of the flash backward is s - lse, with lse rounded to float32. Compiled code keeps in s
    the bits that lse has lost (one fused multiply and subtract), so that p is off by up to half an
    eps of |lse| = |s|, and by another where s is rounded too. With 2 roundings allowed, the size of
    the term is |s| / 2. (Between several tokens eager rounds its scores as well.)
    """
    group = case.q.shape[1] // case.k.shape[1]
    scale = case.q.shape[-1] ** -0.5 if case.scale is None else case.scale
    q, k, v, g = (a.double() for a in (case.q, case.k, case.v, case.g))
    if case.rope is not None:
        q, k = reference.rope_2d(q, k, *case.rope, upcast=torch.float64)
    empty = torch.zeros(0, dtype=torch.float64, device=q.device)
    terms = {"dq": [empty], "dk": [empty], "dv": [empty]}
    for q_i, k_i, v_i, g_i in zip(*map(case.packed.split, (q, k, v, g)), strict=True):
        k_i, v_i = (a.repeat_interleave(group, 1) for a in (k_i, v_i))
        s = torch.einsum("mhd,nhd->hmn", q_i, k_i * scale)
        p = s.softmax(-1)
        lone = s.abs() / 2 if s.shape[1] == 1 else torch.zeros_like(s)
        q_i, k_i, v_i, g_i = (a.norm(dim=-1).T for a in (q_i, k_i, v_i, g_i))  # [H, n]
        ds = abs(scale) * p * g_i[:, :, None] * v_i[:, None, :]
        terms["dq"].append((ds @ k_i[:, :, None]).norm(dim=0)[:, 0])
        terms["dk"].append((q_i[:, None, :] @ ds).norm(dim=0)[0])
        terms["dv"].append((g_i[:, None, :] @ lone).norm(dim=0)[0])
    rounding = torch.finfo(torch.float32).eps / torch.finfo(case.q.dtype).eps
    return {name: rounding * torch.cat(parts) for name, parts in terms.items()}


def below_zero(case):
    """The case with all scores far below 0, where a key past the end, whose score is 0, wins.

    Among scores around 0 one key too many drowns in the rounding of 16-bit tensors. RoPE turns by
    an angle of 0.
    """
    rope = None if case.rope is None else (torch.zeros_like(case.rope[0]), case.rope[1])
    return replace(case, q=2 * case.q.abs(), k=-2 * case.k.abs(), rope=rope)


def with_layout(case, change):
    """The case with q, k, v and g replaced by ``change(tensor)``: other strides, equal values."""
    changed = {name: change(getattr(case, name)) for name in "qkvg"}
    for name, tensor in changed.items():
        assert torch.equal(tensor, getattr(case, name))
    return replace(case, **changed)
