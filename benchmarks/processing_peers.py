"""Other ways from the bytes of image files to packed, normalised patches: a function per peer.

Each takes the files and the size that each image gets, and returns a function that gives
``[N, 3*p*p]`` float32. All resize bicubically to the same sizes; transformers' and torchvision's
pixels differ from ours by the rounding between their steps.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hrvlm.images.patches import patchify
from hrvlm.images.processor import IMAGENET

PATCH_SIZE = 16
Sizes = Sequence[tuple[int, int]]  # height, width
Process = Callable[[], Tensor]


def hrvlm_pil(files: Sequence[bytes], max_img_size: int) -> Process:
    """Ours with Pillow's resizing."""
    from hrvlm.images.transformers_processor import VLMImageProcessorPil

    return _ours(VLMImageProcessorPil, files, max_img_size)


def hrvlm_torchvision(files: Sequence[bytes], max_img_size: int) -> Process:
    """Ours with torchvision's resizing."""
    from hrvlm.images.transformers_processor import VLMImageProcessor

    return _ours(VLMImageProcessor, files, max_img_size)


def _ours(cls: Any, files: Sequence[bytes], max_img_size: int) -> Process:
    processor = cls(max_img_size=max_img_size, allow_upscale=False)
    return lambda: processor(list(files), return_tensors="pt")["pixel_values"]


def transformers_torchvision(files: Sequence[bytes], sizes: Sizes) -> Process:
    """The DINOv3 processor of transformers, an image at a time: each has its own size."""
    from transformers.models.dinov3_vit.image_processing_dinov3_vit import DINOv3ViTImageProcessor

    return _theirs(DINOv3ViTImageProcessor(resample=Image.Resampling.BICUBIC), files, sizes)


def transformers_pil(files: Sequence[bytes], sizes: Sizes) -> Process:
    """The same steps with Pillow; DINOv3 has no such processor, ViT's is set up like it."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    processor = ViTImageProcessorPil(
        resample=Image.Resampling.BICUBIC,
        image_mean=list(IMAGENET.mean),
        image_std=list(IMAGENET.std),
    )
    return _theirs(processor, files, sizes)


def _theirs(processor: Any, files: Sequence[bytes], sizes: Sizes) -> Process:
    def process() -> Tensor:
        rows = []
        for file, (height, width) in zip(files, sizes, strict=True):
            image = Image.open(io.BytesIO(file)).convert("RGB")
            size = {"height": height, "width": width}
            pixels = processor(image, size=size, return_tensors="pt")["pixel_values"][0]
            rows.append(patchify(pixels, PATCH_SIZE))
        return torch.cat(rows)

    return process


def torchvision_alone(files: Sequence[bytes], sizes: Sizes) -> Process:
    """Decoder, resize on bytes, and normalisation of torchvision."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2 import functional as tv

    encoded = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]

    def process() -> Tensor:
        rows = []
        for file, size in zip(encoded, sizes, strict=True):
            pixels = decode_image(file, mode=ImageReadMode.RGB)
            pixels = tv.resize(pixels, list(size), tv.InterpolationMode.BICUBIC, antialias=True)
            pixels = tv.to_dtype(pixels, torch.float32, scale=True)
            pixels = tv.normalize(pixels, list(IMAGENET.mean), list(IMAGENET.std))
            rows.append(patchify(pixels, PATCH_SIZE))
        return torch.cat(rows)

    return process
