"""The config by which AutoBackbone, and heads of transformers, find DINOv3Backbone."""

from __future__ import annotations

from typing import Any

from transformers import DINOv3ViTConfig


class DINOv3BackboneConfig(DINOv3ViTConfig):
    """A ``DINOv3ViTConfig`` whose backbone is :class:`~hrvlm.DINOv3Backbone`.

    The Auto classes know transformers' own class for transformers' own config, whatever is
    registered for it; so this one has another ``model_type``, and the same fields.
    """

    model_type = "hrvlm_dinov3"

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; the config of a DINOv3 checkpoint is taken for one of these."""
        fields, options = super().get_config_dict(*args, **kwargs)
        if fields.get("model_type") == DINOv3ViTConfig.model_type:
            fields["model_type"] = cls.model_type
        return fields, options
