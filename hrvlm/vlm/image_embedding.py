"""The images of a batch put into the embeddings of its texts, at the placeholders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .image_plan import ImagePlan
from .output import CACHE_NAME
from .placeholders import (
    Grid,
    as_grids,
    check_context,
    check_vocabulary,
    count_batch,
    count_tokens,
    images_per_sample,
)

Grids: TypeAlias = Tensor | Sequence[Sequence[int]]


class ImageEmbedding:
    """What a vision-language model does before its language model runs; `self` is the model."""

    def embed(
        self: Any,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        pixel_values: Tensor | None,
        image_grid_hw: Grids | None,
        *,
        labels: Tensor | None = None,
        begins: bool = True,
        output_hidden_states: bool = False,
    ) -> tuple[Tensor, Tensor | None, ImagePlan | None]:
        """The language model's input ``[B, L, C_lm]``, the images' features in it, and their plan.

        Takes and checks what the model's forward does; without images, what goes on from a cache
        (`begins` is False) is not checked.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        check_inputs(input_ids, attention_mask, inputs_embeds, pixel_values, begins)
        if inputs_embeds is not None:
            check_embeddings(inputs_embeds, self.config.lm_hidden_dim)
        plan = None
        if pixel_values is not None or image_grid_hw is not None:
            given = input_ids, inputs_embeds, attention_mask, labels
            plan = self._checked_plan(pixel_values, image_grid_hw, *given)
        elif input_ids is not None and begins and not torch.compiler.is_compiling():
            self.images_per_sample(input_ids, attention_mask, [], labels)
        ids = self.ids_of(input_ids, inputs_embeds) if plan is not None else input_ids
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and plan is not None and ids is not None:
            flags = {
                "output_attentions": None,
                "output_hidden_states": output_hidden_states or None,
                "return_dict": True,
            }
            features = self.encode_images(pixel_values, plan, flags, False)
            features = features.to(inputs_embeds.device, inputs_embeds.dtype)
            placeholders = ids.eq(self.image_token_id()).unsqueeze(-1)
            return inputs_embeds.masked_scatter(placeholders, features), features, plan
        return self.touch_encoder(inputs_embeds) if begins else inputs_embeds, None, None

    @torch.compiler.disable
    def _checked_plan(
        self: Any,
        pixel_values: Tensor | None,
        image_grid_hw: Grids | None,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None,
    ) -> ImagePlan | None:
        """The plan of the images, after all checks; None if there are none."""
        grids = grids_of(pixel_values, image_grid_hw)
        ids = self.ids_of(input_ids, inputs_embeds) if grids else input_ids
        if ids is not None and not torch.compiler.is_compiling():
            self.images_per_sample(ids, attention_mask, grids, labels)
        return self.plan_of(grids) if grids else None

    def ids_of(self: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Token ids; of embeddings, ids that tell no more than where the placeholders are.

        A row of embeddings is one where it equals the embedding of the image token.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            return input_ids
        token = self.image_token_id()
        row = torch.full((1, 1), token, device=inputs_embeds.device)
        is_image = (inputs_embeds == self.get_input_embeddings()(row)).all(-1)
        return torch.where(is_image, token, 0 if token else 1)

    def images_per_sample(
        self: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        grids: list[Grid],
        labels: Tensor | None = None,
    ) -> list[int]:
        """How many images each sample has, after checking all that forward promises."""
        config = self.config
        if input_ids.shape[1] == 0 and not grids:
            return [0] * input_ids.shape[0]
        if grids:
            self.image_token_id()
        counts = count_batch(input_ids, attention_mask, config.image_token_id, labels)
        check_vocabulary(counts, input_ids, self.vocab_size, labels)
        tokens = count_tokens(grids, config.mp_pixel_shuffle_factor, config.mp_append_cls)
        numbers = images_per_sample(counts.placeholders, grids, tokens)
        check_context(counts, numbers, grids, config.lm_max_position_embeddings)
        return numbers

    def image_token_id(self: Any) -> int:
        """The config's.

        Raises:
            ValueError: it has none.
        """
        if self.config.image_token_id is None:
            raise ValueError("config.image_token_id is None: set it to use images")
        return self.config.image_token_id

    def touch_encoder(self: Any, inputs_embeds: Tensor) -> Tensor:
        """Add nothing, by way of encoder and projector, when training on several devices.

        A rank whose batch has no image would leave their parameters out of its graph, and DDP and
        FSDP wait for them.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (self.training and distributed):
            return inputs_embeds
        p, s = self.config.vit_patch_size, self.config.mp_pixel_shuffle_factor
        side = (self.config.square_size or p * s) // p
        black = torch.zeros(side * side, 3 * p * p, device=inputs_embeds.device)
        images = self.get_image_features(
            black, [(side, side)], return_dict=True, with_last_hidden_state=False
        )
        features = torch.cat(images.pooler_output)
        return inputs_embeds + (0 * features.float().sum()).to(inputs_embeds)


def check_inputs(
    input_ids: Tensor | None,
    attention_mask: Any,
    inputs_embeds: Tensor | None,
    pixel_values: Tensor | None,
    begins: bool,
) -> None:
    """Raise TypeError or ValueError where an input is no tensor, or of another form."""
    named = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "pixel_values": pixel_values}
    for name, value in named.items():
        if value is not None:
            check_is_tensor(name, value)
    if input_ids is not None and (input_ids.ndim != 2 or not is_whole(input_ids)):
        raise ValueError(
            f"input_ids: expected integers [B, L], got {input_ids.dtype} {tuple(input_ids.shape)}"
        )
    if inputs_embeds is not None and inputs_embeds.ndim != 3:
        raise ValueError(f"inputs_embeds: expected [B, L, C], got {tuple(inputs_embeds.shape)}")
    tokens: Any = inputs_embeds if input_ids is None else input_ids
    if begins and tokens.shape[0] and not tokens.shape[1]:
        raise ValueError(f"input_ids: {tuple(tokens.shape)}, samples without a token")
    if isinstance(attention_mask, str | int | float | list | tuple | np.ndarray):
        raise TypeError(f"attention_mask: expected a tensor, got {type(attention_mask).__name__}")
    check_mask(attention_mask, tokens, begins)


def check_mask(attention_mask: Any, tokens: Tensor, begins: bool) -> None:
    """Raise ValueError unless a mask is one for each token, where nothing is before these."""
    if not isinstance(attention_mask, Tensor):
        return
    if attention_mask.ndim not in (2, 4):
        raise ValueError(
            "attention_mask: expected [B, L] or [B, heads, L, L], got "
            f"{tuple(attention_mask.shape)}"
        )
    if begins and attention_mask.ndim == 2 and attention_mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"attention_mask: {tuple(attention_mask.shape)}, expected {tuple(tokens.shape[:2])}, "
            "one for each token"
        )


def check_is_tensor(name: str, value: Any) -> None:
    """Raise TypeError, naming the input, unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a tensor, got {type(value).__name__}; VLMProcessor makes "
            "the inputs of texts and images"
        )


