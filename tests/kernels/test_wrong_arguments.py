"""What an op says to a layout that is none, to what is no tensor, and to other numbers."""

import numpy as np
import pytest
import torch

from hrvlm_kernels import (
    PackedGrids,
    flash_attn_varlen_func,
    layer_norm_pixel_shuffle,
    layer_norm_pixel_shuffle_linear,
    normalize_patchify,
    pixel_shuffle_linear,
    residual_layer_norm,
    rope_2d,
    rope_2d_,
    swiglu,
    varlen_attention,
)

PACKED = PackedGrids.from_grids([(2, 2)])
Q, X, WEIGHT, NORM = torch.zeros(4, 1, 32), torch.zeros(4, 8), torch.zeros(3, 32), torch.ones(8)


@pytest.mark.parametrize("packed", [None, [(2, 2)], "2x2"])
def test_a_layout_is_a_packed_grids(packed):
    for op, arguments in (
        (varlen_attention, (Q, Q, Q, packed)),
        (pixel_shuffle_linear, (X, packed, 2, WEIGHT)),
        (layer_norm_pixel_shuffle, (X, packed, 2, NORM, NORM)),
    ):
        with pytest.raises(TypeError, match=r"packed: expected a PackedGrids, .*from_grids"):
            op(*arguments)


def test_tensors_are_named():
    with pytest.raises(TypeError, match="k: expected a tensor, got ndarray"):
        varlen_attention(Q, np.zeros((4, 1, 32)), Q, PACKED)
    with pytest.raises(TypeError, match="q: expected a tensor, got ndarray"):
        varlen_attention(np.zeros((4, 1, 32)), Q, Q, PACKED)
    with pytest.raises(TypeError, match="k: expected a tensor, got list"):
        rope_2d(Q, [1], PACKED.coords, torch.ones(8))
    with pytest.raises(TypeError, match="gate: expected a tensor, got NoneType"):
        swiglu(None, X)
    with pytest.raises(TypeError, match="weight: expected a tensor, got NoneType"):
        pixel_shuffle_linear(X, PACKED, 2, None)
    with pytest.raises(TypeError, match="norm_weight: expected a tensor, got NoneType"):
        layer_norm_pixel_shuffle(X, PACKED, 2, None, None)


OTHERS = [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
CU = torch.tensor([0, 4], dtype=torch.int32)
POSITIONS = (PACKED.coords, torch.ones(8))
# Name of an argument, and a call with it in a dtype.
CALLS = {
    "rope_2d q": lambda d: rope_2d(Q.to(d), Q.to(d), *POSITIONS),
    "rope_2d k": lambda d: rope_2d(Q, Q.to(d), *POSITIONS),
    "rope_2d_ q": lambda d: rope_2d_(Q.to(d), Q.to(d), *POSITIONS),
    "varlen_attention q": lambda d: varlen_attention(Q.to(d), Q.to(d), Q.to(d), PACKED),
    "varlen_attention v": lambda d: varlen_attention(Q, Q, Q.to(d), PACKED),
    "flash_attn q": lambda d: flash_attn_varlen_func(*[Q.to(d)] * 3, CU, CU, 4, 4),
    "residual_layer_norm x": lambda d: residual_layer_norm(X.to(d), X.to(d), NORM, NORM),
    "residual_layer_norm update": lambda d: residual_layer_norm(X, X.to(d), NORM, NORM),
    "swiglu gate": lambda d: swiglu(X.to(d), X.to(d)),
    "swiglu up": lambda d: swiglu(X, X.to(d)),
    "pixel_shuffle_linear x": lambda d: pixel_shuffle_linear(X.to(d), PACKED, 2, WEIGHT),
    "layer_norm_pixel_shuffle x": lambda d: layer_norm_pixel_shuffle(X.to(d), PACKED, 2, NORM),
    "layer_norm_pixel_shuffle dtype": lambda d: layer_norm_pixel_shuffle(
        X, PACKED, 2, NORM, dtype=d
    ),
    "layer_norm_pixel_shuffle_linear x": lambda d: layer_norm_pixel_shuffle_linear(
        X.to(d), PACKED, 2, NORM, None, 1e-5, WEIGHT
    ),
    "normalize_patchify dtype": lambda d: normalize_patchify(
        torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 2, [0.5] * 3, [0.5] * 3, dtype=d
    ),
}


@pytest.mark.parametrize("call", [name for name in CALLS if name.endswith(" dtype")])
def test_a_name_is_no_dtype(call):
    with pytest.raises(TypeError, match=r"^dtype: expected a torch.dtype, got 'bfloat16'"):
        CALLS[call]("bfloat16")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", OTHERS)
@pytest.mark.parametrize("call", CALLS)
def test_other_numbers_are_named(call, dtype, autocast):
    name = call.split()[1]
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(ValueError, match=f"^{name} must be .*float64, got {dtype}"),
    ):
        CALLS[call](dtype)
