"""High-resolution vision encoders, and the vision-language model around them.

    from hrvlm import DINOv3Encoder

Names are imported when first used, so that importing the package stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .acceleration import accelerate, restore
    from .checkpoints import convert, load_checkpoint, load_into
    from .encoder_output import EncoderOutput, PackedEncoderOutput
    from .geometry import Geometry, TileGeometry, tile_grid, token_grid
    from .image_intake import ImageError, load_image
    from .image_processing import (
        IMAGENET_MEAN,
        IMAGENET_STD,
        ImageProcessor,
        get_image_processor,
        normalization_for,
    )
    from .image_processing_vlm import VLMImageProcessor, VLMImageProcessorPil
    from .patches import pack_images, patchify, unpatchify
    from .vision_transformer import DINOv3Encoder

_HOME = {
    "tile_grid": "geometry",
    "TileGeometry": "geometry",
    "ImageProcessor": "image_processing",
    "ImageError": "image_intake",
    "IMAGENET_STD": "image_processing",
    "IMAGENET_MEAN": "image_processing",
    "DINOv3Encoder": "vision_transformer",
    "EncoderOutput": "encoder_output",
    "Geometry": "geometry",
    "PackedEncoderOutput": "encoder_output",
    "VLMImageProcessor": "image_processing_vlm",
    "VLMImageProcessorPil": "image_processing_vlm",
    "accelerate": "acceleration",
    "convert": "checkpoints",
    "get_image_processor": "image_processing",
    "load_checkpoint": "checkpoints",
    "load_image": "image_intake",
    "load_into": "checkpoints",
    "normalization_for": "image_processing",
    "pack_images": "patches",
    "patchify": "patches",
    "restore": "acceleration",
    "token_grid": "geometry",
    "unpatchify": "patches",
}

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "DINOv3Encoder",
    "EncoderOutput",
    "Geometry",
    "ImageError",
    "ImageProcessor",
    "PackedEncoderOutput",
    "TileGeometry",
    "VLMImageProcessor",
    "VLMImageProcessorPil",
    "accelerate",
    "convert",
    "get_image_processor",
    "load_checkpoint",
    "load_image",
    "load_into",
    "normalization_for",
    "pack_images",
    "patchify",
    "restore",
    "tile_grid",
    "token_grid",
    "unpatchify",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hrvlm' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
