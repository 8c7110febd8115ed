"""Every op gives an image the same bits alone, packed and in any order, forward and backward.

Tile sizes, the order of sums and which kernel runs depend on an image's own length, and an image's
rows meet no others'. (Weights' gradients are sums over all images, and are not asked for.)
"""

import pytest
import torch

from hrvlm_kernels import (
    PackedGrids,
    layer_norm_pixel_shuffle,
    pixel_shuffle_linear,
    residual_layer_norm,
    rope_2d,
    swiglu,
    varlen_attention,
)
from hrvlm_kernels.ops.linear_gelu import linear_gelu
from hrvlm_kernels.ops.linear_rope_2d import linear_rope_2d
from hrvlm_kernels.ops.linear_swiglu import linear_swiglu
from tests.kernels.test_rope_2d import frequencies

PREFIX, WIDTH, HEADS, FACTOR = 3, 32, 1, 2
GRIDS = [(2, 2), (4, 10), (16, 16)]  # the last has more than the 256 tokens of a short image
PACK = (1, 2, 0, 1)


def _heads(x):
    return x.unflatten(1, (HEADS, -1))


def _attention(rope):
    def run(weights, packed, q, k, v):
        with_rope = (packed.coords, frequencies(WIDTH // HEADS)) if rope else None
        q, k, v = map(_heads, (q, k, v))
        return varlen_attention(q, k, v, packed, rope=with_rope, backend="triton")

    return 3, run


def _rotated(weights, packed, q, k):
    q, k = rope_2d(
        _heads(q), _heads(k), packed.coords, frequencies(WIDTH // HEADS), backend="triton"
    )
    return torch.cat((q, k), 1)


def _normed(weights, packed, x, update):
    out, normed = residual_layer_norm(x, update, *weights[:3], backend="triton")
    return torch.cat((out, normed), 1)


def _shuffled_norm(weights, packed, x):
    return layer_norm_pixel_shuffle(x, packed, FACTOR, *weights[1:3], backend="triton")


def _shuffled(weights, packed, x):
    return pixel_shuffle_linear(x, packed, FACTOR, weights[3], backend="triton")


# By op: how many tensors [T, WIDTH] it takes, and its call.
OPS = {
    "varlen_attention": _attention(False),
    "varlen_attention with RoPE": _attention(True),
    "rope_2d": (2, _rotated),
    "residual_layer_norm": (2, _normed),
    "swiglu": (2, lambda weights, packed, gate, up: swiglu(gate, up, backend="triton")),
    "layer_norm_pixel_shuffle": (1, _shuffled_norm),
    "pixel_shuffle_linear": (1, _shuffled),
}


def check_same_bits(op: str, dtype: torch.dtype, packs=(PACK,)) -> None:
    """An image's outputs and gradients in `packs` are those that it has alone, bit for bit."""
    count, run = OPS[op]
    rng = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=rng).to(dtype)

    weights = [draw(WIDTH), draw(WIDTH), draw(WIDTH), draw(72, FACTOR**2 * WIDTH)]
    inputs = [[draw(PREFIX + h * w, WIDTH) for _ in range(count)] for h, w in GRIDS]
    cotangents = {}

    def outcome(images):
        packed = PackedGrids.from_grids([GRIDS[i] for i in images], num_prefix_tokens=PREFIX)
        leaves = [torch.cat([inputs[i][n] for i in images]).requires_grad_() for n in range(count)]
        out = run(weights, packed, *leaves)
        shuffled = out.shape[0] != packed.total_tokens
        sizes = [h * w for h, w in packed.token_grids(FACTOR)] if shuffled else packed.lengths
        for i, rows in zip(images, out.split(sizes), strict=True):
            if i not in cotangents:
                cotangents[i] = draw(*rows.shape)
        grads = torch.autograd.grad(out, leaves, torch.cat([cotangents[i] for i in images]))
        return [
            [rows, *of_inputs]
            for rows, *of_inputs in zip(
                out.detach().split(sizes), *(g.split(packed.lengths) for g in grads), strict=True
            )
        ]

    alone = [outcome([i])[0] for i in range(len(GRIDS))]
    for images in packs:
        for i, found in zip(images, outcome(images), strict=True):
            for got, expected in zip(found, alone[i], strict=True):
                assert torch.equal(got, expected), f"{op}: image {i} of the pack {images}"


@pytest.mark.parametrize("op", [op for op in OPS if op != "varlen_attention"])
def test_an_image_has_the_same_bits_alone_packed_and_in_any_order(op):
    check_same_bits(op, torch.float16)


def _product_rotated(weights, packed, x):
    rope = packed.coords, frequencies(WIDTH // HEADS)
    return linear_rope_2d(x, weights[0][: 3 * WIDTH], None, rope, backend="triton")


# Products with an epilogue, which have no gradient.
PRODUCTS = {
    "linear_gelu": lambda weights, packed, x: linear_gelu(x, *weights[:1], backend="triton"),
    "linear_swiglu": lambda weights, packed, x: linear_swiglu(x, *weights, backend="triton"),
    "linear_rope_2d": _product_rotated,
}


@pytest.mark.parametrize("op", PRODUCTS)
def test_a_product_gives_an_image_the_same_bits_in_any_pack_and_again(op):
    """Also in a pack of more tokens than a tile has rows."""
    rng = torch.Generator().manual_seed(4)
    weights = [torch.randn(200, WIDTH, generator=rng).half() for _ in range(2)]
    images = [torch.randn(PREFIX + h * w, WIDTH, generator=rng).half() for h, w in GRIDS]

    def outcome(chosen):
        packed = PackedGrids.from_grids([GRIDS[i] for i in chosen], num_prefix_tokens=PREFIX)
        out = PRODUCTS[op](weights, packed, torch.cat([images[i] for i in chosen]))
        return packed.split(out)

    alone = [outcome([i])[0] for i in range(len(GRIDS))]
    for pack in (PACK, PACK):
        for i, got in zip(pack, outcome(pack), strict=True):
            assert torch.equal(got, alone[i]), f"{op}: image {i} of the pack {pack}"


def test_attention_without_rope_in_float32():
    check_same_bits("varlen_attention", torch.float32)
