"""Shared by all tests: Triton's interpreter where there is no GPU, and a generator."""

import gc
import os

import torch

# Triton reads the variable when a kernel's module is first imported, so it has to be set before any
# test module is. With 0, this process is one of those that own_process.py starts, or the kernels'
# tests run compiled, for the chip that KERNELS_ON names: see kernels/conftest.py.
if os.environ.get("KERNELS_ON"):
    os.environ["TRITON_INTERPRET"] = "0"
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from tests.interpreter import sum_products_in_float64
from tests.own_process import OwnProcessFile

# Folders of tests that run compiled kernels on ptx_machine or start Ray, a process for each file.
OWN_PROCESS = ("compiled", "pretended_gpu", "on_ray")
COMPILED = os.environ.get("TRITON_INTERPRET") == "0"

# Property tests try new examples on every run at a desk, and the same ones in CI.
if os.environ.get("CI"):
    from hypothesis import settings

    settings.register_profile("ci", derandomize=True)
    settings.load_profile("ci")


if os.environ.get("TRITON_INTERPRET") == "1":
    sum_products_in_float64()


def pytest_pycollect_makemodule(module_path, parent):
    """Don't import here what needs Triton without its interpreter."""
    if module_path.parent.name in OWN_PROCESS and not COMPILED:
        return OwnProcessFile.from_parent(parent, path=module_path)
    return None


def pytest_collection_finish():
    """Leave what is imported by now out of every later collection: a third of a second each."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Skip the tests marked gpu where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def rng():
    """A generator of its own for each test."""
    return torch.Generator().manual_seed(1234)


@pytest.fixture
def mesh_of_one(tmp_path):
    """A process group of this process alone, as a mesh."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()
