"""DINOv3 with one set of random weights, in the classes of transformers, timm and hrvlm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from benchmarks.attention_peers import installed
from benchmarks.case import Unavailable
from hrvlm import DINOv3Encoder
from hrvlm.checkpoints.convert import load_into
from hrvlm.measuring.encoder import random_images, random_pair, restore_frequencies

Grids = Sequence[tuple[int, int]]  # patches: height, width
# timm's names of the family.
TIMM = {
    "vits16": "vit_small_patch16_dinov3_qkvb",
    "vitb16": "vit_base_patch16_dinov3_qkvb",
    "vitl16": "vit_large_patch16_dinov3_qkvb",
    "vith16plus": "vit_huge_plus_patch16_dinov3_qkvb",
    "vit7b16": "vit_7b_patch16_dinov3",
}


@dataclass
class Models:
    """One set of weights in the classes of everyone, each made when it is first asked for.

    Attributes:
        name: Key of :data:`hrvlm.checkpoints.family.CONFIGS`.
        config: Its configuration, or a shallower one.
        device: Where.
        dtype: Of weights and activations.
        backend: Of our encoder.
    """

    name: str
    config: DINOv3ViTConfig
    device: torch.device
    dtype: torch.dtype
    backend: str = "auto"

    @cached_property
    def _pair(self) -> tuple[DINOv3ViTModel, DINOv3Encoder]:
        return random_pair(self.config, self.device, self.dtype)

    @property
    def sdpa(self) -> DINOv3ViTModel:
        """The model of transformers with scaled_dot_product_attention."""
        return self._pair[0]

    @property
    def ours(self) -> DINOv3Encoder:
        """Our encoder."""
        encoder = self._pair[1]
        encoder.backend = self.backend
        return encoder

    def twin(self, attention: str) -> DINOv3ViTModel:
        """The model of transformers with the memory of `sdpa` and another attention."""
        with torch.device("meta"):
            model = DINOv3ViTModel._from_config(
                self.config, attn_implementation=attention, dtype=self.dtype
            )
        model.load_state_dict(self.sdpa.state_dict(keep_vars=True), assign=True)
        restore_frequencies(model)
        return model.eval()

    @cached_property
    def timm(self) -> nn.Module:
        """The port in timm; images of any size that is a multiple of the patch."""
        if not installed("timm"):
            raise Unavailable("timm is not installed")
        import timm

        if self.name not in TIMM:
            raise Unavailable(f"timm has no {self.name}")
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)  # made in float32 first, the largest would not fit
        try:
            with self.device:
                model = timm.create_model(
                    TIMM[self.name],
                    num_classes=0,
                    depth=self.config.num_hidden_layers,
                    dynamic_img_size=True,
                )
        finally:
            torch.set_default_dtype(before)
        load_into(model, self.sdpa.state_dict())
        return model.eval()

    @property
    def weight_bytes(self) -> int:
        """Of one model."""
        return sum(p.numel() * p.element_size() for p in self.sdpa.parameters())

    def images(self, grids: Grids) -> list[Tensor]:
        """Random pixels ``[3, H, W]``."""
        return random_images(grids, self.config.patch_size, self.sdpa.norm.weight)
