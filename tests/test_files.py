"""Files are written whole or not at all."""

import pytest

from hrvlm.files import replacing, write_text


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half\udc80")
    with pytest.raises(KeyError), replacing(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "before"
    assert [*path.parent.iterdir()] == [path]
