"""What embedding very many images comes to: bytes exactly, time from a rate that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..encoder.cost import named_architecture
from ..images.geometry import positive_int, positive_number, token_grid
from .config import EXTRAS


@dataclass(frozen=True)
class Calculation:
    """What it comes to.

    Attributes:
        tokens: To be encoded, prefix tokens included.
        pixel_bytes: Decoded and resized, that pass from decoders to encoders.
        pooled_bytes: Of CLS and mean in float32.
        patch_bytes: Of the patch maps in 16 bits, if they are kept.
        token_bytes: Of the projector's tokens, likewise.
        encode_hours: Of all encoders at work together.
        decode_hours: Of all decoding CPUs at work together.
    """

    tokens: int
    pixel_bytes: int
    pooled_bytes: int
    patch_bytes: int
    token_bytes: int
    encode_hours: float
    decode_hours: float

    @property
    def hours(self) -> float:
        """The longer of the two: they run side by side."""
        return max(self.encode_hours, self.decode_hours)


def calculate(
    images: int,
    size: tuple[int, int],
    *,
    tokens_per_second: float,
    decode_seconds: float,
    model: str = "vitb16",
    max_img_size: int = 1024,
    keep: Sequence[str] = (),
    factor: int = 1,
    token_size: int = 0,
    encoders: int = 1,
    decoders: int = 1,
) -> Calculation:
    """Cost of images of one size.

    Args:
        images: How many.
        size: (height, width) of each in pixels.
        tokens_per_second: Of one encoder, as ``hrvlm embed --plan`` prints it on your machine.
        decode_seconds: To decode and resize an image on one CPU, likewise.
        model: A key of :data:`hrvlm.checkpoints.family.CONFIGS`.
        max_img_size: Limit of the longer side.
        keep: What is kept beside the pooled features, of ``hrvlm.embed.config.EXTRAS``.
        factor: Of the pixel shuffle, 1 for an encoder alone.
        token_size: Width of the projector's tokens.
        encoders: Processes that encode.
        decoders: CPUs that decode.

    Raises:
        ValueError: a number is not positive, or a name is unknown.
    """
    for name, value in {"images": images, "encoders": encoders, "decoders": decoders}.items():
        positive_int(name, value)
    positive_number("tokens_per_second", tokens_per_second)
    positive_number("decode_seconds", decode_seconds)
    for name in keep:
        if name not in EXTRAS:
            raise ValueError(f"keep={name!r}: expected one of {', '.join(EXTRAS)}")
    architecture = named_architecture(model)
    geometry = token_grid(
        *size,
        max_img_size=max_img_size,
        patch_size=architecture.patch_size,
        factor=factor,
        allow_upscale=False,
    )
    tokens = images * (geometry.num_patches + architecture.num_prefix_tokens)
    wide = architecture.hidden_size
    return Calculation(
        tokens=tokens,
        pixel_bytes=images * 3 * geometry.height * geometry.width,
        pooled_bytes=images * 2 * wide * 4,
        patch_bytes=images * geometry.num_patches * wide * 2 * ("patches" in keep),
        token_bytes=images * geometry.num_tokens * token_size * 2 * ("tokens" in keep),
        encode_hours=tokens / (tokens_per_second * encoders) / 3600,
        decode_hours=images * decode_seconds / decoders / 3600,
    )
