"""RoPE's frequencies, and positions drawn at random as in DINOv3's training."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from transformers import DINOv3ViTConfig

from hrvlm_kernels import PackedGrids


@lru_cache(maxsize=64)
def rope_frequencies(theta: float, head_dim: int, device: torch.device) -> Tensor:
    """``[D / 4]`` float32: ``theta ** (-4 j / D)``, from the config, never stored in the model.

    A buffer would be spoilt by ``.to(bfloat16)``, by loading on the meta device or by FSDP.
    """
    with torch.inference_mode(False):
        exponents = torch.arange(head_dim // 4, dtype=torch.float32, device="cpu") * 4 / head_dim
        return (1 / theta**exponents).to(device)


def augmented_coords(packed: PackedGrids, config: DINOv3ViTConfig) -> Tensor:
    """RoPE coordinates with a random shift, jitter and scale per image; prefix rows stay 0."""
    coords = packed.coords

    def draw(columns: int, limit: float) -> Tensor:
        values = torch.empty(len(packed), columns, device=coords.device).uniform_(-limit, limit)
        lengths = packed.cu_seqlens.diff()
        return values.repeat_interleave(lengths, dim=0, output_size=packed.total_tokens)

    new = coords
    if config.pos_embed_shift is not None:
        new = new + draw(2, config.pos_embed_shift)
    for limit, columns in ((config.pos_embed_jitter, 2), (config.pos_embed_rescale, 1)):
        if limit is not None:
            new = new * draw(columns, torch.tensor(limit).log().item()).exp()
    rows = packed.patch_rows().long()
    return torch.zeros_like(coords).index_copy(0, rows, new[rows])
