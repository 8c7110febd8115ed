"""``hrvlm train --demo``."""

import pytest

from hrvlm.reader.demo import train_demo


@pytest.mark.slow
def test_the_reader_learns_a_new_font(tmp_path):
    result = train_demo(tmp_path / "demo", held_out=32, epochs=1)
    assert result.error_after < result.error_before
    assert "training loss" in (tmp_path / "demo" / "loss.svg").read_text()
    assert (tmp_path / "demo" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="empty"):
        train_demo(tmp_path / "demo")
