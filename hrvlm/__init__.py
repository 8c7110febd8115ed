"""High-resolution vision encoders, and the vision-language model around them.

    from hrvlm import DINOv3Encoder

Names are imported when first used, so that importing the package stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import auto_classes

if TYPE_CHECKING:
    from .checkpoints.convert import convert, load_checkpoint, load_into
    from .encoder.backbone import DINOv3Backbone
    from .encoder.backbone_config import DINOv3BackboneConfig
    from .encoder.cost import make_plan
    from .encoder.output import EncoderOutput, PackedEncoderOutput
    from .encoder.vision_transformer import DINOv3Encoder
    from .images.geometry import Geometry, TileGeometry, image_token_count, tile_grid, token_grid
    from .images.intake import ImageError, load_image
    from .images.patches import pack_images, patchify, unpatchify
    from .images.processor import (
        IMAGENET_MEAN,
        IMAGENET_STD,
        ImageProcessor,
        get_image_processor,
        normalization_for,
    )
    from .images.transformers_processor import VLMImageProcessor, VLMImageProcessorPil
    from .towers.acceleration import accelerate, restore
    from .training.collators import BaseCollator, VQACollator
    from .training.config import TrainingConfig
    from .training.sequence_packing import PackedSequenceCollator, pack_sequences
    from .training.trainer import VLMTrainer, VLMTrainingArguments
    from .vlm.config import VLMConfig
    from .vlm.modality_projector import (
        ModalityProjector,
        pixel_shuffle,
        pixel_unshuffle,
    )
    from .vlm.output import VLMOutput
    from .vlm.processors import VLMProcessor, get_image_string, get_tokenizer
    from .vlm.vision_language_model import VisionLanguageModel

_HOME = {
    "BaseCollator": "training.collators",
    "DINOv3Backbone": "encoder.backbone",
    "DINOv3BackboneConfig": "encoder.backbone_config",
    "DINOv3Encoder": "encoder.vision_transformer",
    "EncoderOutput": "encoder.output",
    "Geometry": "images.geometry",
    "IMAGENET_MEAN": "images.processor",
    "IMAGENET_STD": "images.processor",
    "ImageError": "images.intake",
    "ImageProcessor": "images.processor",
    "ModalityProjector": "vlm.modality_projector",
    "PackedEncoderOutput": "encoder.output",
    "PackedSequenceCollator": "training.sequence_packing",
    "TileGeometry": "images.geometry",
    "TrainingConfig": "training.config",
    "VLMConfig": "vlm.config",
    "VLMImageProcessor": "images.transformers_processor",
    "VLMImageProcessorPil": "images.transformers_processor",
    "VLMOutput": "vlm.output",
    "VLMProcessor": "vlm.processors",
    "VLMTrainer": "training.trainer",
    "VLMTrainingArguments": "training.trainer",
    "VQACollator": "training.collators",
    "VisionLanguageModel": "vlm.vision_language_model",
    "accelerate": "towers.acceleration",
    "convert": "checkpoints.convert",
    "get_image_processor": "images.processor",
    "get_image_string": "vlm.processors",
    "get_tokenizer": "vlm.processors",
    "image_token_count": "images.geometry",
    "load_checkpoint": "checkpoints.convert",
    "load_image": "images.intake",
    "load_into": "checkpoints.convert",
    "make_plan": "encoder.cost",
    "normalization_for": "images.processor",
    "pack_images": "images.patches",
    "pack_sequences": "training.sequence_packing",
    "patchify": "images.patches",
    "pixel_shuffle": "vlm.modality_projector",
    "pixel_unshuffle": "vlm.modality_projector",
    "restore": "towers.acceleration",
    "tile_grid": "images.geometry",
    "token_grid": "images.geometry",
    "unpatchify": "images.patches",
}

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "BaseCollator",
    "DINOv3Backbone",
    "DINOv3BackboneConfig",
    "DINOv3Encoder",
    "EncoderOutput",
    "Geometry",
    "ImageError",
    "ImageProcessor",
    "ModalityProjector",
    "PackedEncoderOutput",
    "PackedSequenceCollator",
    "TileGeometry",
    "TrainingConfig",
    "VLMConfig",
    "VLMImageProcessor",
    "VLMImageProcessorPil",
    "VLMOutput",
    "VLMProcessor",
    "VLMTrainer",
    "VLMTrainingArguments",
    "VQACollator",
    "VisionLanguageModel",
    "accelerate",
    "convert",
    "get_image_processor",
    "get_image_string",
    "get_tokenizer",
    "image_token_count",
    "load_checkpoint",
    "load_image",
    "load_into",
    "make_plan",
    "normalization_for",
    "pack_images",
    "pack_sequences",
    "patchify",
    "pixel_shuffle",
    "pixel_unshuffle",
    "restore",
    "tile_grid",
    "token_grid",
    "unpatchify",
]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hrvlm' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


auto_classes.install()
