"""What an op says to a layout that is none, and to what is no tensor."""

import numpy as np
import pytest
import torch

from hrvlm_kernels import (
    PackedGrids,
    layer_norm_pixel_shuffle,
    pixel_shuffle_linear,
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
    with pytest.raises(TypeError, match="weight: expected a tensor, got NoneType"):
        pixel_shuffle_linear(X, PACKED, 2, None)
    with pytest.raises(TypeError, match="norm_weight: expected a tensor, got NoneType"):
        layer_norm_pixel_shuffle(X, PACKED, 2, None, None)
