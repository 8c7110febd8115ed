"""The families of encoders: what distinguishes them from one another, on one body."""

from __future__ import annotations

from os import PathLike
from typing import Any, TypeVar

from torch import nn
from transformers import Dinov2Config, Dinov2WithRegistersConfig, DINOv3ViTConfig, PreTrainedConfig

from hrvlm_kernels import PackedGrids

from ..checkpoints import mapping
from ..checkpoints.foreign import open_checkpoint
from ..checkpoints.keys import Family
from ..checkpoints.sizes import is_dinov2
from .packed_encoder import PackedEncoder
from .plain_modules import may_be_plain
from .positions import LearnedPositionEmbeddings
from .rope import augmented_coords

Encoder = TypeVar("Encoder", bound=nn.Module)
mapping.register("DINOv3Encoder", "dinov3")
mapping.register("DINOv2Encoder", "dinov2")


@may_be_plain
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
    family: Family = "dinov3"
    _overflows_float16 = True

    def __init__(self, config: DINOv3ViTConfig, **options: Any):
        if not isinstance(config, DINOv3ViTConfig):
            raise TypeError(f"config: expected a DINOv3ViTConfig, got {type(config).__name__}")
        _refuse_dropout(config, "attention_dropout")
        super().__init__(config, **options)

    def _augmented(self, packed: PackedGrids) -> PackedGrids:
        return packed.with_coords(augmented_coords(packed, self.config))


class DINOv2AnyConfig(Dinov2Config):
    """Reads the config of a DINOv2, with or without registers, as the class that it is of."""

    @classmethod
    def from_pretrained(cls, source: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in transformers."""
        stored, _ = cls.get_config_dict(source, **kwargs)
        registers = stored.get("model_type") == Dinov2WithRegistersConfig.model_type
        return (Dinov2WithRegistersConfig if registers else Dinov2Config).from_pretrained(
            source, **kwargs
        )


@may_be_plain
class DINOv2Encoder(PackedEncoder):
    """DINOv2 ViT, with or without registers, for images of any size and aspect ratio.

    A drop-in for ``transformers.Dinov2Model`` and ``Dinov2WithRegistersModel``, as
    :class:`DINOv3Encoder` is for DINOv3's. The learned positions are interpolated to the grid of
    each image as those models do it. It raises where an image's sides are not multiples of the
    patch size (instead of cropping).

    Args:
        config: ``Dinov2Config`` or ``Dinov2WithRegistersConfig``; its attribute ``backend`` is read
            too.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`; default: the config's, else "auto".
    """

    config_class = DINOv2AnyConfig
    config: Dinov2Config | Dinov2WithRegistersConfig
    family: Family = "dinov2"

    def __init__(self, config: Dinov2Config | Dinov2WithRegistersConfig, **options: Any):
        if not isinstance(config, Dinov2Config | Dinov2WithRegistersConfig):
            raise TypeError(f"config: expected a Dinov2Config, got {type(config).__name__}")
        _refuse_dropout(config, "attention_probs_dropout_prob")
        _refuse_dropout(config, "hidden_dropout_prob")
        super().__init__(config, **options)

    def _new_embeddings(self) -> LearnedPositionEmbeddings:
        return LearnedPositionEmbeddings(self.sizes)


def encoder_class(config: PreTrainedConfig) -> type[DINOv3Encoder] | type[DINOv2Encoder]:
    """The class for a config of one of the families."""
    return DINOv2Encoder if is_dinov2(config) else DINOv3Encoder


def load_file(
    source: str | PathLike[str],
) -> tuple[DINOv3Encoder | DINOv2Encoder, dict[str, Any]]:
    """The encoder in a weight file of either family, and the document of an image processor.

    Raises:
        ValueError: as :func:`hrvlm.checkpoints.foreign.open_checkpoint`.
    """
    opened = open_checkpoint(source)
    opened.config.name_or_path = str(source)
    encoder = encoder_class(opened.config).from_pretrained(
        None, config=opened.config, state_dict=opened.tensors
    )
    encoder.name_or_path = encoder.config.name_or_path = str(source)
    return encoder, opened.preprocessor


def without_mask_token(encoder: Encoder) -> Encoder:
    """Leave a mask token out of training where nothing is masked: DDP waits for gradients.

    An encoder of transformers is left as it is.
    """
    if isinstance(encoder, PackedEncoder) and encoder.embeddings.mask_token is not None:
        encoder.embeddings.mask_token.requires_grad_(False)
    return encoder


def _refuse_dropout(config: Any, name: str) -> None:
    if value := getattr(config, name):
        raise ValueError(f"config.{name} must be 0 (no kernel has it), got {value}")
