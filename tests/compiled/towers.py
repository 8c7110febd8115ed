"""Attention of transformers' vision towers, accelerated, on compiled kernels."""

from collections.abc import Iterator
from functools import partial

from tests.compiled.cases import Case
from tests.towers.attention_classes import IN_KERNELS, check_kernels

LENGTHS = (20, 1, 33)


def tower_cases() -> Iterator[Case]:
    for (model, name), head_dim in IN_KERNELS.items():
        run = partial(check_kernels, model, name, head_dim, LENGTHS)
        yield Case("towers", "fp32", f"{name}, D={head_dim}", run)
