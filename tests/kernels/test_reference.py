"""The specification itself, against transformers, explicit loops and torch's attention."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.dinov3_vit import modeling_dinov3_vit as hf

from hrvlm_kernels import PackedGrids, reference


def test_rope_equals_transformers(rng):
    packed = PackedGrids.from_grids([(3, 5)], num_prefix_tokens=5)
    config = hf.DINOv3ViTConfig(hidden_size=128, num_attention_heads=2, num_register_tokens=4)
    rope = hf.DINOv3ViTRopePositionEmbedding(config).eval()
    cos, sin = rope(torch.zeros(1, 3, 48, 80))
    q, k = torch.randn(2, 20, 2, 64, generator=rng).unbind(0)
    expected = hf.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    got = reference.rope_2d(q, k, packed.coords, rope.inv_freq)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


def test_rope_keeps_prefix_tokens_and_upcasts(rng):
    packed = PackedGrids.from_grids([(2, 2)], num_prefix_tokens=3)
    q = torch.randn(7, 1, 8, generator=rng).half()
    inv_freq = torch.tensor([1.0, 0.3])
    for upcast in (None, torch.float32, torch.float64):
        out, _ = reference.rope_2d(q, q, packed.coords, inv_freq, upcast=upcast)
        assert out.dtype == (upcast or torch.float16)
        assert torch.equal(out[:3], q[:3].to(out.dtype))
        assert not torch.equal(out[3:], q[3:].to(out.dtype))


def test_pixel_shuffle_linear_by_explicit_loops(rng):
    grids, s, channels = [(2, 4), (4, 2)], 2, 3
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=2)
    x = torch.randn(packed.total_tokens, channels, generator=rng)
    weight, bias = torch.randn(5, s * s * channels, generator=rng), torch.randn(5, generator=rng)
    rows = []
    for tokens, (hp, wp) in zip(packed.split(x), grids, strict=True):
        image = tokens[2:].view(hp, wp, channels)
        rows += [
            torch.cat([image[i + dy, j + dx] for dy in range(s) for dx in range(s)])
            for i in range(0, hp, s)
            for j in range(0, wp, s)
        ]
    expected = torch.stack(rows)
    assert torch.equal(reference.pixel_shuffle(x, packed, s), expected)
    out = reference.pixel_shuffle_linear(x, packed, s, weight, bias, upcast=torch.float64)
    torch.testing.assert_close(out, expected.double() @ weight.double().T + bias.double())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_varlen_attention_equals_sdpa_image_by_image(kv_heads, rng):
    packed = PackedGrids.from_lengths([3, 0, 7, 1])
    q = torch.randn(11, 4, 8, generator=rng, dtype=torch.float64)
    k, v = torch.randn(2, 11, kv_heads, 8, generator=rng, dtype=torch.float64).unbind(0)
    out, lse = reference.varlen_attention(q, k, v, packed, 0.4)
    start = 0
    for n in packed.lengths:
        q_i, k_i, v_i = (a[start : start + n].transpose(0, 1)[None] for a in (q, k, v))
        expected = F.scaled_dot_product_attention(q_i, k_i, v_i, scale=0.4, enable_gqa=True)
        torch.testing.assert_close(out[start : start + n], expected[0].transpose(0, 1))
        start += n
    assert lse.shape == (4, 11)
    last = (q[-1] * k[-1].repeat_interleave(4 // kv_heads, 0)).sum(-1) * 0.4
    torch.testing.assert_close(lse[:, -1], last)
