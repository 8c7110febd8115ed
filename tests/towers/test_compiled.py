"""Accelerated towers under torch.compile: as without it, with graph breaks where stock has them."""

import os
import re

import pytest
import torch

import hrvlm
from benchmarks.towers.tiny import gradients_of, inputs_of, output_of, tower_of
from tests.numerics import relative_error
from tests.towers import whole_towers
from tests.towers.attention_classes import Tower, run

heavy = pytest.mark.skipif(
    "HRVLM_EXPORTS" not in os.environ, reason="run by `make exports`: minutes"
)


def check(tower, inputs, tolerance=1e-6):
    """Compiled, an accelerated tower has the output and the gradients that it has without."""
    hrvlm.accelerate(tower)
    expected, gradients = gradients_of(tower, inputs)
    torch.compiler.reset()
    tower.compile(backend="aot_eager")
    out, mine = gradients_of(tower, inputs)
    assert relative_error(out, expected) <= tolerance
    for name, gradient in gradients.items():
        scale = gradients[re.sub(r"\bk(_proj)?\.bias$", r"k\1.weight", name)].norm()
        assert (mine.pop(name) - gradient).norm() <= tolerance * scale, name
    # Of what is pooled from the output and not looked at, in the same graph.
    assert not any(gradient.any() for gradient in mine.values())


def test_compiled(rope_in_kernels):
    tower = tower_of("qwen3_vl", depth=1, deepstack_visual_indexes=[])
    hrvlm.accelerate(tower)
    compiled = torch.compile(tower, backend="eager")
    for grids in (((1, 4, 6), (1, 8, 2)), ((1, 8, 2), (1, 4, 6))):  # one shape, two layouts
        inputs = inputs_of("qwen3_vl", grids)
        assert relative_error(output_of(compiled, inputs), output_of(tower, inputs)) <= 1e-5


def test_compiled_with_gradients(rope_in_kernels):
    attention = tower_of("kimi_k25", num_hidden_layers=1).layers[0].attn
    tower = Tower(attention, tower_of("kimi_k25").rotary_emb)
    hrvlm.accelerate(tower)
    expected = run(tower, (5, 9))
    tower.compile(backend="aot_eager")
    for part, result in run(tower, (5, 9)).items():
        assert relative_error(result, expected[part]) <= 1e-6, part


@heavy
@pytest.mark.parametrize(("model", "name"), whole_towers.whole_towers())
def test_every_packed_tower(model, name, rope_in_kernels):
    tower = whole_towers.build(model, name)
    check(tower, whole_towers.inputs_of(tower)[0])


@heavy
@pytest.mark.parametrize("name", ["pixtral", "siglip2", "idefics3", "smolvlm"])
def test_every_other_tower(name, rope_in_kernels):
    check(tower_of(name), inputs_of(name))
