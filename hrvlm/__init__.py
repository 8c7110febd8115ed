"""High-resolution vision encoders, and the vision-language model around them.

    from hrvlm import DINOv3Encoder

Names are imported when first used, so that importing the package stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import auto_classes

if TYPE_CHECKING:
    from .checkpoints.convert import convert as convert
    from .checkpoints.convert import load_checkpoint as load_checkpoint
    from .checkpoints.convert import load_into as load_into
    from .encoder.backbone import DINOv3Backbone as DINOv3Backbone
    from .encoder.backbone_config import DINOv3BackboneConfig as DINOv3BackboneConfig
    from .encoder.cost import make_plan as make_plan
    from .encoder.output import EncoderOutput as EncoderOutput
    from .encoder.output import PackedEncoderOutput as PackedEncoderOutput
    from .encoder.vision_transformer import DINOv2Encoder as DINOv2Encoder
    from .encoder.vision_transformer import DINOv3Encoder as DINOv3Encoder
    from .images.geometry import Geometry as Geometry
    from .images.geometry import TileGeometry as TileGeometry
    from .images.geometry import image_token_count as image_token_count
    from .images.geometry import tile_grid as tile_grid
    from .images.geometry import token_grid as token_grid
    from .images.intake import ImageError as ImageError
    from .images.intake import load_image as load_image
    from .images.patches import pack_images as pack_images
    from .images.patches import patchify as patchify
    from .images.patches import unpatchify as unpatchify
    from .images.processor import IMAGENET_MEAN as IMAGENET_MEAN
    from .images.processor import IMAGENET_STD as IMAGENET_STD
    from .images.processor import ImageProcessor as ImageProcessor
    from .images.processor import get_image_processor as get_image_processor
    from .images.processor import normalization_for as normalization_for
    from .images.transformers_processor import VLMImageProcessor as VLMImageProcessor
    from .images.transformers_processor import VLMImageProcessorPil as VLMImageProcessorPil
    from .towers.acceleration import accelerate as accelerate
    from .towers.acceleration import restore as restore
    from .training.collators import BaseCollator as BaseCollator
    from .training.collators import VQACollator as VQACollator
    from .training.config import TrainingConfig as TrainingConfig
    from .training.sequence_packing import PackedSequenceCollator as PackedSequenceCollator
    from .training.sequence_packing import pack_sequences as pack_sequences
    from .training.trainer import VLMTrainer as VLMTrainer
    from .training.trainer import VLMTrainingArguments as VLMTrainingArguments
    from .vlm.config import VLMConfig as VLMConfig
    from .vlm.modality_projector import ModalityProjector as ModalityProjector
    from .vlm.modality_projector import pixel_shuffle as pixel_shuffle
    from .vlm.modality_projector import pixel_unshuffle as pixel_unshuffle
    from .vlm.output import VLMOutput as VLMOutput
    from .vlm.processors import VLMProcessor as VLMProcessor
    from .vlm.tokenizer import get_image_string as get_image_string
    from .vlm.tokenizer import get_tokenizer as get_tokenizer
    from .vlm.vision_language_model import VisionLanguageModel as VisionLanguageModel

_HOME = {
    "BaseCollator": "training.collators",
    "DINOv2Encoder": "encoder.vision_transformer",
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
    "get_image_string": "vlm.tokenizer",
    "get_tokenizer": "vlm.tokenizer",
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

__all__ = sorted(_HOME)
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
