"""``hrvlm convert``."""

import json

import pytest
from safetensors import safe_open

from tests.commands.helpers import error_of, run


def test_convert_says_what_it_found(model, tmp_path):
    out = tmp_path / "converted"
    result = run("convert", model, out, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    with safe_open(model / "model.safetensors", framework="pt") as stored:
        count = len(stored.keys())
    assert "transformers layout" in result.stdout and f"wrote {count} tensors" in result.stdout
    assert "hidden_size 64, 3 layers" in result.stdout
    assert "--overwrite replaces it" in error_of(run("convert", model, out))
    document = json.loads(run("convert", model, out, "--overwrite", "--json").stdout)
    assert document["layout"] == "transformers" and document["tensors"] == count
    assert document["config"]["num_attention_heads"] == 2
    assert "dtype must be one of" in error_of(run("convert", model, out, "--dtype", "int4"))


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("convert", "/nowhere", "out"), "/nowhere: no such file or directory"),
        (("convert", "/nowhere.pth", "out"), "/nowhere.pth: no such file or directory"),
        (("export", "/nowhere", "out.onnx"), "model '/nowhere': no such directory"),
        (("export", "/nowhere.pth", "out.onnx"), "/nowhere.pth: no such file or directory"),
        (("merge", "/nowhere", "out"), "/nowhere: no such directory"),
    ],
)
def test_a_source_that_is_not_there_is_said_not_to_be(command, expected):
    assert expected in error_of(run(*command))
