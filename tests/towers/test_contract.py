"""Every vision attention of the installed transformers: as stock, once swapped, or refused."""

import copy

import pytest
import torch

import hrvlm
from hrvlm.towers.packed_attention import obstacle
from tests.numerics import relative_error
from tests.towers.attention_classes import (
    IN_KERNELS,
    attention_classes,
    build,
    build_tower,
    check_kernels,
    classes_with_tables,
    inputs,
    number_of_towers,
    other_vision_classes,
    run,
)

LENGTHS = (7, 1, 24, 24, 5)


@pytest.mark.parametrize(("model", "name"), attention_classes())
def test_forward_and_gradients_equal_stock(model, name):
    module = build(model, name)
    swapped = copy.deepcopy(module)
    report = hrvlm.accelerate(swapped)
    assert [part.cls for part in report.swapped] == [name] and not report.left_alone
    given = inputs(module, LENGTHS)
    assert type(swapped(**given)) is type(module(**given))
    mine, stock = run(swapped, LENGTHS), run(module, LENGTHS)
    assert mine.keys() == stock.keys()
    for part, result in mine.items():
        assert relative_error(result, stock[part]) <= 1e-6, part
    assert type(hrvlm.restore(swapped)) is type(module)


@pytest.mark.parametrize(("model", "name"), classes_with_tables())
def test_rotation_folded_equals_stock(model, name, rope_in_kernels):
    tower = build_tower(model, name)
    swapped = copy.deepcopy(tower)
    (part,) = hrvlm.accelerate(swapped).swapped
    if name == "MiniMaxM3VLVisionAttention":
        assert part.rope == "its own RoPE since it turns some of a head's channels only"
    else:
        assert part.rope == "RoPE in the kernels"
        tables = swapped.rotary(torch.zeros(1), torch.zeros(3, 2, dtype=torch.int64))
        assert [table.dtype for table in tables] == [torch.int32] * 2
    mine, stock = run(swapped, LENGTHS), run(tower, LENGTHS)
    for part, result in mine.items():
        assert relative_error(result, stock[part]) <= 1e-6, part
    assert not any("hrvlm" in name for m in hrvlm.restore(swapped).modules() for name in vars(m))


@pytest.mark.parametrize(("model", "name"), IN_KERNELS)
def test_by_the_kernels(model, name):
    check_kernels(model, name, IN_KERNELS[model, name], (2, 17))


def test_the_table_is_whole():
    """24 vision classes and three for audio in transformers 5.17, 20 rotating; more since."""
    classes = attention_classes()
    assert len(classes_with_tables()) >= 20
    assert len([name for _, name in classes if "Audio" not in name]) >= number_of_towers()
    assert set(classes) >= IN_KERNELS.keys() and len(IN_KERNELS) >= 10
    assert {64, 72, 80, 128} <= set(IN_KERNELS.values())
    others = list(other_vision_classes())
    assert len(others) >= 30
    for name, cls in others:
        assert obstacle(cls) == "its forward takes no cu_seqlens", name
