"""What an encoder says to arguments of the wrong kind: which one it is, and what was expected."""

import numpy as np
import pytest
import torch

from hrvlm import DINOv3Encoder
from hrvlm_kernels import PackedGrids
from tests.tiny import picture, vision_config_of


@pytest.fixture(scope="module")
def encoder():
    return DINOv3Encoder(vision_config_of()).eval()


X = torch.zeros(1, 3, 16, 16)
PATCHES = torch.zeros(4, 3 * 8 * 8)


@pytest.mark.parametrize("n", ["x", 1.5, True, None, [1.0], ["a"], [None]])
def test_blocks_are_ints(encoder, n):
    with pytest.raises(TypeError, match=r"^n=.*: expected an int or a list of ints$"):
        encoder.get_intermediate_layers(X, n)


@pytest.mark.parametrize("indices", ["x", 3, [1.5], True])
def test_layers_are_a_list_of_ints(encoder, indices):
    with pytest.raises(TypeError, match=r"^out_indices=.*: expected a list of ints$"):
        encoder(X, out_indices=indices)


@pytest.mark.parametrize(
    ("images", "grids", "message"),
    [
        (X.byte(), None, r"pixel_values: torch.uint8, expected normalised .* get_image_processor"),
        ([X[0], X[0].byte()], None, r"image 1: torch.uint8, expected normalised"),
        (PATCHES.long(), [(2, 2)], r"pixel_values: torch.int64, expected normalised"),
        (X[:, :1], None, r"pixel_values: expected \[B, 3, H, W\], got \(1, 1, 16, 16\)"),
        ([X[0], X[0].permute(1, 2, 0)], None, r"image 1: expected \[3, H, W\], got \(16, 16, 3\)"),
        (None, None, r"pixel_values: expected a list of tensors \[3, H, W\], got NoneType"),
        (picture(16, 16), None, r"pixel_values: expected a list of tensors \[3, H, W\], got Image"),
        ([], None, r"pixel_values: the list is empty"),
        ([picture(16, 16)], None, r"image 0: expected a tensor, got Image"),
        (np.zeros((1, 3, 16, 16)), None, "expected a tensor, got ndarray"),
        (X, [(2, 2)], r"grids goes with packed patches .* only, got .*\[1, 3, 16, 16\]"),
        (None, [(2, 2)], r"grids goes with packed patches .* only, got NoneType"),
        (PATCHES, [None], r"image 0: a patch grid is two positive ints \(hp, wp\), got \(None,\)"),
        (PATCHES, torch.tensor([2, 2]), r"image 0: a patch grid is two .*, got \(2,\)"),
        ([X[0], X[0].to_sparse()], None, r"image 1: a torch.sparse_coo tensor, expected a dense"),
    ],
)
def test_images_are_named(encoder, images, grids, message):
    with pytest.raises((TypeError, ValueError), match=message):
        encoder(images, grids=grids)


def test_numbers_of_numpy_are_numbers(encoder):
    whole = encoder(PATCHES, grids=np.array([[2, 2]]))
    assert torch.equal(whole.cls, encoder(PATCHES, grids=[(2, 2)]).cls)
    assert len(encoder.get_intermediate_layers(X, np.int64(2))) == 2


def test_a_batch_may_be_empty(encoder):
    assert encoder(X[:0]).last_hidden_state.shape == (0, encoder.num_prefix_tokens + 4, 32)
    (patches, cls), *_ = encoder.get_intermediate_layers(X[:0], 2, return_class_token=True)
    assert patches.shape == (0, 4, 32) and cls.shape == (0, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 0}, "config.patch_size=0: expected a whole number of at least 1"),
        ({"num_channels": 0}, "config.num_channels=0: expected"),
        ({"intermediate_size": -1}, "config.intermediate_size=-1: expected"),
        ({"hidden_act": "x"}, "config.hidden_act='x': expected one of .*gelu"),
        ({"use_rope": "x"}, "config.use_rope='x': expected True or False"),
    ],
)
def test_a_size_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        DINOv3Encoder(vision_config_of(**fields))


def test_options_are_named(encoder):
    with pytest.raises(ValueError, match="allow_fp16='x': expected True or False"):
        DINOv3Encoder(vision_config_of(), allow_fp16="x")
    for name in ("sizes", "capacities"):
        with pytest.raises(ValueError, match=f"{name}=3: expected "):
            encoder.graphed(**{name: 3})


def test_a_grid_is_a_pair():
    with pytest.raises(ValueError, match=r"image 1: a patch grid is two .*, got \(3,\)"):
        PackedGrids.from_grids([(2, 2), 3])


@pytest.mark.parametrize("mask", ["x", np.zeros((1, 4), bool), [[True] * 4]])
def test_a_mask_is_a_tensor(encoder, mask):
    with pytest.raises(TypeError, match="bool_masked_pos: expected a tensor, or one for each"):
        encoder(X, bool_masked_pos=mask)


@pytest.mark.parametrize("source", [3, b"x", ["a"]])
def test_a_checkpoint_has_a_name(source):
    with pytest.raises(TypeError, match=r"DINOv3Encoder.from_pretrained: expected a hub id or a"):
        DINOv3Encoder.from_pretrained(source)


def test_nothing_is_loaded_from_none():
    with pytest.raises(ValueError, match=r"from_pretrained\(None\): expected a hub id or a dir"):
        DINOv3Encoder.from_pretrained(None)
