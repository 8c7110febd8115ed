"""DINOv3Encoder as a backbone of transformers: feature maps of chosen stages, at any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DINOv3ViTConfig
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from ..checkpoints import mapping
from .backbone_config import DINOv3BackboneConfig
from .inputs import Grids
from .intermediate import as_maps, by_image
from .output import EncoderOutput
from .vision_transformer import DINOv3Encoder

mapping.register("DINOv3Backbone", "dinov3")


@dataclass
class DINOv3BackboneOutput(BackboneOutput):
    """Output of :class:`DINOv3Backbone`.

    Attributes:
        feature_maps: Of each stage of ``out_features``: for a batch ``[B, C, hp, wp]``, for images
            of different shapes a tuple of ``[C, hp, wp]``. With ``config.reshape_hidden_states``
            off, patches ``[B, hp*wp, C]`` or a tuple of ``[hp*wp, C]``.
        hidden_states: On request, of all stages, before the final norm: for a batch
            ``[B, P + hp*wp, C]``, else packed ``[T, C]``.
        attentions: None.
        cls_tokens: With ``config.return_class_token``, of each of these stages ``[B, C]``.
        last_hidden_state: After the final norm, in the form of `hidden_states`.
    """

    feature_maps: tuple[Any, ...] | None = None
    cls_tokens: tuple[Tensor, ...] | None = None
    last_hidden_state: Tensor | None = None


class DINOv3Backbone(BackboneMixin, DINOv3Encoder):
    """DINOv3 as a backbone: what ``transformers.DINOv3ViTBackbone`` is to ``DINOv3ViTModel``.

    The same fields of the config choose what it returns: ``out_features`` or ``out_indices`` (0 is
    the embeddings, "stem"; i the output of block i), ``apply_layernorm``,
    ``reshape_hidden_states``, ``return_class_token``. ``AutoBackbone`` finds it by a
    :class:`DINOv3BackboneConfig`; checkpoints are those of DINOv3.

    Args:
        config: :class:`DINOv3BackboneConfig` or ``DINOv3ViTConfig``.
        **options: Of :class:`~hrvlm.DINOv3Encoder`.
    """

    config_class = DINOv3BackboneConfig

    def __init__(self, config: DINOv3ViTConfig, **options: Any):
        super().__init__(config, **options)
        self.num_features = [config.hidden_size] * len(self.stage_names)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        *,
        grids: Grids | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        rope_augment: bool = False,
        **kwargs: Any,
    ) -> DINOv3BackboneOutput:
        """Feature maps of images.

        Args:
            pixel_values: A batch ``[B, 3, H, W]``, a list of ``[3, Hi, Wi]``, or packed patches
                with `grids`; see :meth:`DINOv3Encoder.forward`.
            grids: Patch grids of packed patches.
            output_hidden_states: Return all hidden states too. Default: the config's.
            output_attentions: Refused where it, or the config's, is True.
            rope_augment: As :meth:`DINOv3Encoder.forward`.
            **kwargs: ``return_dict=False`` for a tuple; others raise.

        Raises:
            TypeError: an unknown argument.
            ValueError: as :meth:`DINOv3Encoder.forward`.
        """
        last = len(self.stage_names) - 1
        indices = [self.stage_names.index(name) for name in self.out_features]
        out: Any = DINOv3Encoder.forward(
            self,
            pixel_values,
            grids=grids,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            out_indices=indices,
            apply_layernorm=self.config.apply_layernorm,
            rope_augment=rope_augment,
            return_dict=True,
            **kwargs,
        )
        batched = isinstance(out, EncoderOutput)
        prefix = "" if batched else "packed_"
        final, states, selected = (
            out.get(prefix + name)
            for name in ("last_hidden_state", "hidden_states", "selected_hidden_states")
        )
        # The last stage has its norm in any case, as in transformers.
        stages = [final if i == last else x for i, x in zip(indices, selected or (), strict=True)]
        maps, cls_tokens = [], []
        for stage in stages:
            patches, own_cls, _ = by_image(stage, out, self.num_prefix_tokens)
            if self.config.reshape_hidden_states:
                patches = as_maps(patches, out, pixel_values, self.patch_size)
            maps.append(patches)
            cls_tokens.append(own_cls)
        return DINOv3BackboneOutput(
            feature_maps=tuple(maps),
            hidden_states=states,
            cls_tokens=tuple(cls_tokens)
            if getattr(self.config, "return_class_token", False)
            else None,
            last_hidden_state=final,
        )
