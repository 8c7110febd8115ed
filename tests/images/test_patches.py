import pytest
import torch

from hrvlm import pack_images, patchify, unpatchify


def test_patch_rows_by_explicit_loops_and_as_a_convolution_reads_them(rng):
    image, p = torch.randn(2, 3, 6, 9, generator=rng), 3
    patches = patchify(image, p)
    assert patches.shape == (2, 6, 27)
    for b in range(2):
        for i in range(2):
            for j in range(3):
                cut = image[b, :, i * p : (i + 1) * p, j * p : (j + 1) * p]
                assert torch.equal(patches[b, i * 3 + j], cut.flatten())
    weight = torch.randn(5, 3, p, p, generator=rng)
    conv = torch.nn.functional.conv2d(image, weight, stride=p).flatten(2).mT
    torch.testing.assert_close(patches @ weight.flatten(1).T, conv)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_unpatchify_restores_the_image(lead, rng):
    image = torch.randn(*lead, 3, 8, 12, generator=rng)
    assert torch.equal(unpatchify(patchify(image, 4), (2, 3), 4), image)


def test_pack_images_names_the_bad_one():
    good = torch.zeros(3, 32, 16)
    patches, grids = pack_images([good, torch.zeros(3, 16, 48)], 16)
    assert patches.shape == (5, 768) and grids == [(2, 1), (1, 3)]
    with pytest.raises(ValueError, match=r"image 1: 30x16 pixels .* patch size 16"):
        pack_images([good, torch.zeros(3, 30, 16)], 16)
    with pytest.raises(ValueError, match=r"image 1: expected \[3, H, W\]"):
        pack_images([good, torch.zeros(32, 16)], 16)
    with pytest.raises(ValueError, match="empty"):
        pack_images([], 16)
    with pytest.raises(ValueError, match=r"6 rows .* 2x2 grid"):
        unpatchify(torch.zeros(6, 27), (2, 2), 3)
