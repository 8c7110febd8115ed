"""RoPE left to the kernels: which rotations are found, and what keeps a tower's own."""

import copy
import gc
import inspect
import pickle
from types import MethodType

import pytest
import torch
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

import hrvlm
from benchmarks.towers.tiny import inputs_of as inputs_of_grids
from benchmarks.towers.tiny import output_of, tower_of
from hrvlm.towers import packed_attention, rotation
from hrvlm.towers.rotation import Rotation, rotation_names
from hrvlm.towers.swapping import swapped_class
from hrvlm_kernels.triton_kernels import attention_tiles, rope_2d
from tests.numerics import relative_error
from tests.towers.attention_classes import Tower, build_tower, run

IN_KERNELS = "RoPE in the kernels"
GRIDS = ((1, 2, 4), (1, 4, 2))


@pytest.fixture
def ropes(monkeypatch, rope_in_kernels):
    """For each attention that runs, whether it was given a rope."""
    given = []
    stock = packed_attention.varlen_attention

    def varlen_attention(*args, rope=None, **options):
        given.append(rope is not None)
        return stock(*args, rope=rope, **options)

    monkeypatch.setattr(packed_attention, "varlen_attention", varlen_attention)
    return given


def qwen():
    return tower_of("qwen2_5_vl", depth=2, fullatt_block_indexes=[1])


def check(tower, expected, ropes, *, folded):
    """The tower's output is `expected`, RoPE in the kernels or not."""
    ropes.clear()
    with torch.no_grad():
        out = output_of(tower, inputs_of_grids("qwen2_5_vl", GRIDS))
    assert relative_error(out, expected) <= 1e-6
    assert ropes and all(rope == folded for rope in ropes)


def expected_of(tower):
    with torch.no_grad():
        return output_of(tower, inputs_of_grids("qwen2_5_vl", GRIDS))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("qwen2_5_vl", ((0, 1), (20, 1), (40, 1), (60, 1))),
        ("pixtral", ((0, 1), (16, 1), (32, 1), (48, 1))),
        ("kimi_k25", ((1, 2), (0, 2), (37, 2), (36, 2))),  # (x, y) in turn
    ],
)
def test_rotations_are_found(name, parts):
    tower = tower_of(name)
    assert [part.rope for part in hrvlm.accelerate(tower).swapped] == [IN_KERNELS]
    found = {vars(m)["hrvlm_rotation"] for m in tower.modules() if "hrvlm_rotation" in vars(m)}
    assert found == {Rotation(parts[1][0] if name != "kimi_k25" else 18, *parts)}


def test_pixtral_scales_x():
    tower = tower_of("pixtral")
    hrvlm.accelerate(tower)
    rotary = tower.patch_positional_embedding
    theta, head_dim = tower.config.rope_parameters["rope_theta"], 64
    coords, _ = rotary.hrvlm_rotation.rope(torch.tensor([[3, 3]]), rotary.inv_freq)
    assert (coords[0, 1] / coords[0, 0]).item() == pytest.approx(theta ** (-2 / head_dim))


def test_positions_come_back_as_they_were():
    rotation = Rotation(2, (0, 1), (2, 1), (4, 1), (6, 1))
    positions = torch.arange(13)[:, None].expand(-1, 2)
    coords, _ = rotation.rope(positions, torch.tensor([1.0, 0.1]))
    assert torch.equal(coords * torch.tensor(6.2831854820251465), positions.float())


def test_the_source_of_a_swapped_class_is_that_of_its_own():
    """Python 3.13 finds it by the line that a class keeps, others by its name."""
    swapped = swapped_class(DINOv3ViTModel, lambda cls: {"forward": cls.forward})
    assert swapped is not DINOv3ViTModel
    assert inspect.getsource(swapped) == inspect.getsource(DINOv3ViTModel)


def test_parts_restored_replaced_and_copied(ropes):
    tower = qwen()
    expected = expected_of(tower)
    hrvlm.accelerate(tower)
    check(tower, expected, ropes, folded=True)
    for twin in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert set(twin.rotary_pos_emb.hrvlm_readers) <= set(twin.modules())
        check(twin, expected, ropes, folded=True)
    hrvlm.restore(tower.blocks[0])
    check(tower, expected, ropes, folded=False)
    report = hrvlm.accelerate(tower.blocks)
    assert report.swapped[0].rope.endswith("outside of the model") and len(report.swapped) == 2
    check(tower, expected, ropes, folded=False)
    hrvlm.accelerate(tower)
    attention = tower.blocks[1].attn
    attention.forward = MethodType(attention.hrvlm_stock.forward, attention)
    check(tower, expected, ropes, folded=False)
    del attention.forward
    check(tower, expected, ropes, folded=True)


