"""What ``hrvlm verify`` runs: each op on a pack of unlike images, forward and backward.

A case is a function of a :class:`Random` that yields directions: a name ("forward", "backward", or
a property of its own) and a function that runs it on a backend and measures the result. Sizes are
keywords, for who asks about others than ``hrvlm verify`` does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hrvlm_kernels import (
    PackedGrids,
    layer_norm_pixel_shuffle,
    normalize_patchify,
    pixel_shuffle_linear,
    reference,
    residual_layer_norm,
    rope_2d,
    swiglu,
    varlen_attention,
)
from hrvlm_kernels.backends import OPS

from ..images.processor import IMAGENET
from . import rules
from .rules import Finding

_GRIDS = ((4, 4), (8, 12), (4, 20), (16, 4), (12, 8))  # patches, each divisible by 4
_ODD_GRIDS = ((1, 1), (7, 13), (1, 31), (16, 4), (5, 2))
_LENGTHS = (1, 0, 17, 127, 64, 2, 130)
_PREFIX = 5


@dataclass(frozen=True)
class Measured:
    """One output or gradient with what was found about it.

    Attributes:
        name: of the tensor.
        findings: its errors and their limits.
        error: relative error against float64.
        baseline: that of the eager version in the same dtype.
    """

    name: str
    findings: list[Finding]
    error: float = 0.0
    baseline: float = 0.0


Direction = tuple[str, Callable[[str], list[Measured]]]


class Random:
    """Random tensors on a device, the same on every device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        """A normal tensor with standard deviation `scale`."""
        values = torch.randn(shape, generator=self.generator) * scale
        return values.to(self.device, self.dtype)


