"""An encoder, alone or inside a model, with what is kept of its output."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hrvlm_kernels import PackedGrids

from ..encoder.packed_encoder import PackedEncoder
from ..images.patches import pack_images
from ..inference.loading import weights_digest
from ..inference.towers import Tower, load_with_vlm
from .config import EmbedConfig, Facts


class FeatureModel:
    """Features of images, as a run keeps them.

    Args:
        config: Of the run.
        dtype: Of the weights; default: the config's, else as in `load_encoder`.

    Raises:
        ValueError: there is no such model, device or layer, or no projector whose tokens are to be
            kept.
    """

    def __init__(self, config: EmbedConfig, dtype: str | None = None):
        self._config = config
        self._vlm, self.loaded = load_with_vlm(
            config.model,
            backend=config.backend,
            device=config.device,
            dtype=dtype or config.dtype,
            batch_invariant=config.batch_invariant,
        )
        self._encoder = self.loaded.encoder
        self.device = self._encoder.device
        layers, self._hidden_size = _sizes_of(self._encoder)
        if config.layer is not None and not -layers <= config.layer <= layers:
            raise ValueError(f"layer={config.layer}: expected {-layers} to {layers}")
        if "tokens" in config.keep and self._vlm is None:
            raise ValueError(
                "keep='tokens': an encoder without projector has no projector tokens; "
                "a VisionLanguageModel with an encoder of this project has"
            )

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
        keep, layer = self._config.keep, self._config.layer
        if "tokens" in keep:
            hidden, packed, projected = self._with_tokens(images)
        else:
            output = self._encoder(list(images), out_indices=None if layer is None else [layer])
            hidden, packed = output.packed_last_hidden_state, output.packed
            if layer is not None:
                (hidden,) = output.packed_selected_hidden_states
        first, means, cls = packed.num_prefix_tokens, [], []
        columns: list[dict[str, Any]] = [{} for _ in images]
        for column, tokens in zip(columns, packed.split(hidden), strict=True):
            patches = tokens[first:]
            means.append(patches.float().mean(0))
            cls.append(tokens[0].float())
            if "patches" in keep:
                column["patches"] = self._stored(patches)
        if "tokens" in keep:
            for column, tokens in zip(columns, projected, strict=True):
                column["tokens"] = self._stored(tokens)
        pooled: dict[str, np.ndarray] = {"mean": torch.stack(means).cpu().numpy()}
        if first:
            pooled["cls"] = torch.stack(cls).cpu().numpy()
        for i, column in enumerate(columns):
            column.update({name: values[i] for name, values in pooled.items()})
        return list(columns)

    def _with_tokens(self, images: Sequence[Tensor]) -> tuple[Tensor, PackedGrids, list[Tensor]]:
        """The layer's tokens, their layout, and the projector's tokens ``[gh*gw, D]`` by image.

        A product's bits may depend on how many rows it has, and the projector's are no exception:
        where no other image may matter, each goes through alone.
        """
        if not self._config.batch_invariant or len(images) == 1:
            return self._projected(images)
        hidden, layouts, tokens = zip(*(self._projected([i]) for i in images), strict=True)
        packed = PackedGrids.from_grids(
            [grid for layout in layouts for grid in layout.grids or ()],
            num_prefix_tokens=layouts[0].num_prefix_tokens,
            device=self.device,
        )
        return torch.cat(hidden), packed, [one for (one,) in tokens]

    def _projected(self, images: Sequence[Tensor]) -> tuple[Tensor, PackedGrids, list[Tensor]]:
        assert self._vlm is not None and not isinstance(self._encoder, Tower)
        layer, encoder = self._config.layer, self._encoder
        patches, grids = pack_images(images, encoder.patch_size)
        output = self._vlm.get_image_features(
            patches.to(encoder.dtype), grids, output_hidden_states=layer is not None
        )
        hidden = output.last_hidden_state
        if layer is not None:
            hidden = encoder.norm((output.hidden_states or ())[layer])
        packed = PackedGrids.from_grids(
            grids, num_prefix_tokens=encoder.num_prefix_tokens, device=self.device
        )
        area = self._vlm.config.mp_pixel_shuffle_factor**2  # behind them may stand a projected CLS
        counts = [hp * wp // area for hp, wp in grids]
        tokens = [t[:n] for t, n in zip(output.pooler_output, counts, strict=True)]
        assert hidden is not None
        return hidden, packed, tokens

    def _stored(self, tokens: Tensor) -> bytes:
        dtype = getattr(torch, self._config.stored)
        return tokens.to(dtype).contiguous().view(torch.uint8).cpu().numpy().tobytes()

    def facts(self) -> Facts:
        """What a run has to know of the model."""
        encoder, loaded = self._encoder, self.loaded
        parts = nn.ModuleList([encoder] if self._vlm is None else [encoder, self._vlm.MP])
        return Facts(
            name=loaded.name,
            random_weights=loaded.random_weights,
            weights=weights_digest(parts),
            dtype=str(encoder.dtype).removeprefix("torch."),
            hidden_size=self._hidden_size,
            token_size=0 if self._vlm is None else self._vlm.config.text_config.hidden_size,
            factor=loaded.factor if self._vlm is None else self._vlm.config.mp_pixel_shuffle_factor,
            patch_size=encoder.patch_size,
            num_prefix_tokens=encoder.num_prefix_tokens,
            image_mean=tuple(loaded.normalization.mean),
            image_std=tuple(loaded.normalization.std),
        )


def _sizes_of(encoder: PackedEncoder | Tower) -> tuple[int, int]:
    """Layers, and channels."""
    if isinstance(encoder, Tower):
        return encoder.num_layers, encoder.hidden_size
    return encoder.config.num_hidden_layers, encoder.config.hidden_size
