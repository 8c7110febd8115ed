"""The families of encoders: what distinguishes them from one another, on one body."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from transformers import DINOv3ViTConfig

from hrvlm_kernels import PackedGrids

from ..checkpoints import mapping
from .packed_encoder import PackedEncoder
from .rope import augmented_coords

Encoder = TypeVar("Encoder", bound=nn.Module)
mapping.register("DINOv3Encoder")


class DINOv3Encoder(PackedEncoder):
    """DINOv3 ViT for images of any size and aspect ratio, many at once.

    A drop-in for ``transformers.DINOv3ViTModel``: same configuration, same checkpoints, same
    outputs for a batch. It also takes a list of images of different shapes, or packed patches.
    Unlike transformers' model it raises where an image's sides are not multiples of the patch size
    (instead of cropping), rotates q and k in float32 whatever the dtype, and augments RoPE
    coordinates only when asked.

    Args:
        config: ``DINOv3ViTConfig``; attributes ``backend``, ``use_rope`` (default True),
            ``allow_fp16`` and ``batch_invariant`` are read from it too.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`; default: the config's, else "auto".
        allow_fp16: Run in float16 although DINOv3's activations overflow it; default: the config's.
        batch_invariant: Give an image's features the same bits whatever it is packed with, at the
            cost of one image at a time; default: the config's, else False.
    """

    config_class = DINOv3ViTConfig
    config: DINOv3ViTConfig
    _overflows_float16 = True

    def __init__(self, config: DINOv3ViTConfig, **options: Any):
        if config.attention_dropout:
            raise ValueError(
                "config.attention_dropout must be 0 (no kernel has it), "
                f"got {config.attention_dropout}"
            )
        super().__init__(config, **options)

    def _augmented(self, packed: PackedGrids) -> PackedGrids:
        return packed.with_coords(augmented_coords(packed, self.config))


def without_mask_token(encoder: Encoder) -> Encoder:
    """Leave a mask token out of training where nothing is masked: DDP waits for gradients.

    An encoder of transformers is left as it is.
    """
    if isinstance(encoder, PackedEncoder):
        encoder.embeddings.mask_token.requires_grad_(False)
    return encoder
