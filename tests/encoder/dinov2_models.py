"""Small DINOv2 models with weights that leave nothing out, for the tests of the encoder."""

import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from hrvlm import DINOv2Encoder

PLAIN, REGISTERS = (
    (Dinov2Config, Dinov2Model),
    (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
)
# Each line is a branch of the family: S, B and L, with and without registers, giant (SwiGLU), and
# the odd ones.
FAMILY = {
    "plain": (*PLAIN, {}),
    "registers": (*REGISTERS, {"num_register_tokens": 4}),
    "giant": (*PLAIN, {"use_swiglu_ffn": True}),
    "giant_registers": (*REGISTERS, {"use_swiglu_ffn": True, "patch_size": 8, "image_size": 24}),
    "bare": (*PLAIN, {"qkv_bias": False, "use_mask_token": False, "layer_norm_eps": 1e-5}),
}


def config_of(name="plain", **changes):
    fields = {
        "hidden_size": 64,
        "mlp_ratio": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": 56,
    }
    kind, _, own = FAMILY[name]
    return kind(**(fields | own | changes))


def pair_of(name="plain", seed=0, **changes):
    """Transformers' model and ours with equal random weights, none at its initial value."""
    config = config_of(name, **changes)
    theirs = FAMILY[name][1](config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            spread = 1.0 if "token" in key or "position" in key else 0.15
            centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            parameter.normal_(centre, spread, generator=generator)
    ours = DINOv2Encoder(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours
