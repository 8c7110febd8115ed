"""DINOv3 ViT checkpoints of every origin, to transformers' on-disk layout and back.

    transformers         layer.N.attention.{q,k,v,o}_proj, layer_scale1.lambda1, mlp.{gate,up,down}_proj
    transformers_memory  the same with model.layer.N (what ``DINOv3ViTModel.state_dict()`` gives since transformers 5)
    fused                the same with attention.qkv.{weight,q_bias,k_bias,v_bias} (DINOv3Encoder in memory)
    meta                 blocks.N.attn.{qkv,proj}, ls1.gamma, mlp.{fc1,fc2} or mlp.{w1,w2,w3}, storage_tokens
    timm                 blocks.N.attn.{qkv,q_bias,v_bias,proj}, gamma_1, mlp.{fc1,fc2} or mlp.{fc1_g,fc1_x,fc2}, reg_token

Layouts are recognised by their keys, after any prefix (``module.``, ``teacher.backbone.``, ``vision_encoder.``, ...).
Mirrors dinov3's ``models/vision_transformer.py`` and ``layers/attention.py``, timm's ``models/eva.py``, and the
conversion script of transformers. Renaming and splitting move data only, so a round trip is equal bit for bit.

The bias of k. Meta multiplies ``qkv.bias`` by the buffer ``bias_mask``, which is 0 over k; the buffer's values are not
to be relied on (NaN in some files). So: with a ``bias_mask``, or where the middle third is zero or NaN, k has no bias,
as in transformers; a middle third with other values and no mask is kept, and the config says ``key_bias=True``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from .checkpoint_files import flatten_tensors, load_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from transformers import DINOv3ViTConfig
