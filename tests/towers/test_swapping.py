"""Classes of accelerated modules: what they make is stock, and so is what is exported."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import DINOv3ViTModel

import hrvlm
from benchmarks.towers.tiny import TOWERS, inputs_of, output_of, tower_of
from hrvlm.towers.swapping import stock_class
from tests.encoder.encoders import config_of
from tests.numerics import relative_error
from tests.towers import whole_towers

MASKED = ["siglip2", "idefics3", "smolvlm"]


def dinov3():
    return DINOv3ViTModel(config_of()).eval(), {"pixel_values": torch.randn(2, 3, 32, 48)}


def packed(model, name):
    tower = whole_towers.build(model, name)
    return tower, whole_towers.inputs_of(tower)[0]


BUILT = {"dinov3": dinov3}
BUILT |= {name: lambda name=name: (tower_of(name), inputs_of(name)) for name in TOWERS}
BUILT |= {name: partial(packed, *name) for name in whole_towers.whole_towers()}


@pytest.mark.parametrize("built", BUILT.values(), ids=map(str, BUILT))
@torch.no_grad()
def test_the_class_of_an_accelerated_tower_makes_stock_ones(built, tmp_path):
    tower, inputs = built()
    expected, stock = output_of(tower, inputs), type(tower)
    hrvlm.accelerate(tower)
    tower.save_pretrained(tmp_path)
    loaded = type(tower).from_pretrained(tmp_path).eval()
    made = type(tower)(copy.deepcopy(tower.config)).eval()
    made.load_state_dict(tower.state_dict())
    for twin in (loaded, made):
        assert type(twin) is stock and not any(map(stock_class, twin.modules()))
        assert torch.equal(output_of(twin, inputs), expected)
        hrvlm.accelerate(twin)
        assert type(twin) is type(tower)
        assert relative_error(output_of(twin, inputs), expected) <= 1e-6


@pytest.mark.parametrize("name", ["dinov3", "qwen2_5_vl", "siglip2"])
def test_parts_that_are_made_of_their_class_are_stock(name):
    tower, _ = BUILT[name]()
    hrvlm.accelerate(tower)
    attention = next(m for m in tower.modules() if type(m).__name__.endswith("Attention"))
    made = type(attention)(tower.config)
    hrvlm.restore(tower)
    assert type(made) is type(attention) and not stock_class(made)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "pixtral", *MASKED])
@torch.no_grad()
def test_a_tower_is_restored_from_under_fully_shard(name, mesh_of_one):
    """Which gives modules classes made of the swapped ones."""
    tower, inputs = tower_of(name), inputs_of(name)
    expected = output_of(tower, inputs)
    hrvlm.accelerate(tower)
    for layers in [m for m in tower.modules() if isinstance(m, nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, mesh=mesh_of_one)
    fully_shard(tower, mesh=mesh_of_one)
    sharded = type(tower)
    for _ in range(2):
        assert relative_error(output_of(tower, inputs), expected) <= 1e-5
        hrvlm.accelerate(tower)
        assert type(tower) is sharded
    hrvlm.restore(tower)
    assert isinstance(tower, FSDPModule) and not any(map(stock_class, tower.modules()))
    assert type(tower).__name__ == sharded.__name__
    assert torch.equal(output_of(tower, inputs), expected)


@pytest.mark.parametrize("name", MASKED)
@torch.no_grad()
def test_what_is_exported_is_stock_and_takes_other_masks(name):
    tower, inputs = tower_of(name), inputs_of(name)
    (mask,) = [name for name in inputs if name.endswith("mask")]
    fewer = inputs | {mask: inputs[mask].clone()}
    fewer[mask][0, 0] = 0
    expected = [output_of(tower, each) for each in (inputs, fewer)]
    hrvlm.accelerate(tower)
    program = torch.export.export(tower, (), inputs).module()
    for each, out in zip((inputs, fewer), expected, strict=True):
        assert relative_error(output_of(lambda **given: program(**given), each), out) <= 1e-6
