"""A run whose disk gets full."""

import pytest

from hrvlm.training.run import last_checkpoint, train
from tests.disks import small_files
from tests.training import runs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return runs.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return {"kind": "jsonl", "path": str(runs.save_rows(tmp_path_factory.mktemp("rows")))}


def test_a_run_that_can_not_begin_leaves_nothing(model, rows, tmp_path):
    out = tmp_path / "new" / "run"
    with small_files(tmp_path, 0), pytest.raises(OSError, match="File too large"):
        train(runs.config_of(out, model, rows))
    assert not out.parent.exists()


@pytest.mark.parametrize("share", [0.5, 1.3], ids=["weights", "optimizer"])
def test_a_checkpoint_that_does_not_fit_is_removed(share, model, rows, tmp_path):
    """The optimizer has twice the bytes of the weights."""
    size = int((model / "model.safetensors").stat().st_size * share)
    config = runs.config_of(tmp_path, model, rows, max_steps=3)
    with small_files(tmp_path, size), pytest.raises(OSError):
        train(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.yaml"]
    assert train(config, resume=True).steps == 3
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
