"""An encoder with what is kept of its output."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..inference.loading import LoadedEncoder, load_encoder, weights_digest
from .config import EmbedConfig, Facts


class FeatureModel:
    """Features of images, as a run keeps them.

    Args:
        config: Of the run.
        dtype: Of the weights; default as in `load_encoder`.

    Raises:
        ValueError: there is no such model, device or layer.
    """

    def __init__(self, config: EmbedConfig, dtype: str | None = None):
        self._config = config
        self.loaded: LoadedEncoder = load_encoder(
            config.model,
            backend=config.backend,
            device=config.device,
            dtype=dtype or config.dtype,
            batch_invariant=config.batch_invariant,
        )
        self._encoder = self.loaded.encoder
        self.device = self._encoder.device
        layers = self._encoder.config.num_hidden_layers
        if config.layer is not None and not -layers <= config.layer <= layers:
            raise ValueError(f"layer={config.layer}: expected {-layers} to {layers}")
        if "tokens" in config.keep:
            raise ValueError("keep='tokens': an encoder without projector has no projector tokens")

    def keeping(self, config: EmbedConfig) -> FeatureModel:
        """The same encoder with other things kept of its output."""
        other = copy.copy(self)
        other._config = config
        return other

    def tokens_of(self, grid: Sequence[int] | None) -> int:
        """Of an image of that patch grid, prefix tokens included."""
        hp, wp = grid or (0, 0)
        return hp * wp + self._encoder.num_prefix_tokens

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor]) -> list[Mapping[str, Any]]:
        """Columns of each image.

        Args:
            images: ``[3, H, W]``, normalised, on the model's device.
        """
        layer = self._config.layer
        indices = None if layer is None else [layer]
        output = self._encoder(list(images), out_indices=indices)
        hidden = output.packed_last_hidden_state
        if layer is not None:
            (hidden,) = output.packed_selected_hidden_states
        packed = output.packed
        columns: list[dict[str, Any]] = []
        means, cls = [], []
        for tokens in packed.split(hidden):
            patches = tokens[packed.num_prefix_tokens :]
            means.append(patches.float().mean(0))
            cls.append(tokens[0].float())
            kept = {"patches": self._stored(patches)} if "patches" in self._config.keep else {}
            columns.append(kept)
        pooled = {"mean": torch.stack(means).cpu().numpy()}
        if packed.num_prefix_tokens:
            pooled["cls"] = torch.stack(cls).cpu().numpy()
        for i, column in enumerate(columns):
            column.update({name: values[i] for name, values in pooled.items()})
        return columns  # type: ignore[return-value]

    def _stored(self, tokens: Tensor) -> bytes:
        dtype = getattr(torch, self._config.stored)
        return tokens.to(dtype).contiguous().view(torch.uint8).cpu().numpy().tobytes()

    def facts(self) -> Facts:
        """What a run has to know of the model."""
        encoder, loaded = self._encoder, self.loaded
        return Facts(
            name=loaded.name,
            random_weights=loaded.random_weights,
            weights=weights_digest(encoder),
            dtype=str(encoder.dtype).removeprefix("torch."),
            hidden_size=encoder.config.hidden_size,
            token_size=0,
            factor=1,
            patch_size=encoder.patch_size,
            num_prefix_tokens=encoder.num_prefix_tokens,
            image_mean=tuple(loaded.normalization.mean),
            image_std=tuple(loaded.normalization.std),
        )
