"""What several files of this folder ask for."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """As in the forked processes, whose sums have to be the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