def test_half_a_tower_refused(ropes):
    tower = qwen()
    expected = expected_of(tower)
    attention = tower.blocks[0].attn
    attention.forward = MethodType(type(attention).forward, attention)
    (part,) = hrvlm.accelerate(tower).swapped
    assert part.rope == "its own RoPE since Qwen2_5_VLVisionAttention reads the tables, too"
    check(tower, expected, ropes, folded=False)


def test_tables_shared_by_towers(ropes):
    towers = nn.ModuleList([qwen(), qwen()])
    expected = expected_of(towers[0])
    towers[1].rotary_pos_emb = towers[0].rotary_pos_emb
    (part,) = hrvlm.accelerate(towers).swapped
    assert part.rope.endswith("is part of more than one module")
    check(towers[0], expected, ropes, folded=False)


def test_frequencies_are_those_of_the_moment(ropes):
    tower = qwen()
    hrvlm.accelerate(tower)
    before = expected_of(tower)
    tower.rotary_pos_emb.inv_freq *= 0.5
    out = expected_of(tower)
    assert all(ropes) and relative_error(out, before) > 1e-3
    assert relative_error(out, expected_of(hrvlm.restore(tower))) <= 1e-6


def test_options_of_the_tables_that_change(ropes):
    tower = qwen()
    hrvlm.accelerate(tower)
    tower.rotary_pos_emb.attention_scaling = 1.5
    out = expected_of(tower)
    assert not any(ropes)
    assert torch.equal(out, expected_of(hrvlm.restore(tower)))


@pytest.fixture
def tables_written(monkeypatch):
    """Shape of each table of cos and sin that a launch writes from here on."""
    written, stock = [], rope_2d.write_table

    def write_table(coords, inv_freq, table):
        written.append(tuple(table.shape))
        return stock(coords, inv_freq, table)

    for module in (rope_2d, attention_tiles):  # of a model's layers, of an attention by itself
        monkeypatch.setattr(module, "write_table", write_table)
    return written


@pytest.mark.parametrize("name", ["glm_ocr", "qwen2_vl"])
def test_the_kernels_table_is_written_once_for_all_layers(name, tables_written):
    tower, inputs = tower_of(name).half(), inputs_of_grids(name, GRIDS)
    half = {key: a.half() if a.is_floating_point() else a for key, a in inputs.items()}
    with torch.no_grad():
        expected = output_of(tower, half)
        assert len(hrvlm.accelerate(tower, backend="triton").swapped[0].names) == 2
        for _ in range(2):
            assert relative_error(output_of(tower, half), expected) <= 5e-3
    assert tables_written == 2 * [(16, 64)]
    gc.collect()
    assert not len(rotation._written)


def test_the_kernels_table_of_a_dinov3(tables_written):
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 32}
    model = DINOv3ViTModel(DINOv3ViTConfig(**sizes, num_hidden_layers=2)).half().eval()
    pixels = torch.randn(1, 3, 32, 48).half()
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        hrvlm.accelerate(model, backend="triton")
        assert relative_error(model(pixels).last_hidden_state, expected) <= 5e-3
    assert tables_written == [(7, 64)]


def test_on_meta_it_stays_as_it_is():
    tower = qwen().to("meta")
    (part,) = hrvlm.accelerate(tower).swapped
    assert part.rope == "its own RoPE since nothing can be tried on the meta device"
    tower = qwen()
    for place in ("cpu", "meta"):
        (part,) = hrvlm.accelerate(tower.to(place)).swapped
        assert part.rope == IN_KERNELS
    (part,) = hrvlm.accelerate(hrvlm.restore(tower)).swapped
    assert part.rope != IN_KERNELS


def test_adapters_with_dropout_are_tried_and_random_numbers_left_alone():
    peft = pytest.importorskip("peft")
    options = {"r": 2, "lora_dropout": 0.5, "init_lora_weights": False}
    model = peft.get_peft_model(qwen(), peft.LoraConfig(target_modules=["qkv"], **options)).train()
    state = torch.get_rng_state()
    (part,) = hrvlm.accelerate(model).swapped
    assert part.rope == IN_KERNELS
    assert torch.equal(torch.get_rng_state(), state)


