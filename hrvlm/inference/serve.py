"""`transformers serve` with our models: its server, its command line, our classes made known.

The server of transformers 5.17 finds classes by name in two places that registration with the Auto
classes does not reach: the table of multimodal models, and transformers' own namespace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..vlm.processors import VLMProcessor


def register_for_serving() -> None:
    """Let the server of transformers load a VisionLanguageModel, in this process.

    Images that a client sends are decoded in workers (`worker.py`); files of the server's own
    are not read for a client.

    The name goes into the server's table of models that take images. Auto classes that walk through
    that table would look for a module of transformers, so this is for a process that only serves.
    """
    from transformers import AutoModelForMultimodalLM
    from transformers.models.auto import modeling_auto

    from ..vlm.config import VLMConfig
    from ..vlm.processors import VLMProcessor
    from ..vlm.vision_language_model import VisionLanguageModel

    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[VLMConfig.model_type] = (
        VisionLanguageModel.__name__
    )
    AutoModelForMultimodalLM.register(VLMConfig, VisionLanguageModel, exist_ok=True)
    VLMProcessor.fetched = _fetched_for_a_client  # type: ignore[assignment, method-assign]


def _fetched_for_a_client(processor: VLMProcessor, index: int, image: Any) -> Any:
    """A stranger's image: by URL or base64 only, decoded in a worker, and HTTP 400 if it is bad."""
    from fastapi import HTTPException

    from ..images.fetch import fetch_image, is_text_image
    from ..images.formats import ImageError
    from ..images.processor import resize
    from ..images.worker import load_image_in_worker

    try:
        if not isinstance(image, str) or not is_text_image(image):
            raise ImageError(f"image {index}: expected a URL or a data URI")
        data = fetch_image(image, f"image {index}")
        rgb = load_image_in_worker(data, name=index, **processor.reading_options())
    except ImageError as error:
        raise HTTPException(400, str(error)) from error
    side = processor.square_size
    return rgb if side is None else resize(rgb, side, side)


def serve(arguments: Sequence[str]) -> None:
    """Run ``transformers serve`` with these arguments, until it is stopped.

    Raises:
        ImportError: the server's dependencies are not installed (``pip install 'hrvlm[serve]'``).
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError("the server needs more packages: pip install 'hrvlm[serve]'")
    register_for_serving()
    from transformers.cli.transformers import app

    app(["serve", *arguments], prog_name="transformers")
