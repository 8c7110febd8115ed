"""``hrvlm convert``."""

import json

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
