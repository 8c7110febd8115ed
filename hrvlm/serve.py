"""`transformers serve` with our models: its server, its command line, our classes made known.

The server of transformers 5.17 finds classes by name in two places that registration with the Auto
classes does not reach: the table of multimodal models, and transformers' own namespace.
"""

from __future__ import annotations

from collections.abc import Sequence


def register_for_serving() -> None:
    """Let the server of transformers load a VisionLanguageModel, in this process.

    The name goes into the server's table of models that take images. Auto classes that walk through
    that table would look for a module of transformers, so this is for a process that only serves.
    """
    from transformers import AutoModelForMultimodalLM
    from transformers.models.auto import modeling_auto

    from .config import VLMConfig
    from .vision_language_model import VisionLanguageModel

    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[VLMConfig.model_type] = (
        VisionLanguageModel.__name__
    )
    AutoModelForMultimodalLM.register(VLMConfig, VisionLanguageModel, exist_ok=True)


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