def _rope_case(random: Random, *, head_dim: int = 64) -> Iterator[Direction]:
    heads, dim = 2, head_dim
    packed = PackedGrids.from_grids(_ODD_GRIDS, num_prefix_tokens=_PREFIX, device=random.device)
    tokens = packed.total_tokens
    qkv = random(tokens, 3, heads, dim)  # q and k are strided slices, as in a model
    q, k = (qkv[:, i].requires_grad_() for i in range(2))
    dq, dk = random(tokens, heads, dim), random(tokens, heads, dim)
    inv_freq = 100.0 ** (-torch.arange(dim // 4, device=random.device) * 4 / dim)

    def measure(name: str, out: Tensor, a: Tensor, coords: Tensor) -> Measured:
        oracle, _ = rules.rope_reference(a, coords, inv_freq)
        baseline = reference.rope_2d(a.detach(), a.detach(), coords, inv_freq)[0]
        return Measured(
            name,
            rules.rope(out, a, coords, inv_freq),
            rules.relative_error(out, oracle),
            rules.relative_error(baseline, oracle),
        )

    def forward(backend: str) -> list[Measured]:
        out = rope_2d(q, k, packed.coords, inv_freq, backend=backend)
        return [measure(n, o, a, packed.coords) for n, o, a in zip("qk", out, (q, k), strict=True)]

    def backward(backend: str) -> list[Measured]:
        out = rope_2d(q, k, packed.coords, inv_freq, backend=backend)
        gradients = torch.autograd.grad(out, (q, k), (dq, dk))
        return [
            measure(n, g, d, -packed.coords)
            for n, g, d in zip(("dq", "dk"), gradients, (dq, dk), strict=True)
        ]

    yield "forward", forward
    yield "backward", backward


def _pixel_shuffle_case(
    random: Random, *, factor: int = 4, channels: int = 32, width: int = 48
) -> Iterator[Direction]:
    packed = PackedGrids.from_grids(_GRIDS, num_prefix_tokens=_PREFIX, device=random.device)
    x = random(packed.total_tokens, channels)
    weight = random(width, factor**2 * channels, scale=(factor**2 * channels) ** -0.5)
    bias = random(width)

    def plain(upcast: torch.dtype | None) -> Callable[..., Tensor]:
        return lambda x, w, b: reference.pixel_shuffle_linear(
            x, packed, factor, w, b, upcast=upcast
        )

    def op(backend: str) -> Callable[..., Tensor]:
        return lambda x, w, b: pixel_shuffle_linear(x, packed, factor, w, b, backend=backend)

    def gather(backend: str) -> list[Measured]:
        """Weights that pick single inputs: products with 1 and sums with 0 round nothing."""
        picked = torch.arange(width, device=random.device) * 97 % weight.shape[1]
        inputs = torch.arange(weight.shape[1], device=random.device)
        one_hot = (picked[:, None] == inputs).to(x.dtype)
        out = pixel_shuffle_linear(x, packed, factor, one_hot, backend=backend)
        expected = reference.pixel_shuffle(x, packed, factor)[:, picked]
        return [Measured("out", rules.equal(out, expected))]

    tensors = {"x": x, "weight": weight, "bias": bias}
    cotangent = random(sum(hp * wp for hp, wp in _GRIDS) // factor**2, width)
    yield from _contraction(op, plain, tensors, cotangent, packed)
    yield "gather", gather


def _norm_shuffle_case(random: Random, *, channels: int = 40) -> Iterator[Direction]:
    factor, eps = 4, 1e-5
    packed = PackedGrids.from_grids(_GRIDS, num_prefix_tokens=_PREFIX, device=random.device)
    tensors = {"x": random(packed.total_tokens, channels)}
    tensors |= {name: random(channels) for name in ("weight", "bias")}

    def plain(upcast: torch.dtype | None) -> Callable[..., Tensor]:
        def run(*values: Tensor) -> Tensor:
            x, weight, bias = (a.to(upcast or a.dtype) for a in values)
            normed = torch.nn.functional.layer_norm(x, (channels,), weight, bias, eps)
            return reference.pixel_shuffle(normed, packed, factor)

        return run

    def op(backend: str) -> Callable[..., Tensor]:
        return lambda x, weight, bias: layer_norm_pixel_shuffle(
            x, packed, factor, weight, bias, eps, backend=backend
        )

    cotangent = random(sum(hp * wp for hp, wp in _GRIDS) // factor**2, factor**2 * channels)
    yield from _contraction(op, plain, tensors, cotangent, packed)


def _attention_case(
    random: Random,
    *,
    lengths: Sequence[int] = _LENGTHS,
    head_dim: int = 64,
    rope: bool = False,
) -> Iterator[Direction]:
    packed = PackedGrids.from_lengths(lengths, device=random.device)
    shape = packed.total_tokens, 2, head_dim
    tensors = {name: random(*shape) for name in "qkv"}
    cotangent = random(*shape)
    positions = _positions(random, packed, head_dim) if rope else None

    def plain(upcast: torch.dtype | None) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if positions is not None:
                q, k = reference.rope_2d(q, k, *positions, upcast=upcast)
            return reference.varlen_attention(q, k, v, packed, upcast=upcast)[0]

        return run

    def op(backend: str) -> Callable[..., Tensor]:
        return lambda q, k, v: varlen_attention(q, k, v, packed, rope=positions, backend=backend)

    def isolation(backend: str) -> list[Measured]:
        """Other segments' contents must not change a segment by a single bit."""
        kept = max(range(len(lengths)), key=lengths.__getitem__)
        others = [a.clone() for a in tensors.values()]
        for a in others:
            for i, segment in enumerate(packed.split(a)):
                if i != kept:
                    segment.mul_(-3).add_(1)
        first, second = (
            packed.split(op(backend)(*qkv))[kept] for qkv in (tensors.values(), others)
        )
        return [Measured(f"segment {kept}", rules.equal(second, first))]

    terms = _cancelling_terms(tensors, cotangent, packed)
    yield from _contraction(op, plain, tensors, cotangent, packed, terms)
    yield "isolation", isolation


def _positions(random: Random, packed: PackedGrids, head_dim: int) -> tuple[Tensor, Tensor]:
    """Coordinates [T, 2], some at 0 as those of prefix tokens, and frequencies, in float32."""
    coords = torch.rand(packed.total_tokens, 2, generator=random.generator) * 2 - 1
    coords[::7] = 0
    inv_freq = 100.0 ** (-4 * torch.arange(head_dim // 4) / head_dim)
    return coords.to(random.device), inv_freq.to(random.device)


def _cancelling_terms(
    tensors: dict[str, Tensor], cotangent: Tensor, packed: PackedGrids
) -> dict[str, Tensor]:
    """Sizes of the terms of dq and dk in segments of one token, for the roundings allowed there.

    The softmax of a single score is 1 whatever the score, so both gradients are exactly zero. The
    eager backward happens to find 0; the flash backward, ``P (dO v - rowsum(dO O)) k``, finds the
    difference of two equal numbers that were rounded differently.
    """
    q, k, v, d = (a.double().norm(dim=-1) for a in (*tensors.values(), cotangent))  # [T, H]
    alone = torch.zeros(packed.total_tokens, dtype=torch.bool, device=q.device)
    for segment in packed.split(alone):
        segment.fill_(segment.shape[0] == 1)
    scale = cotangent.shape[-1] ** -0.5
    return {
        "d q": (scale * d * v * k).norm(dim=1) * alone,
        "d k": (scale * d * v * q).norm(dim=1) * alone,
    }


def _residual_case(random: Random) -> Iterator[Direction]:
    tokens, width = 130, 200
    tensors = {name: random(tokens, width) for name in ("x", "update")}
    tensors |= {name: random(width) for name in ("scale", "weight", "bias")}

    def plain(upcast: torch.dtype | None) -> Callable[..., Tensor]:
        return lambda *a: torch.cat(reference.residual_layer_norm(*a, upcast=upcast), dim=1)

    def op(backend: str) -> Callable[..., Tensor]:
        return lambda *a: torch.cat(residual_layer_norm(*a, backend=backend), dim=1)

    yield from _contraction(op, plain, tensors, random(tokens, 2 * width))


def _swiglu_case(random: Random, *, width: int = 1100) -> Iterator[Direction]:
    shape = 12, width
    tensors = {"gate": random(*shape, scale=3.0), "up": random(*shape)}

    def plain(upcast: torch.dtype | None) -> Callable[..., Tensor]:
        return lambda gate, up: reference.swiglu(gate, up, upcast=upcast)

    def op(backend: str) -> Callable[..., Tensor]:
        return lambda gate, up: swiglu(gate, up, backend=backend)

    yield from _contraction(op, plain, tensors, random(*shape))


def _patchify_case(random: Random, *, patch_size: int = 16) -> Iterator[Direction]:
    p = patch_size
    images = [
        torch.randint(256, (3, p * hp, p * wp), generator=random.generator, dtype=torch.uint8)
        for hp, wp in _ODD_GRIDS
    ]
    images = [image.to(random.device) for image in images]
    exact, single = (
        reference.normalize_patchify([a[None] for a in images], p, *IMAGENET, upcast=upcast)
        for upcast in (torch.float64, torch.float32)
    )
    baseline = single.to(random.dtype)

    def forward(backend: str) -> list[Measured]:
        rows, _ = normalize_patchify(images, p, *IMAGENET, dtype=random.dtype, backend=backend)
        found = rules.contraction(rows, exact, baseline)
        errors = (rules.relative_error(a, exact) for a in (rows, baseline))
        return [Measured("rows", found, *errors)]

    yield "forward", forward


def _encoder_case(random: Random) -> Iterator[Direction]:
    from ..encoder.vision_transformer import DINOv3Encoder

    encoder = _small_encoder(random)
    patches = random(sum(hp * wp for hp, wp in _ODD_GRIDS), 3 * encoder.patch_size**2)
    packed = PackedGrids.from_grids(_ODD_GRIDS, num_prefix_tokens=_PREFIX, device=random.device)
    parameters = {
        name: p for name, p in encoder.named_parameters() if name != "embeddings.mask_token"
    }
    wide = copy.deepcopy(encoder).double()

    def run(model: DINOv3Encoder, backend: str) -> Callable[..., Tensor]:
        def forward(patches: Tensor, *values: Tensor) -> Tensor:
            model.backend = backend
            weights = dict(zip(parameters, values, strict=True))
            return torch.func.functional_call(
                model, weights, (patches,), {"grids": packed}
            ).packed_last_hidden_state

        return forward

    def plain(upcast: torch.dtype | None) -> Callable[..., Tensor]:
        return run(wide if upcast else encoder, "eager")

    def op(backend: str) -> Callable[..., Tensor]:
        return run(encoder, backend)

    tensors = {"patches": patches} | {name: p.detach() for name, p in parameters.items()}
    cotangent = random(packed.total_tokens, encoder.config.hidden_size)
    yield from _contraction(op, plain, tensors, cotangent, packed)


def _small_encoder(random: Random) -> Any:
    from transformers import DINOv3ViTConfig

    from ..encoder.vision_transformer import DINOv3Encoder

    config = DINOv3ViTConfig(
        patch_size=4,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_register_tokens=_PREFIX - 1,
    )
    encoder = DINOv3Encoder(config).eval()
    encoder.to(device=random.device, dtype=random.dtype)
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(random(*p.shape, scale=1.0 if "token" in name else 0.1) + centre)
    return encoder


def _contraction(
    op: Callable[[str], Callable[..., Tensor]],
    plain: Callable[[torch.dtype | None], Callable[..., Tensor]],
    tensors: dict[str, Tensor],
    cotangent: Tensor,
    packed: PackedGrids | None = None,
    terms: dict[str, Tensor] | None = None,
) -> Iterator[Direction]:
    """Forward and backward of a function of `tensors` by the rule of contractions."""
    terms = terms or {}
    exact = _with_gradients(
        plain(torch.float64), {n: a.double() for n, a in tensors.items()}, cotangent.double()
    )
    baseline = _with_gradients(plain(None), tensors, cotangent)

    def measure(backend: str, results: dict[str, Tensor], names: Sequence[str]) -> list[Measured]:
        factor = rules.factor_of(backend, cotangent.dtype, cotangent.device)
        return [
            Measured(
                name,
                rules.contraction(
                    results[name],
                    exact[name],
                    baseline[name],
                    packed,
                    factor=factor,
                    terms=terms.get(name),
                ),
                rules.relative_error(results[name], exact[name]),
                rules.relative_error(baseline[name], exact[name]),
            )
            for name in names
        ]

    def forward(backend: str) -> list[Measured]:
        with torch.no_grad():
            return measure(backend, {"out": op(backend)(*tensors.values())}, ["out"])

    def backward(backend: str) -> list[Measured]:
        results = _with_gradients(op(backend), tensors, cotangent)
        return measure(backend, results, [f"d {name}" for name in tensors])

    yield "forward", forward
    yield "backward", backward


def _with_gradients(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], cotangent: Tensor
) -> dict[str, Tensor]:
    leaves = {name: a.detach().clone().requires_grad_() for name, a in tensors.items()}
    out = function(*leaves.values())
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent)
    named = {f"d {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"out": out.detach()} | named


_OF_OPS: dict[str, Callable[..., Iterator[Direction]]] = {
    "rope_2d": _rope_case,
    "pixel_shuffle_linear": _pixel_shuffle_case,
    "layer_norm_pixel_shuffle": _norm_shuffle_case,
    "varlen_attention": _attention_case,
    "residual_layer_norm": _residual_case,
    "swiglu": _swiglu_case,
    "normalize_patchify": _patchify_case,
}
CASES = {op: _OF_OPS[op] for op in OPS} | {"encoder": _encoder_case}
