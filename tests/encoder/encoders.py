"""Small DINOv3 models with weights that leave nothing out, for the tests of the encoder."""

import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from hrvlm import DINOv3Encoder

# Each line is a branch of the family: ViT-S/B/L, H+ (SwiGLU), 7B (no qkv bias, head_dim 128), and
# the odd ones.
FAMILY = {
    "vit": {},
    "vit_gated": {"use_gated_mlp": True, "hidden_act": "silu"},
    "vit_7b": {
        "use_gated_mlp": True,
        "hidden_act": "silu",
        "query_bias": False,
        "value_bias": False,
        "num_attention_heads": 1,
        "hidden_size": 128,
    },
    "key_bias": {"key_bias": True},
    "no_registers_no_biases": {
        "num_register_tokens": 0,
        "query_bias": False,
        "value_bias": False,
        "proj_bias": False,
        "mlp_bias": False,
    },
    "patch_8": {"patch_size": 8, "rope_theta": 50.0, "layer_norm_eps": 1e-6},
}


def config_of(name: str = "vit", **changes) -> DINOv3ViTConfig:
    fields = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_register_tokens": 4,
    }
    return DINOv3ViTConfig(**(fields | FAMILY[name] | changes))


def pair_of(name: str = "vit", seed: int = 0, **changes) -> tuple[DINOv3ViTModel, DINOv3Encoder]:
    """Transformers' model and ours with equal random weights, none at its initial value."""
    config = config_of(name, **changes)
    theirs = DINOv3ViTModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            spread = 1.0 if "token" in key else 0.15
            centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            parameter.normal_(centre, spread, generator=generator)
    ours = DINOv3Encoder(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours
