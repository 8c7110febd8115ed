"""State dicts of checkpoints as other projects write them, and Meta's forward on its own."""

import math

import torch
import torch.nn.functional as F

from tests.encoder.encoders import pair_of


def canonical_of(name="vit", **changes):
    """Config, and random weights under the keys of transformers' files."""
    theirs, _ = pair_of(name, **changes)
    tensors = {key.removeprefix("model."): value for key, value in theirs.state_dict().items()}
    return theirs.config, tensors


def meta_state(config, seed=0, *, mask="nan", k_bias=0.0):
    """A state dict as Meta's DinoVisionTransformer has it, written from its source."""
    rng = torch.Generator().manual_seed(seed)
    size, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers

    def random(*shape):
        return torch.randn(*shape, generator=rng) * 0.15

    state = {"cls_token": random(1, 1, size), "mask_token": random(1, size)}
    if config.num_register_tokens:
        state["storage_tokens"] = random(1, config.num_register_tokens, size)
    p = config.patch_size
    state |= {"patch_embed.proj.weight": random(size, 3, p, p)}
    state |= {"patch_embed.proj.bias": random(size), "norm.weight": 1 + random(size)}
    state |= {"norm.bias": random(size)}
    count = size // config.num_attention_heads // 4
    periods = config.rope_theta ** (torch.arange(count) / count)
    state["rope_embed.periods"] = periods.bfloat16().float()
    mlp = {"fc1": (inner, size), "fc2": (size, inner)}
    if config.use_gated_mlp:
        mlp = {"w1": (inner, size), "w2": (inner, size), "w3": (size, inner)}
    for i in range(layers):
        block = {f"norm{n}.weight": 1 + random(size) for n in (1, 2)}
        block |= {f"norm{n}.bias": random(size) for n in (1, 2)}
        block |= {f"ls{n}.gamma": random(size) for n in (1, 2)}
        block |= {"attn.qkv.weight": random(3 * size, size), "attn.proj.weight": random(size, size)}
        if config.query_bias:
            middle = torch.full((size,), k_bias)
            block["attn.qkv.bias"] = torch.cat([random(size), middle, random(size)])
            ones = torch.full((size,), math.nan if mask == "nan" else 1.0)
            if mask is not None:
                block["attn.qkv.bias_mask"] = torch.cat([ones, ones * 0, ones])
        if config.proj_bias:
            block["attn.proj.bias"] = random(size)
        for key, shape in mlp.items():
            block[f"mlp.{key}.weight"] = random(*shape)
            if config.mlp_bias:
                block[f"mlp.{key}.bias"] = random(shape[0])
        state |= {f"blocks.{i}.{key}": value for key, value in block.items()}
    return state


def meta_features(state, config, x):
    """Forward of Meta's model (models/vision_transformer.py, layers/attention.py), k unbiased."""
    size, heads, p = config.hidden_size, config.num_attention_heads, config.patch_size
    eps = config.layer_norm_eps

    def norm(x, name):
        return F.layer_norm(x, (size,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=p)
    batch, _, hp, wp = x.shape
    prefix = [
        state[key].expand(batch, -1, -1) for key in ("cls_token", "storage_tokens") if key in state
    ]
    x = torch.cat([*prefix, x.flatten(2).mT], dim=1)
    first = x.shape[1] - hp * wp
    y, z = ((torch.arange(n) + 0.5) / n * 2 - 1 for n in (hp, wp))
    coords = torch.stack(torch.meshgrid(y, z, indexing="ij"), -1).flatten(0, 1)
    count = size // heads // 4
    periods = config.rope_theta ** (torch.arange(count) / count)
    angles = (2 * math.pi * coords[:, :, None] / periods).flatten(1).tile(2)

    def rotate(a):
        low, high = a[:, :, first:].chunk(2, dim=-1)
        turned = a[:, :, first:] * angles.cos() + torch.cat([-high, low], -1) * angles.sin()
        return torch.cat([a[:, :, :first], turned], dim=2)

    for i in range(config.num_hidden_layers):
        b = f"blocks.{i}."
        bias = state.get(f"{b}attn.qkv.bias")
        if bias is not None:
            bias = bias.clone()
            bias[size : 2 * size] = 0
        qkv = F.linear(norm(x, f"{b}norm1"), state[f"{b}attn.qkv.weight"], bias)
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = rotate(q) @ rotate(k).mT / (size // heads) ** 0.5
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + state[f"{b}ls1.gamma"] * linear(out, f"{b}attn.proj")
        h = norm(x, f"{b}norm2")
        if config.use_gated_mlp:
            h = linear(F.silu(linear(h, f"{b}mlp.w1")) * linear(h, f"{b}mlp.w2"), f"{b}mlp.w3")
        else:
            h = linear(F.gelu(linear(h, f"{b}mlp.fc1")), f"{b}mlp.fc2")
        x = x + state[f"{b}ls2.gamma"] * h
    return norm(x, "norm")


def assert_same(a, b, *, but=()):
    assert set(a) - set(but) == set(b) - set(but)
    for key in set(a) - set(but):
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def periods_of(theta, count=8):
    return {"rope_embed.periods": theta ** (torch.arange(count) / count)}
