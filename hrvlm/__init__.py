"""High-resolution vision encoders, and the vision-language model around them.

    from hrvlm import DINOv3Encoder

Names are imported when first used, so that importing the package stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .encoder_output import EncoderOutput, PackedEncoderOutput
    from .patches import pack_images, patchify, unpatchify
    from .vision_transformer import DINOv3Encoder

_HOME = {
    "DINOv3Encoder": "vision_transformer",
    "EncoderOutput": "encoder_output",
    "PackedEncoderOutput": "encoder_output",
    "pack_images": "patches",
    "patchify": "patches",
    "unpatchify": "patches",
}

__all__ = [
    "DINOv3Encoder",
    "EncoderOutput",
    "PackedEncoderOutput",
    "pack_images",
    "patchify",
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
