"""What the tests of towers share."""

import pytest

from hrvlm.towers import folding


@pytest.fixture
def rope_in_kernels(monkeypatch):
    """What would be left to a GPU's kernels is left to rope_2d, which runs on a CPU, too."""
    monkeypatch.setattr(folding, "choose_backend", lambda *args: "triton")
