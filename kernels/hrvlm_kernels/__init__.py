"""Triton kernels for packed, variable-resolution vision transformers, as torch ops.

    from hrvlm_kernels import PackedGrids, rope_2d, pixel_shuffle_linear, varlen_attention

Importing this package needs torch alone: Triton and flash-attn are imported when an op first uses
them.
"""

from .backends import explain_backend
from .flash_attn_interface import flash_attn_varlen_func
from .ops.layer_norm_pixel_shuffle import layer_norm_pixel_shuffle, layer_norm_pixel_shuffle_linear
from .ops.normalize_patchify import normalize_patchify
from .ops.pixel_shuffle_linear import pixel_shuffle_linear
from .ops.residual_layer_norm import residual_layer_norm
from .ops.rope_2d import rope_2d, rope_2d_
from .ops.swiglu import swiglu
from .ops.varlen_attention import varlen_attention
from .packed_grids import PackedGrids

__all__ = [
    "PackedGrids",
    "explain_backend",
    "flash_attn_varlen_func",
    "layer_norm_pixel_shuffle",
    "layer_norm_pixel_shuffle_linear",
    "normalize_patchify",
    "pixel_shuffle_linear",
    "residual_layer_norm",
    "rope_2d",
    "rope_2d_",
    "swiglu",
    "varlen_attention",
]
