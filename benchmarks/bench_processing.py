"""From image files to packed patches on the CPU: ours, transformers and torchvision.

    python -m pytest benchmarks/bench_processing.py

Decode, resize, normalise, patchify, with the threads that torch takes. The files are JPEG (quality
90) and PNG, made in memory from smooth random fields and noise; sizes are the first sixteen of the
mixed draw, enlarged one and a half times, so that all are resized down to at most 1024 px.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.case import MIXED_SIZES, OURS, PATCH_SIZE, Case, Prepared, Rival, Run, Settings
from hrvlm.images.geometry import token_grid
from hrvlm.images.patches import patchify
from hrvlm.images.processor import IMAGENET

SUITE, DEVICE, BUDGET_S = "processing", "cpu", 40

# Bicubic on floats and on bytes, and two JPEG decoders, differ by a few steps of 255.
TOLERANCE = 0.05
COUNT, ENLARGED = 16, 1.5
FORMATS = {"JPEG": {"format": "JPEG", "quality": 90}, "PNG": {"format": "PNG"}}

# All resize bicubically to the same sizes; transformers' and torchvision's pixels differ from ours
# by the rounding between their steps.
Sizes = Sequence[tuple[int, int]]  # height, width
Process = Callable[[], Tensor]


def hrvlm_process(files: Sequence[bytes], max_img_size: int, *, exact: bool) -> Process:
    """Ours, the default or by Pillow alone."""
    from hrvlm.images.transformers_processor import VLMImageProcessor

    processor = VLMImageProcessor(max_img_size=max_img_size, allow_upscale=False, exact=exact)
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


def cases(settings: Settings) -> Iterator[Case]:
    """One for each file format."""
    count, limit = (3, 128) if settings.small else (COUNT, 1024)
    shrink = 0.125 if settings.small else ENLARGED
    stored = [(max(64, int(h * shrink)), max(64, int(w * shrink))) for h, w in MIXED_SIZES[:count]]
    for name, options in FORMATS.items():
        yield Case(
            name=name,
            group="decode, resize, normalise, patchify",
            op="",
            parameters={
                "images": name,
                "count": count,
                "stored_pixels": sum(h * w for h, w in stored),
                "max_img_size": limit,
            },
            prepare=_preparer(stored, limit, options),
            dtype=torch.float32,
            tolerance=TOLERANCE,
        )


def _preparer(
    stored: list[tuple[int, int]], limit: int, options: dict[str, object]
) -> Callable[[], Prepared]:
    def prepare() -> Prepared:
        files = [encode(h, w, i, options) for i, (h, w) in enumerate(stored)]
        geometries = [token_grid(h, w, max_img_size=limit, allow_upscale=False) for h, w in stored]
        sizes = [(g.height, g.width) for g in geometries]

        def rival(process: Process) -> Run:
            return lambda: [process()]

        return Prepared(
            [
                Rival(OURS, lambda: rival(hrvlm_process(files, limit, exact=False)), role="ours"),
                Rival("hrvlm, exact", lambda: rival(hrvlm_process(files, limit, exact=True))),
                Rival(
                    "transformers, torchvision",
                    lambda: rival(transformers_torchvision(files, sizes)),
                ),
                Rival("transformers, PIL", lambda: rival(transformers_pil(files, sizes))),
                Rival("torchvision alone", lambda: rival(torchvision_alone(files, sizes))),
            ]
        )

    return prepare


def encode(height: int, width: int, seed: int, options: dict[str, object]) -> bytes:
    """A file with an image of smooth colours and some noise."""
    generator = torch.Generator().manual_seed(seed)
    field = torch.rand(1, 3, max(2, height // 48), max(2, width // 48), generator=generator)
    smooth = F.interpolate(field, (height, width), mode="bicubic", align_corners=False)[0]
    noise = torch.randn(3, height, width, generator=generator) * 0.02
    pixels = ((smooth + noise).clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous()
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, **options)
    return buffer.getvalue()


def bench_processing(run_case, case):
    run_case(case)
