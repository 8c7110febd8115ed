"""The vision-language model up to its last hidden state, for tools that bring a head of their own.

TRL's trainers, for one, call ``model.base_model(...)`` and project the hidden states piece by
piece. The language model of ours is one with its head, whose scaling and capping of logits are its
own business, so this is no part of the model but a view of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils.generic import can_return_tuple

from .output import HeadlessOutput

if TYPE_CHECKING:
    from .vision_language_model import VisionLanguageModel


class HeadlessVLM(nn.Module):
    """What ``model.base_model`` is: the same modules less the head, looked up when it is asked for.

    Whatever else it is asked for is the whole model's. Made anew each time: hooks belong on the
    modules, not on it.

    Raises:
        ValueError: the language model has no body apart from its head.
    """

    def __init__(self, model: VisionLanguageModel):
        super().__init__()
        body: Any = model.decoder.base_model
        if body is model.decoder:
            raise ValueError(
                f"base_model: {type(body).__name__} has no base_model without its head"
            )
        self.decoder, self.vision_encoder, self.MP = body, model.vision_encoder, model.MP
        self.__dict__["whole"] = model  # not as a child: it has the head

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["whole"], name)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | Sequence[Sequence[int]] | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> HeadlessOutput:
        """As the whole model's, without labels; `logits_to_keep` is left to a head."""
        outputs, make, others = self.whole.run(
            HeadlessOutput,
            self.decoder,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grid_hw=image_grid_hw,
            use_cache=use_cache,
            past_key_values=past_key_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        return make(last_hidden_state=outputs.last_hidden_state, **others)
