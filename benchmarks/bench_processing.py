"""From image files to packed patches on the CPU: ours, transformers and torchvision.

    python -m pytest benchmarks/bench_processing.py

Decode, resize, normalise, patchify, with the threads that torch takes. The files are JPEG (quality
90) and PNG, made in memory from smooth random fields and noise; sizes are the first sixteen of the
mixed draw, enlarged one and a half times, so that all are resized down to at most 1024 px.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import processing_peers as peers
from benchmarks.case import OURS, Case, Prepared, Rival, Run, Settings
from benchmarks.mixed_sizes import MIXED_SIZES
from hrvlm.images.geometry import token_grid

SUITE, DEVICE, BUDGET_S = "processing", "cpu", 10

# Bicubic on floats and on bytes, and two JPEG decoders, differ by a few steps of 255.
TOLERANCE = 0.05
COUNT, ENLARGED = 16, 1.5
FORMATS = {"JPEG": {"format": "JPEG", "quality": 90}, "PNG": {"format": "PNG"}}


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

        def rival(process: peers.Process) -> Run:
            return lambda: [process()]

        return Prepared(
            [
                Rival(OURS, lambda: rival(peers.hrvlm_pil(files, limit)), role="ours"),
                Rival(
                    "hrvlm, torchvision backend",
                    lambda: rival(peers.hrvlm_torchvision(files, limit)),
                ),
                Rival(
                    "transformers, torchvision",
                    lambda: rival(peers.transformers_torchvision(files, sizes)),
                ),
                Rival("transformers, PIL", lambda: rival(peers.transformers_pil(files, sizes))),
                Rival("torchvision alone", lambda: rival(peers.torchvision_alone(files, sizes))),
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
