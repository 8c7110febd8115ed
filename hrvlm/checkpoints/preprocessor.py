"""Mean and std of the pixels that a checkpoint was trained with, where it says them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..images.processor import Normalization, check_normalization
from .files import read_json


def stored_normalization(model: str) -> Normalization | None:
    """Of the image processor beside a model, by directory or hub id; None where it has none.

    Raises:
        ValueError: its file has no such numbers.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    stored: dict[str, Any]
    if Path(model).is_dir():
        # Beside a processor of text and images, theirs is in one file since transformers 5.
        stored = read_json(Path(model) / "preprocessor_config.json") or {}
        together = read_json(Path(model) / "processor_config.json") or {}
        stored = stored or together.get("image_processor") or {}
    else:
        try:
            stored, _ = ImageProcessingMixin.get_image_processor_dict(model)
        except OSError:
            return None
    return normalization_in(stored, model)


def normalization_in(preprocessor: dict[str, Any], model: str) -> Normalization | None:
    """That of a preprocessor_config.json; `model` is named in errors."""
    if "image_mean" not in preprocessor or "image_std" not in preprocessor:
        return None
    try:
        return check_normalization(preprocessor["image_mean"], preprocessor["image_std"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"model {model!r}: its preprocessor_config.json: {error}") from error
