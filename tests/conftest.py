"""Shared by all tests: Triton's interpreter where there is no GPU, and a generator."""

import os

import torch

# Triton reads the variable when a kernel's module is first imported, so it has to be set before any
# test module is.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

# Property tests try new examples on every run at a desk, and the same ones in CI.
if os.environ.get("CI"):
    from hypothesis import settings

    settings.register_profile("ci", derandomize=True)
    settings.load_profile("ci")


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