def test_projections_of_a_class_of_their_own(ropes):
    class Linear(nn.Module):
        def __init__(self, stock):
            super().__init__()
            self.matrix, self.shift = stock.weight, stock.bias

        def forward(self, x):
            return nn.functional.linear(x, self.matrix, self.shift)

    tower = qwen()
    expected = expected_of(tower)
    for block in tower.blocks:
        block.attn.qkv = Linear(block.attn.qkv)
    hrvlm.accelerate(tower)
    check(tower, expected, ropes, folded=True)


class Deaf(nn.Module):
    """A tower whose forward does more with its tables."""

    def __init__(self, tower):
        super().__init__()
        self.attention, self.rotary, self.config = tower.attention, tower.rotary, tower.config

    def forward(self, hidden_states, position_ids, **kwargs):
        cos, sin = self.rotary(hidden_states, position_ids)
        tables = (cos, -sin)
        return self.attention(hidden_states, position_embeddings=tables, **kwargs)


def test_tables_that_a_tower_changes():
    (part,) = hrvlm.accelerate(Deaf(build_tower("qwen3_vl", "Qwen3VLVisionAttention"))).swapped
    assert part.rope == "its own RoPE since Deaf does more with the tables than to hand them on"


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary(q, k, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class Plain(nn.Module):
    """An attention of the contract, whose methods the others below change."""

    def __init__(self, stock):
        super().__init__()
        self.qkv, self.proj, self.config = stock.qkv, stock.proj, stock.config
        self.head_dim, self.scaling, self.is_causal = stock.head_dim, stock.scaling, False

    def turned(self, q, k, cos, sin):
        return q, k

    def options(self, kwargs):
        return kwargs

    def forward(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
        kwargs.pop("attention_mask", None)
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        cos, sin = position_embeddings
        q, k = apply_rotary(q, k, cos, sin)
        q, k = self.turned(q, k, cos, sin)
        q, k, v = (a.transpose(0, 1)[None] for a in (q, k, v))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        lengths = cu_seqlens.diff().tolist()
        kwargs = self.options(kwargs)
        if is_flash_attention_requested(self.config):
            out, _ = attention(
                self, q, k, v, None, scaling=self.scaling, cu_seq_lens_q=cu_seqlens, **kwargs
            )
        else:
            parts = zip(*(a.split(lengths, dim=2) for a in (q, k, v)), strict=True)
            out = [attention(self, *each, None, scaling=self.scaling)[0] for each in parts]
            out = torch.cat(out, dim=1)
        return self.proj(out.reshape(len(hidden_states), -1))


class Shifted(Plain):
    """q is shifted after it is rotated."""

    def turned(self, q, k, cos, sin):
        return q + 1, k


class Normed(Plain):
    """q and k are multiplied by a weight for each channel after they are rotated."""

    def turned(self, q, k, cos, sin):
        weight = torch.linspace(0.5, 2, q.shape[-1]).to(q)
        return q * weight, k * weight


class Silent(Plain):
    """Does not hand on its keywords."""

    def options(self, kwargs):
        return {}


class Narrow(Plain):
    """Reads cos as a table, whatever it is."""

    def turned(self, q, k, cos, sin):
        return q + 0 * cos[:, None], k


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Plain, None),
        (Shifted, "what it does to q and k is not a rotation of pairs by y and x alone"),
        (Normed, "what it does to q and k is not a rotation of pairs by y and x alone"),
        (Silent, "it does not hand on what it is given to its attention function"),
        (Narrow, "its rotation could not be tried: RuntimeError: The size of tensor a (32) must"),
    ],
)
def test_attention_that_is_not_what_it_seems(cls, reason, ropes):
    stock = build_tower("qwen3_vl", "Qwen3VLVisionAttention")
    tower = Tower(cls(stock.attention), stock.rotary)
    assert rotation_names(cls) == ["apply_rotary"]
    expected = run(tower, (5, 1, 9))
    (part,) = hrvlm.accelerate(tower).swapped
    assert part.rope.startswith(f"its own RoPE since {reason}" if reason else IN_KERNELS)
    for name, result in run(tower, (5, 1, 9)).items():
        assert relative_error(result, expected[name]) <= 1e-6, name
    assert ropes == [reason is None]


def test_attention_that_does_not_say_that_it_is_causal():
    stock = build_tower("qwen3_vl", "Qwen3VLVisionAttention")
    tower = Tower(Plain(stock.attention), stock.rotary)
    del tower.attention.is_causal  # then it is, to transformers
    hrvlm.accelerate(tower)
    with pytest.raises(ValueError, match="is_causal"):
        run(tower, (5, 1, 9))
