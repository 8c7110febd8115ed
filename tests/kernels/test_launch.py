"""Which tile sizes a launch uses, and what happens when a chip is too small for them."""

import os

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

from benchmarks.compiled.compiler import TARGETS
from hrvlm_kernels.triton_kernels import (
    launch,
    pixel_shuffle_linear,
    tile_tables,
)


@pytest.fixture
def small_chip(monkeypatch):
    """A launch function for a chip that only takes the tile sizes called "small"."""
    monkeypatch.setattr(launch, "_refused", set())
    tried = []

    def start(config):
        tried.append(config)
        if config != "small":
            raise OutOfResources(120_000, 99_000, "shared memory")

    return start, tried


def test_the_next_smaller_tiles_with_one_warning(small_chip):
    start, tried = small_chip
    with pytest.warns(UserWarning, match=r"kernel x: large does not fit .*; using small") as caught:
        launch.launch("kernel x", ("large", "small"), start)
        launch.launch("kernel x", ("large", "small"), start)
    assert len(caught) == 1
    assert tried == ["large", "small", "small"]  # what was refused once is not tried again
    with pytest.warns(UserWarning):
        launch.launch("kernel y", ("large", "small"), start)
    assert tried[3:] == ["large", "small"]


def test_nothing_smaller_raises(small_chip):
    start, tried = small_chip
    with pytest.raises(OutOfResources):
        launch.launch("kernel x", ("large",), start)
    with pytest.raises(OutOfResources), pytest.warns(UserWarning):
        launch.launch("kernel x", ("large", "medium", "small"), start)
    assert tried == ["large", "large", "medium"]


@pytest.mark.parametrize(
    ("capability", "row"),
    {
        (8, 0): "sm_80",
        (8, 9): "sm_80",
        (9, 0): "sm_90",
        (10, 0): "sm_100",
        (12, 0): "sm_80",
    }.items(),
)
def test_every_chip_has_a_row(capability, row, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert launch.architecture.__wrapped__(torch.device("cuda", 0)) == row
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert launch.architecture.__wrapped__(torch.device("cuda", 0)) == "gfx942"
    assert launch.architecture(torch.device("cpu")) == (
        os.environ.get("KERNELS_ON") or "interpreter"
    )


def test_tiles_that_this_triton_spills_are_left_out(monkeypatch):
    row = ("FORWARD", "sm_90", 64, 2)
    first, second = launch.tile_choices(*row)
    monkeypatch.setattr(tile_tables, "SPILLS", {(3, 6): {}, (3, 8): {row: (first,)}})
    both = {(3, 5), (3, 6), (3, 7)}
    for release in both | {(3, 8), (3, 9), (4, 0)}:
        monkeypatch.setattr(launch, "triton_release", lambda release=release: release)
        assert launch.tile_choices(*row) == ((first, second) if release in both else (second,))
    assert launch.tile_choices("SHORT", "sm_80", 128, 2) == ()  # no row


def test_the_release_is_that_of_triton():
    assert "{}.{}.".format(*launch.triton_release()) == triton.__version__[:4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_smaller_tiles_come_second(dtype):
    for target in TARGETS:
        configs = pixel_shuffle_linear.select_configs(target, dtype)
        sizes = [(c.block_m + c.block_n) * c.block_k * c.num_stages for c in configs]
        assert sizes == sorted(sizes, reverse=True)
