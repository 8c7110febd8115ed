"""How transformers' ``generate`` is told of packed images."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from ..images.geometry import positive_int
from .image_embedding import check_is_tensor, grids_of
from .output import name_cache


class PackedGenerationMixin(GenerationMixin):
    """``generate`` of a model whose samples have their images in one packed row.

    Signatures are those of the installed transformers, which looks into them.
    """

    @wraps(GenerationMixin.generate)
    def generate(  # type: ignore[override]
        self, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers; a cache may have either of its names, and a processor its tokenizer.

        Raises:
            TypeError: an input is no tensor.
            ValueError: a number of tokens, beams or answers is no positive int.
        """
        for name in ("input_ids", "inputs_embeds", "attention_mask"):
            if kwargs.get(name) is not None:
                check_is_tensor(name, kwargs[name])
        if isinstance(ids := kwargs.get("input_ids"), Tensor) and ids.ndim != 2:
            raise ValueError(f"input_ids: expected integers [B, L], got {tuple(ids.shape)}")
        if (tokenizer := kwargs.get("tokenizer")) is not None:  # the server gives a processor
            kwargs["tokenizer"] = getattr(tokenizer, "tokenizer", tokenizer)
        for name in ("max_new_tokens", "max_length", "num_beams", "num_return_sequences"):
            if kwargs.get(name) is not None:
                kwargs[name] = positive_int(name, kwargs[name])
        return super().generate(*args, **name_cache(kwargs))  # type: ignore[misc]

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(  # type: ignore[override]
        self, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers; the grids go when the pixels do, after the first step.

        The cache is under the name that it has had for years: PEFT's prompt methods look there for
        it, and would put their prompt before every token if they found none.

        A draft model's first step is one too, although transformers says otherwise: its cache is
        empty, and it has yet to see the images.
        """
        if any(_is_empty(kwargs.get(name)) for name in ("cache", "past_key_values")):
            kwargs["is_first_iteration"] = True
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        if "pixel_values" not in inputs:
            inputs.pop("image_grid_hw", None)
        return name_cache(inputs, "past_key_values")

    def _expand_inputs_for_generation(  # type: ignore[override]
        self: Any,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat each sample for beams or several sequences, with its images, which are packed."""
        pixels = model_kwargs.pop("pixel_values", None)
        grid_hw = model_kwargs.pop("image_grid_hw", None)
        grids = grids_of(pixels, grid_hw)
        if grids and expand_size > 1:
            ids = self.ids_of(input_ids, model_kwargs.get("inputs_embeds"))
            numbers = self.images_per_sample(ids, model_kwargs.get("attention_mask"), grids)
            images = iter(range(len(grids)))
            own = [[next(images) for _ in range(number)] for number in numbers]
            order = [i for sample in own for i in sample * expand_size]
            patches = pixels.split([hp * wp for hp, wp in grids])
            pixels, grid_hw = torch.cat([patches[i] for i in order]), [grids[i] for i in order]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size,
            is_encoder_decoder,
            input_ids,  # type: ignore[arg-type]
            **model_kwargs,
        )
        if pixels is not None:
            model_kwargs |= {"pixel_values": pixels, "image_grid_hw": grid_hw}
        return input_ids, model_kwargs


def _is_empty(cache: Cache | None) -> bool:
    """Whether the host knows that nothing is in it: the length of a static cache is on the device.

    Static caches have no drafts.
    """
    length = None if cache is None else cache.get_seq_length()
    return isinstance(length, int) and length == 0
