"""What takes something from outside, on inputs that nobody would write: see benchmarks/hardening.

FUZZ_SECONDS are the CPU seconds of each target (14 of them); `make fuzz` does a million cases.
"""

import io
import json
import os
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.hardening import embed_inputs, fuzz
from benchmarks.hardening.fuzz import case, run_cases
from benchmarks.hardening.targets import TARGETS, Target, attempt
from hrvlm.checkpoints.convert import from_transformers, infer_config, to_transformers
from hrvlm.data.config import data_config
from hrvlm.data.rows import plain_row
from hrvlm.data.sources import JsonLines
from hrvlm.embed.rows import parquet_bytes
from hrvlm.embed.store import LISTING, MANIFEST
from hrvlm.training.config import TrainingConfig
from hrvlm.vlm.placeholders import as_grids, count_tokens
from hrvlm_kernels import PackedGrids
from tests.tiny import processor_of

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0.3"))


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus(name):
    outcomes = {attempt(TARGETS[name], value) for value in TARGETS[name].seeds()}
    assert "taken" in outcomes


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(draw=st.randoms(use_true_random=False))
def test_hypothesis_finds_nothing(name, draw):
    attempt(TARGETS[name], TARGETS[name].draw(draw))


@pytest.mark.parametrize("name", TARGETS)
def test_random_cases_find_nothing(name):
    seed = 0 if os.environ.get("CI") else random.randrange(1 << 30)
    result = run_cases(name, seed, range(1 << 30), SECONDS)
    assert not result["finds"], f"--target {name} --seed {seed}: {result['finds']}"
    assert result["cases"] > 5


def test_a_recorded_run_says_what_it_is_of_and_takes_more_targets(tmp_path, monkeypatch):
    out = tmp_path / "fuzz.json"
    for target in ("geometry", "rows"):
        words = ["fuzz", "--cases", "400", "--target", target, "--out", str(out)]
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit, match="0"):
            fuzz.main()
    run = json.loads(out.read_text())
    assert run["cases"] == sum(target["cases"] for target in run["targets"].values()) > 100
    assert run["made_by"].keys() == run["targets"].keys() == {"geometry", "rows"}
    for told in run["made_by"].values():
        assert told["torch"] == torch.__version__.split("+")[0] and told["commit"] and told["date"]


def test_a_find_is_told_and_can_be_made_again():
    assert repr(case("rows", 3, 5)) == repr(case("rows", 3, 5)) != repr(case("rows", 3, 6))
    broken = {"height": 640, "width": 960, "max_img_size": 960, "allow_upscale": None}
    with pytest.raises(AssertionError):
        attempt(TARGETS["rows"].__class__(None, _wrong, (ValueError,), 1, list), broken)


def test_a_case_that_takes_too_much_is_a_find(monkeypatch):
    def hungry(value):
        bytearray(2 * fuzz.MEMORY) if value else [None for _ in iter(int, 1)]

    taking = Target(lambda draw: draw.random() < 0.5, hungry, (ValueError,), 1, list)
    monkeypatch.setitem(fuzz.TARGETS, "rows", taking)
    monkeypatch.setattr(fuzz, "SECONDS", 0.02)
    errors = {find["error"] for find in run_cases("rows", 0, range(6))["finds"]}
    assert errors == {"MemoryError: ", "TooSlow: over 0.02 CPU seconds"}


def _wrong(value):
    assert value["allow_upscale"] is not None


def _training(model):
    sections = {"data": {"train": {"kind": "jsonl", "path": "d"}}, "training": {"output_dir": "o"}}
    return TrainingConfig.from_dict({"model": {"path": "m"} | model} | sections)


CHAT = [{"role": "user", "content": "Hi"}]

STATE = TARGETS["keys"].seeds()[0]
META = from_transformers(STATE, "meta", infer_config(STATE, num_attention_heads=1))


def _folder(change):
    """A folder of results, read after a change of its manifest or, an Arrow table, its listing."""
    files = dict(embed_inputs.folder())
    manifest = json.loads(files[MANIFEST])
    listing = pq.read_table(io.BytesIO(files[LISTING]))
    manifest, changed = change(manifest, listing)
    kept = changed.replace_schema_metadata(listing.schema.metadata)
    embed_inputs.try_folder(
        files | {MANIFEST: json.dumps(manifest).encode(), LISTING: parquet_bytes(kept)}
    )


