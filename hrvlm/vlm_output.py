"""What the vision-language model returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput


@dataclass
class VLMOutput(ModelOutput):
    """Output of :class:`~hrvlm.vision_language_model.VisionLanguageModel`.

    Attributes:
        loss: With labels: next-token cross entropy, as the language model computes it.
        logits: ``[B, L, vocabulary]``, or the last ``logits_to_keep`` positions.
        past_key_values: The language model's cache.
        hidden_states: On request, the language model's.
        attentions: On request, the language model's.
        image_hidden_states: ``[sum of tokens, C_lm]``, the projected features of all images, image
            after image, in the dtype of the embeddings; None without images.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


@dataclass
class ImageFeatures(BaseModelOutputWithPooling):
    """Output of ``get_image_features``, named as transformers' models name theirs.

    Attributes:
        last_hidden_state: The encoder's output: packed ``[T, C]``, or ``[B, n, C]`` for siglip.
        pooler_output: The projected features of each image, ``[tokens, C_lm]``.
    """

    # ModelOutput wants a default for every field; both are always given.
    last_hidden_state: Tensor = None  # type: ignore[assignment]
    pooler_output: tuple[Tensor, ...] = None  # type: ignore[assignment]
