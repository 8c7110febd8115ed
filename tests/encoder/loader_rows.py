"""What the workers of a DataLoader make; it imports little, for those that are spawned."""

import torch

from hrvlm_kernels import PackedGrids

SIZES = [(16 * h, 16 * w) for h in range(1, 5) for w in range(1, 5)]


def images_of(seed):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *SIZES[(seed + 5 * k) % len(SIZES)], generator=rng) for k in range(3)]


class Layouts(torch.utils.data.Dataset):
    """Images with the layouts that they would be packed in, made in a worker."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        images = images_of(index)
        grids = [(image.shape[1] // 16, image.shape[2] // 16) for image in images]
        return images, PackedGrids.from_grids(grids, num_prefix_tokens=5)


def as_they_are(batch):
    return batch[0]