def _no_text(names):
    return pa.array([b"\xff"] * len(names), pa.binary()).view(pa.string())


# What was found, made small: the call, and what it says now.
FINDS = {
    "no periods": (
        lambda: infer_config(META | {"rope_embed.periods": torch.zeros(0)}),
        "rope_embed.periods",
    ),
    "a patch embedding without axes": (
        lambda: infer_config(META | {"patch_embed.proj.weight": torch.tensor(1.0)}),
        "patch embedding: expected a weight",
    ),
    "grids that are no list": (lambda: as_grids(256), "image_grid_hw: expected a pair"),
    "factor 0": (lambda: count_tokens([(2, 2)], 0), "factor=0: expected a whole number"),
    "factor of bytes": (lambda: count_tokens([(2, 2)], b"\xff"), "factor=b"),
    "a configuration that is a number": (lambda: TrainingConfig.from_dict(16), "configuration: "),
    "a kind that is a set": (
        lambda: data_config({"train": {"kind": set(), "path": "d"}}),
        "kind=set",
    ),
    "data that is a tensor": (lambda: data_config({"train": torch.tensor([1, 2])}), "data.train: "),
    "names of several types": (lambda: _training({"16": 1, ("a", 1): 2}), "leave out"),
    "a role that is a tensor": (
        lambda: plain_row({"messages": [{"role": torch.tensor([]), "content": ""}]}),
        "message 0: expected a user",
    ),
    "a device that is not here": (
        lambda: PackedGrids.from_grids([], device=99),
        "it is not here|knows no such device",
    ),
    "a GPU that is not here": (
        lambda: PackedGrids.from_grids([], device="cuda" + ":99" * torch.cuda.is_available()),
        "it is not here",
    ),
    "ends of tensors": (
        lambda: PackedGrids.from_cu_seqlens([0, torch.tensor(True), True]),
        r"cu_seqlens\[1\] must be an int",
    ),
    "numpy's bools": (lambda: TrainingConfig.from_dict(np.True_), "configuration: "),
    "a content that is a tensor": (
        lambda: processor_of().apply_chat_template([{"role": "user", "content": torch.zeros(2)}]),
        "expected a text or a list",
    ),
    "a template that divides by 0": (
        lambda: processor_of().apply_chat_template(CHAT, "{{ 1/0 }}"),
        "the chat template does not take this chat: division by zero",
    ),
    "a template that breaks out of no loop": (
        lambda: processor_of().apply_chat_template(CHAT, "{% break %}"),
        "the chat template does not take this chat: 'break' outside loop",
    ),
    "weights without axes": (
        lambda: to_transformers(STATE | {
            "embeddings.register_tokens": torch.tensor(1.0)
        }),
        "register_tokens",
    ),
    "vectors that no table holds": (
        lambda: _folder(lambda m, t: (m | {"facts": m["facts"] | {"hidden_size": 2**31}}, t)),
        "_manifest.json: no manifest of hrvlm embed: hidden_size is 2147483648",
    ),
    "a listing of other columns": (
        lambda: _folder(lambda m, t: (m, t.rename_columns(["ie", "file", "place", "size"]))),
        "damaged parquet file '_listing.parquet': not the columns",
    ),
    "a listing of other rows": (
        lambda: _folder(lambda m, t: (m, t.slice(1))),
        "damaged parquet file '_listing.parquet': not the columns and rows",
    ),
    "a listing with a gap": (
        lambda: _folder(lambda m, t: (m, t.set_column(1, "file", pa.array([b"a", None, b"c"])))),
        "damaged parquet file '_listing.parquet': not the columns and rows",
    ),
    "a column whose name is no text": (
        lambda: embed_inputs.try_input(
            (".parquet", embed_inputs.inputs()[".parquet"].replace(b"image", b"ima\xffe"))
        ),
        "damaged parquet file 'input.parquet': 'utf-8'",
    ),
    "ids that are no text": (
        lambda: _folder(lambda m, t: (m, t.set_column(0, "id", _no_text(t["id"])))),
        "damaged parquet file '_listing.parquet': ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FINDS)
def test_what_was_found_says_what_is_wrong(name):
    call, message = FINDS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_line_nested_deeper_than_python_goes_is_no_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "a"}\n' + "[" * 100_000)
    rows = JsonLines(tmp_path / "rows.jsonl")
    assert rows[0] == {"question": "a"} and str(rows[1]).startswith("line 2: not valid JSON")
