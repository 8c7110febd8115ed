"""The Triton kernel of normalize_patchify and its launcher; see normalize_patchify.py.

A program has one channel of a few patches that are side by side: it reads pieces of p rows of the
image, and writes p*p numbers in a row for each patch. At p = 16, eight patches make rows of 128
bytes to read and 512 bytes to write in 16 bits: whole lines both ways.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bound import bound
from .launch import architecture, cdiv, device_guard, next_power_of_2, tile_choices
from .tilings import BlockConfig


@bound
@triton.jit(do_not_specialize=["hp", "wp"])
def normalize_patchify(
    image, out, hp, wp,
    scale_0, scale_1, scale_2, shift_0, shift_1, shift_2,
    stride_b, stride_c, stride_y, stride_x,
    P: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Pixel * scale + shift, for one channel of BN patches side by side."""
    pieces = tl.cdiv(wp, BN)
    i_c = tl.program_id(1).to(tl.int64)
    i_row = (tl.program_id(0) // pieces).to(tl.int64)  # of patches, over all images
    i_n = (tl.program_id(0) % pieces).to(tl.int64) * BN + tl.arange(0, BN)
    i_e = tl.arange(0, BE)
    y = (i_row % hp) * P + i_e // P  # [BE]
    x = (i_n * P)[:, None] + (i_e % P)[None, :]  # [BN, BE]
    mask = (i_n < wp)[:, None] & (i_e < P * P)[None, :]
    p_image = image + (i_row // hp) * stride_b + i_c * stride_c
    b_pixel = tl.load(p_image + (y * stride_y)[None, :] + x * stride_x, mask=mask, other=0)
    scale = tl.where(i_c == 0, scale_0, tl.where(i_c == 1, scale_1, scale_2))
    shift = tl.where(i_c == 0, shift_0, tl.where(i_c == 1, shift_1, shift_2))
    b_out = b_pixel.to(tl.float32) * scale + shift
    o_row = (i_row * wp + i_n) * (3 * P * P) + i_c * (P * P)
    tl.store(out + o_row[:, None] + i_e[None, :], b_out.to(out.dtype.element_ty), mask=mask)


_INTERPRETER = BlockConfig(2048, 1)


def select_config(arch: str, dtype: torch.dtype) -> BlockConfig:
    """Block size for a chip and the dtype of the result."""
    if arch == "interpreter":
        return _INTERPRETER
    return tile_choices("PATCHIFY", arch, dtype.itemsize)[0]


def forward(
    image: Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float], out: Tensor
) -> None:
    """Write the rows of the images ``[B, 3, H, W]`` into the contiguous `out`."""
    batch, channels, height, width = image.shape
    hp, wp = height // patch_size, width // patch_size
    elements = next_power_of_2(patch_size**2)
    config = select_config(architecture(image.device), out.dtype)
    patches = max(1, config.elements // elements)
    scales = [1 / (255 * s) for s in std]
    shifts = [-m / s for m, s in zip(mean, std, strict=True)]
    with device_guard(image):
        normalize_patchify[(batch * hp * cdiv(wp, patches), channels)](
            image, out, hp, wp, *scales, *shifts, *image.stride(),
            P=patch_size, BN=patches, BE=elements, num_warps=config.num_warps,
        )  # fmt: skip
