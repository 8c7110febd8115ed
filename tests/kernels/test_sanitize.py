"""What `make sanitize` runs: it must run at all, and say what it misses."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.kernels import sanitize
from tests.kernels.helpers import interpreter_only

ROOT = Path(__file__).parents[2]


@interpreter_only
@pytest.mark.parametrize("op", sanitize.OPS[1:])
def test_the_small_shapes_run(op):
    op("cpu", torch.float32)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is not None, reason="it is here")
def test_a_missing_tool_is_named():
    done = subprocess.run(["make", "sanitize"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "compute-sanitizer is not found" in done.stderr


@pytest.mark.gpu
def test_everything_runs():
    assert sanitize.main() == 0
