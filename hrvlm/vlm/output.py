"""What the vision-language model returns, and the two names of its cache.

transformers 5.24 renamed `past_key_values` to `cache`, in the arguments of all models and in their
outputs. Here both names work with every release; `CACHE_NAME` is the one to speak to it with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

_NAMES = ("cache", "past_key_values")
CACHE_NAME = next(f.name for f in fields(CausalLMOutputWithPast) if f.name in _NAMES)


def name_cache(arguments: dict[str, Any], name: str = CACHE_NAME) -> dict[str, Any]:
    """`arguments` with the cache, if there is one, under `name`: by default as transformers has it.

    Raises:
        ValueError: it is given under both names.
    """
    others = dict(arguments)
    new, old = (others.pop(key, None) for key in _NAMES)
    if new is not None and old is not None:
        raise ValueError("cache and past_key_values are two names of one argument: give one")
    if new is not None or old is not None:
        others[name] = old if new is None else new
    return others


def _either_name(init: Callable[..., None]) -> Callable[..., None]:
    @wraps(init)
    def renamed(self: ModelOutput, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **name_cache(kwargs, "cache"))

    return renamed


def _key(key: Any) -> Any:
    return "cache" if key == "past_key_values" else key


class _WithCache(ModelOutput):
    """An output whose field `cache` is also read and written as `past_key_values`."""

    cache: Cache | None

    @property
    def past_key_values(self) -> Cache | None:
        """The cache."""
        return self.cache

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_key(key))

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_key(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_key(key), value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(_key(name), value)

    def get(self, key: Any, default: Any = None) -> Any:
        """As of a dictionary."""
        return super().get(_key(key), default)

    def to_tuple(self) -> tuple[Any, ...]:
        """As in transformers: what is said of images is a tuple in it."""
        return tuple(
            x.to_tuple() if isinstance(x, ImageFeatures) else x for x in super().to_tuple()
        )


@dataclass
class ImageFeatures(BaseModelOutputWithPooling):
    """Output of ``get_image_features``, named as transformers' models name theirs.

    Attributes:
        last_hidden_state: The encoder's output: packed ``[T, C]``, or ``[B, n, C]`` for siglip;
            None where it was not asked for.
        pooler_output: The projected features of each image, ``[tokens, C_lm]``.
    """

    last_hidden_state: Tensor | None = None  # type: ignore[assignment]
    # ModelOutput wants a default for every field.
    pooler_output: tuple[Tensor, ...] = None  # type: ignore[assignment]


@dataclass
class VLMOutput(_WithCache):
    """Output of :class:`~hrvlm.vlm.vision_language_model.VisionLanguageModel`.

    Attributes:
        loss: With labels: next-token cross entropy, as the language model computes it.
        logits: ``[B, L, vocabulary]``, or the last ``logits_to_keep`` positions.
        cache: The language model's cache; ``past_key_values`` is its other name, as an attribute, a
            key and an argument.
        hidden_states: On request, the language model's.
        attentions: On request, the language model's.
        image_hidden_states: ``[sum of tokens, C_lm]``, the projected features of all images, image
            after image, in the dtype of the embeddings; None without images.
        image_outputs: As of ``get_image_features``, without the encoder's last hidden state: the
            features by image and, where hidden states are asked for, the encoder's.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    image_outputs: ImageFeatures | None = None


@dataclass
class HeadlessOutput(_WithCache):
    """Output of :class:`~hrvlm.vlm.headless.HeadlessVLM`.

    Attributes:
        last_hidden_state: ``[B, L, C_lm]``, what the language model's head is given.
        cache: As of :class:`VLMOutput`, and so are the rest.
        hidden_states: On request, the language model's.
        attentions: On request, the language model's.
        image_hidden_states: ``[sum of tokens, C_lm]``; None without images.
        image_outputs: None without images.
    """

    last_hidden_state: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    image_outputs: ImageFeatures | None = None


for _output in (VLMOutput, HeadlessOutput):
    _output.__init__ = _either_name(_output.__init__)  # type: ignore[method-assign]