def check_embeddings(inputs_embeds: Tensor, width: int) -> None:
    """Raise ValueError unless they are floating-point numbers, as many as a token's."""
    if not inputs_embeds.is_floating_point() or inputs_embeds.shape[-1] != width:
        raise ValueError(
            f"inputs_embeds: expected floating-point numbers [B, L, {width}], got "
            f"{inputs_embeds.dtype} {tuple(inputs_embeds.shape)}"
        )


def check_positions(
    position_ids: Any, logits_to_keep: Any, inputs_embeds: Any, input_ids: Any
) -> None:
    """Raise TypeError or ValueError unless there is a position for each token, and a choice."""
    tokens = inputs_embeds if input_ids is None else input_ids
    if position_ids is not None:
        check_is_tensor("position_ids", position_ids)
        if isinstance(tokens, Tensor) and position_ids.shape[-1:] != tokens.shape[1:2]:
            raise ValueError(
                f"position_ids: {tuple(position_ids.shape)}, expected one for each of the "
                f"{tokens.shape[1]} tokens"
            )
    chosen = isinstance(logits_to_keep, Tensor) and not logits_to_keep.is_floating_point()
    if not chosen and not (isinstance(logits_to_keep, int) and logits_to_keep >= 0):
        raise TypeError(
            f"logits_to_keep={logits_to_keep!r:.60}: expected a number of positions, or a tensor "
            "of them"
        )


def is_whole(numbers: Tensor) -> bool:
    """Whether they are integers; neither truth values nor complex numbers are."""
    kind = numbers.dtype
    return not (kind.is_floating_point or kind.is_complex or kind == torch.bool)


def check_labels(labels: Any, tokens: Tensor | None) -> None:
    """Raise TypeError or ValueError where labels are not one integer for each of the tokens."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor, got {type(labels).__name__}")
    shape = labels.shape if tokens is None else tokens.shape[:2]
    if not is_whole(labels) or labels.shape != shape:
        raise ValueError(
            f"labels: expected integers {tuple(shape)}, one for each token, got {labels.dtype} "
            f"{tuple(labels.shape)}"
        )


def grids_of(pixel_values: Tensor | None, image_grid_hw: Grids | None) -> list[Grid]:
    """The grids as ints; empty if there are no images.

    Raises:
        TypeError: the pixels are no tensor.
        ValueError: pixels come without grids, or grids without pixels.
    """
    if pixel_values is not None:
        check_is_tensor("pixel_values", pixel_values)
    rows = 0 if pixel_values is None else pixel_values.shape[0]
    grids = [] if image_grid_hw is None else as_grids(image_grid_hw)
    if bool(rows) != bool(grids):
        raise ValueError(
            f"pixel_values has {rows} patches and image_grid_hw {len(grids)} images: "
            "expected both, or neither"
        )
    return grids


def is_beginning(cache: Cache | None, input_ids: Tensor | None) -> bool:
    """Whether a forward has nothing before it, as far as the host knows without waiting.

    The length of a static cache is on the device: a single token goes on from what is there.
    """
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise TypeError(
            f"{CACHE_NAME}: expected a Cache of transformers, got {type(cache).__name__}"
        )
    length = 0 if cache is None else cache.get_seq_length()
    if isinstance(length, Tensor):
        return input_ids is not None and input_ids.shape[1] > 1
    return not length


def check_attentions(asked: bool, attentions: tuple[Tensor, ...] | None, config: str) -> None:
    """Raise ValueError where attention weights were asked for and a part has computed none."""
    if asked and not attentions:
        raise ValueError(
            f"output_attentions: only eager attention computes weights, which {config} has not: "
            f'set_attn_implementation({{"{config}": "eager"}}), or leave it out'
        )
