"""Every op forward and backward on small shapes, for compute-sanitizer: ``make sanitize``.

Out-of-bounds accesses and races are the sanitizer's to find; the numbers are checked elsewhere.
"""

import sys
from itertools import product

import torch

from hrvlm_kernels import (
    PackedGrids,
    layer_norm_pixel_shuffle,
    normalize_patchify,
    pixel_shuffle_linear,
    residual_layer_norm,
    rope_2d,
    rope_2d_,
    swiglu,
    varlen_attention,
)
from tests.kernels.attention_cases import kernel_results, make_case

LENGTHS = (1, 65, 0, 129, 257)
GRIDS = [(4, 8), (12, 4)]


def attention(device, dtype):
    """Every route: two head sizes of a tile, RoPE, short images, shared heads."""
    for head_dim, rope in product((64, 80, 128), (False, True)):
        options = {"head_dim": head_dim, "dtype": dtype, "rope": rope, "device": device}
        kernel_results(make_case(LENGTHS, heads=2, kv_heads=1, **options))
    # Not aligned to 16 bytes, which descriptors can't load.
    case = make_case((130,), head_dim=64, dtype=dtype, device=device)
    room = torch.zeros(case.k.numel() + 1, dtype=dtype, device=device)
    k = room[1:].view(case.k.shape).copy_(case.k)
    varlen_attention(case.q, k, case.v, case.packed, backend="triton")


def rope(device, dtype):
    packed = PackedGrids.from_grids(GRIDS, num_prefix_tokens=5, device=device)
    qkv = torch.randn(packed.total_tokens, 3, 3, 64, device=device).to(dtype)
    positions = packed.coords, torch.rand(16, device=device)
    leaf = qkv.clone().requires_grad_()
    outs = rope_2d(leaf[:, 0], leaf[:, 1], *positions, backend="triton")
    torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])
    rope_2d_(qkv[:, 0], qkv[:, 1], *positions, backend="triton")


def pixel_shuffle(device, dtype):
    """A projection whose sum is cut into parts, one that is not, and the norm before it."""
    packed = PackedGrids.from_grids(GRIDS, num_prefix_tokens=5, device=device)
    for channels, features in ((48, 70), (16, 1)):
        x = torch.randn(packed.total_tokens, channels, device=device).to(dtype).requires_grad_()
        weight = torch.randn(features, 16 * channels, device=device).to(dtype).requires_grad_()
        bias = torch.zeros(features, device=device, dtype=dtype, requires_grad=True)
        out = pixel_shuffle_linear(x, packed, 4, weight, bias, backend="triton")
        out.backward(torch.randn_like(out))
        norm = torch.ones(channels, device=device, dtype=dtype, requires_grad=True)
        out = layer_norm_pixel_shuffle(x, packed, 4, norm, None, 1e-5, backend="triton")
        out.backward(torch.randn_like(out))


def elementwise(device, dtype):
    """Widths that fill no block, rows that fill no program, patches that are no power of two."""
    for tokens, width in ((3, 1030), (1, 5)):
        x, update = torch.randn(2, tokens, width, device=device).to(dtype).unbind()
        leaves = x.clone().requires_grad_(), update.clone().requires_grad_()
        out = swiglu(*leaves, backend="triton")
        out.backward(torch.randn_like(out))
        channels = torch.ones(width, device=device, dtype=dtype, requires_grad=True)
        outs = residual_layer_norm(*leaves, channels, channels, backend="triton")
        torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])
    for patch_size in (14, 16):
        image = torch.zeros(3, 2 * patch_size, 9 * patch_size, dtype=torch.uint8, device=device)
        numbers = (0.5,) * 3, (0.5,) * 3
        normalize_patchify([image], patch_size, *numbers, dtype=dtype, backend="triton")


OPS = (attention, rope, pixel_shuffle, elementwise)


def main() -> int:
    """Run everything on the GPU."""
    if not torch.cuda.is_available():
        print("sanitize: there is no GPU", file=sys.stderr)
        return 2
    for op, dtype in product(OPS, (torch.bfloat16, torch.float32)):
        op("cuda", dtype)
        torch.cuda.synchronize()
        print(f"{op.__name__} {dtype}: done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
