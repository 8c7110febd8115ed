"""Rows of a run, part by part: features, errors, shards, what is refused; without Ray."""

import io
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hrvlm.embed.config import (
    EmbedConfig,
    Resources,
    default_rows_per_part,
    need_extra,
    parse_shard,
)
from hrvlm.embed.parts import done_parts
from hrvlm.embed.probe import probe, sample_of
from hrvlm.embed.rows import RUN, _listing, listed, map_of, parquet_bytes
from hrvlm.embed.run import _Progress, _report, begin, embed, waiting
from hrvlm.embed.sources import list_images, open_source
from hrvlm.embed.stages import Run, packs, write_part
from hrvlm.embed.store import LISTING, MANIFEST, Store, part_name
from hrvlm.images.patches import patchify
from hrvlm.images.processor import get_image_processor
from hrvlm.inference.chat import load_vlm
from tests.disks import small_files
from tests.embed.here import rows_of, run_here
from tests.embed.pictures import processor_of, write_model, write_pictures
from tests.encoder.dinov2_models import pair_of

COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    write_pictures(folder / "in", COUNT, broken_every=8)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return write_model(folder / "model")


@pytest.fixture
def config(folder, encoder, tmp_path):
    def config(out="out", **options):
        given = {"model": str(folder / "model"), "max_img_size": 48, "rows_per_part": 5}
        return EmbedConfig(str(folder / "in"), str(tmp_path / out), **given | options)

    return config


def contents(config):
    return {name: Store(config.out).open(name).read() for name in os.listdir(config.out)}


def test_packs_are_neighbours_in_order_and_one_that_is_too_long_is_alone():
    lengths = [3, 4, 9, 1, 1, 20, 2]
    assert [lengths[p] for p in packs(lengths, 8)] == [[3, 4], [9], [1, 1], [20], [2]]
    assert list(packs([], 8)) == []


def test_two_shards_in_one_folder_are_the_whole(config):
    run_here(config("whole"))
    run_here(config("shards"), shard=(1, 2))
    with pytest.raises(ValueError, match="3 of 5 parts are not there yet"):
        rows_of(config("shards").out)
    run_here(config("shards"), shard=(0, 2))
    assert contents(config("shards")) == contents(config("whole"))
    table = pq.read_table(config("whole").out, columns=["row"])  # the folder, as others read it
    assert table["row"].to_pylist() == list(range(COUNT))


def test_packs_and_parts_do_not_change_rows(config):
    run_here(config("one", rows_per_part=COUNT, max_tokens_per_pass=1))
    run_here(config("many", max_tokens_per_pass=4096))
    for one, many in zip(rows_of(config("one").out), rows_of(config("many").out), strict=True):
        assert (one["id"], one["error"]) == (many["id"], many["error"])
        if one["error"] is None:
            np.testing.assert_allclose(one["mean"], many["mean"], rtol=1e-5, atol=1e-6)


def test_batch_invariant_rows_have_the_same_bits_in_any_pack(config):
    for out, options in (("one", {"max_tokens_per_pass": 1}), ("all", {"rows_per_part": COUNT})):
        run_here(config(out, batch_invariant=True, **options))
    one, many = rows_of(config("one").out, "mean", "cls"), rows_of(config("all").out, "mean", "cls")
    assert one == many


def test_batch_invariant_tokens_have_the_same_bits_in_any_pack(config, vlm):
    options = {"model": str(vlm), "keep": ("patches", "tokens"), "rows_per_part": COUNT}
    options |= {"max_img_size": 96, "allow_upscale": True, "stored": "float16", "layer": -1}
    for out, tokens in (("one", 1), ("all", 4096)):
        run_here(config(out, batch_invariant=True, max_tokens_per_pass=tokens, **options))
    one, many = (rows_of(config(out).out, "mean", "patches", "tokens") for out in ("one", "all"))
    assert one == many and sum(row["tokens"] is not None for row in one) > COUNT // 2


def test_layers_and_patch_maps(config, encoder):
    run_here(config(layer=1, keep=("patches",), stored="float16"))
    store = Store(config().out)
    columns = ("id", "error", "mean", "cls", "patches", "grid_height", "grid_width", "height")
    row = next(row for row in rows_of(config().out, *columns) if row["error"] is None)
    process = processor_of(48)
    pixels, grid = process(f"{config().input}/{row['id']}")
    with torch.inference_mode():
        output = encoder([pixels], out_indices=[1])
    (tokens,) = output.packed_selected_hidden_states
    torch.testing.assert_close(torch.tensor(row["cls"]), tokens[0])
    torch.testing.assert_close(torch.tensor(row["mean"]), tokens[5:].mean(0))
    patches = map_of(row, store.read_manifest())
    assert (row["grid_height"], row["grid_width"]) == grid
    torch.testing.assert_close(patches.flatten(0, 1), tokens[5:].half(), atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match="layer=3: expected -2 to 2"):
        run_here(config("other", layer=3))
    with pytest.raises(ValueError, match="without projector has no projector tokens"):
        run_here(config("other", keep=("tokens",)))


@pytest.mark.parametrize("name", ["plain", "registers"])
def test_dinov2(config, tmp_path, name):
    _, encoder = pair_of(name)
    encoder.save_pretrained(tmp_path / "model")
    run_here(config(model=str(tmp_path / "model"), max_img_size=56), shard=(0, COUNT))
    rows = pq.read_table(f"{config().out}/{part_name(0)}").to_pylist()
    row = next(row for row in rows if row["error"] is None)
    process = get_image_processor(
        56, vit_patch_size=14, pixel_shuffle_factor=1, allow_upscale=False
    )
    pixels, grid = process(f"{config().input}/{row['id']}")
    with torch.inference_mode():
        output = encoder.eval()([pixels])
    assert (row["grid_height"], row["grid_width"]) == grid == output.grids[0]
    torch.testing.assert_close(torch.tensor(row["cls"]), output.cls[0])
    torch.testing.assert_close(torch.tensor(row["mean"]), output.patches[0].mean(0))


def test_tokens_are_those_that_the_language_model_gets(config, vlm):
    keep = ("patches", "tokens")
    run_here(config(model=str(vlm), keep=keep, rows_per_part=COUNT, max_img_size=64))
    manifest = Store(config().out).read_manifest()
    columns = ("id", "error", "mean", "tokens", "patches", "grid_height", "grid_width")
    row = next(row for row in rows_of(config().out, *columns) if row["error"] is None)
    processor, model = load_vlm(str(vlm), device="cpu", dtype="float32")
    images = processor.image_processor
    process = get_image_processor(
        64,
        pixel_shuffle_factor=images.pixel_shuffle_factor,
        allow_upscale=False,
        image_mean=images.image_mean,
        image_std=images.image_std,
    )
    pixels, (gh, gw) = process(f"{config().input}/{row['id']}")
    grid = (row["grid_height"], row["grid_width"])
    with torch.inference_mode():
        output = model.get_image_features(patchify(pixels, 16), [grid])
    tokens = map_of(row, manifest, "tokens")
    assert tokens.shape == (gh, gw, 32) and manifest.facts.factor == images.pixel_shuffle_factor
    own = output.pooler_output[0][: gh * gw].bfloat16()
    torch.testing.assert_close(tokens.flatten(0, 1), own)
    prefix = model.vision_encoder.num_prefix_tokens
    mean = output.last_hidden_state[prefix:].mean(0)
    torch.testing.assert_close(torch.tensor(row["mean"]), mean)
    options = {"keep": keep, "layer": -1, "rows_per_part": COUNT, "max_img_size": 64}
    run_here(config("layer", model=str(vlm), **options))
    last = next(row for row in rows_of(config("layer").out, *columns) if row["error"] is None)
    np.testing.assert_allclose(last["mean"], row["mean"], rtol=1e-5, atol=1e-6)


def test_with_care_the_rows_are_the_same_and_errors_too(config):
    found = []
    for out, careful in (("quick", False), ("careful", True)):
        run_here(config(out), shard=(0, COUNT), careful=careful)
        found.append(pq.read_table(f"{config(out).out}/{part_name(0)}").to_pylist())
    assert len(found[0]) == len(found[1]) == 5
    for quick, careful in zip(*found, strict=True):
        assert (quick["error"] is None) == (careful["error"] is None)
        if quick["error"] is None:
            np.testing.assert_allclose(quick["mean"], careful["mean"], rtol=1e-5, atol=1e-6)


def test_what_has_no_memory_is_tried_in_halves_and_what_is_not_finite_is_no_feature(
    config, encoder, monkeypatch
):
    run_here(config("whole"))
    forward = type(encoder).forward

    def limited(self, images, **options):
        if sum(image.numel() for image in images) > 3 * 48 * 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images, **options)

    monkeypatch.setattr(type(encoder), "forward", limited)
    run_here(config("halves"))
    rows = rows_of(config("halves").out)
    lacking = [row for row in rows if row["error"] and "no memory" in row["error"]]
    assert lacking and all("tokens" in row["error"] for row in lacking)
    assert sum(row["error"] is None for row in rows) > COUNT // 3

    def endless(self, images, **options):
        output = forward(self, images, **options)
        output.packed_last_hidden_state[-1] = torch.nan
        return output

    monkeypatch.setattr(type(encoder), "forward", endless)
    run_here(config("endless"))
    assert any(row["error"] == "features are not finite" for row in rows_of(config("endless").out))


def test_another_run_in_the_folder_is_refused_by_name(config, folder):
    run_here(config())
    entries = list_images(open_source(config()))
    manifest = Store(config().out).read_manifest()

    def refused(message, given, images=COUNT, digest=manifest.digest, facts=None):
        with pytest.raises(ValueError, match=message):
            manifest.check_goes_on(given, images, digest, facts)

    manifest.check_goes_on(config(), COUNT, manifest.digest, manifest.facts)
    refused(r"layer: None there, 1 now\): give another --out", config(layer=1))
    refused("dtype: 'float32' there, 'bfloat16' now", config(dtype="bfloat16"))
    refused("rows_per_part: 5 there, 7 now", config(rows_per_part=7))
    refused("images of the input: 24 there, 25 now", config(), images=25)
    refused("listing of the input", config(), digest="other")
    write_model(folder / "other", seed=1)
    other = probe(config(model=str(folder / "other")), sample_of(entries, 2)).facts
    refused("the model's weights", config(), facts=other)
    manifest_file = f"{config().out}/_manifest.json"
    with open(manifest_file, "w") as file:
        json.dump({"format": 99}, file)
    with pytest.raises(ValueError, match=r"_manifest\.json: format 99, expected 1"):
        Store(config().out).read_manifest()
    os.remove(manifest_file)
    with pytest.raises(ValueError, match=r"has parts but no _manifest\.json"):
        Store(config().out).read_manifest()


def test_what_is_not_whole_is_known_and_made_again(config):
    run_here(config())
    store, whole = Store(config().out), contents(config())
    manifest, content = store.read_manifest(), store.read(part_name(1))
    store.write(part_name(1), content[: len(content) // 2])
    store.write(part_name(2), content)
    done = done_parts(store, manifest, range(5))
    assert list(done) == [0, 3, 4]
    assert done[0].rows == 5 and sum(part.bad != {} for part in done.values()) > 0
    assert waiting(store, manifest, Resources(shard=(1, 2)), retry_bad=False) == [1]
    with pytest.raises(ValueError, match="2 of 5 parts are not there yet"):
        rows_of(config().out)
    listing = store.read(LISTING)
    page = listing[:4] + b"\xff" * 40 + listing[44:]
    for damage, message in (
        (page, r"damaged parquet file '_listing\.parquet': "),
        (listing[:-9], r"damaged parquet file '_listing\.parquet': "),
        (content, r"_listing\.parquet is of another run"),
    ):
        store.write(LISTING, damage)
        with pytest.raises(ValueError, match=message):
            _listing.cache_clear()
            listed(config().out, 0, manifest)
    for name in ("_listing.parquet", "_manifest.json", part_name(3)):
        (Path(config().out) / f".{name}.77.part").touch()  # as killed writers leave them
    run_here(config())
    assert contents(config()) == whole


def test_parts_of_another_run_are_refused_by_name(config, folder):
    run_here(config())
    store, name = Store(config().out), part_name(1)
    manifest = store.read_manifest()
    table = pq.read_table(io.BytesIO(store.read(name)))
    own = {"run": manifest.fingerprint, "part": 1, "bad": {}}
    foreign = {
        "columns": table.select(["row"]).rename_columns(["foo"]),
        "rows": table.slice(1),
        "none of ours": table.replace_schema_metadata(),
        "junk": table.replace_schema_metadata({RUN: b"[1]"}),
        "fewer words": table.replace_schema_metadata({RUN: json.dumps({**own, "run": "other"})}),
    }
    contents = [parquet_bytes(made) for made in foreign.values()]
    write_model(folder / "second", seed=5)
    others = ({"model": str(folder / "second")}, {"layer": 1}, {"stored": "float16"})
    for i, options in enumerate(others):
        run_here(config(f"other-{i}", **options), shard=(1, COUNT))
        contents.append(Store(config(f"other-{i}").out).read(name))
    assert {len(content) for content in contents[5:]} & {len(store.read(name))}  # no size tells
    for content in contents:
        store.write(name, content)
        for use in (lambda: embed(config()), lambda: rows_of(config().out)):
            with pytest.raises(ValueError, match=r"of another run.*\(1: part-00000001\.parquet\)"):
                use()


def test_two_runs_that_begin_in_one_folder_are_no_mixture(config):
    run_here(config(), shard=(0, COUNT))
    store, entries = Store(config().out), list_images(open_source(config()))
    before, manifest = contents(config()), store.read_manifest()
    other = replace(manifest, facts=replace(manifest.facts, dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"another run, of another model, .* has begun here"):
        begin(store, other, entries, range(5))
    assert contents(config()) == before
    store.write_manifest(other)  # which comes later
    with pytest.raises(ValueError, match=r"another run, of another model, .* has begun here"):
        _report(config(), store, manifest, Resources(), _Progress(), None)


BROKEN_MANIFESTS = (
    b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b"{}", {"rows_per_part": 0}, {"images": "10"},
    {"rows_per_part": True}, {"images": "10"}, {"facts": []}, {"facts": {}}, {"asked": None},
    {"asked": {"keep": ["everything"]}}, {"asked": {"layer": "x"}}, {"asked": {"more": 1}},
    {"input": 3}, {"digest": None}, {"facts.patch_size": 0}, {"facts.image_mean": 0.5},
)  # fmt: skip


def test_a_manifest_that_is_none_is_an_error_of_its_name(config):
    run_here(config(), shard=(0, COUNT))
    store = Store(config().out)
    whole = json.loads(store.read(MANIFEST))
    for broken in BROKEN_MANIFESTS:
        if isinstance(broken, dict):
            ((name, value),) = broken.items()
            made = json.loads(json.dumps(whole))
            section, _, field = name.rpartition(".")
            (made[section] if section else made)[field] = value
            broken = json.dumps(made).encode()
        store.write(MANIFEST, broken)
        with pytest.raises(ValueError, match=r"_manifest\.json: "):
            store.read_manifest()
    store.write(MANIFEST, json.dumps(whole).encode())
    assert json.loads(json.dumps(store.read_manifest().to_json())) == whole


def test_a_folder_is_only_made_where_something_comes_into_it(tmp_path):
    store = Store(str(tmp_path / "new" / "out [1]"))
    with small_files(tmp_path, 0), pytest.raises(OSError, match="File too large"):
        store.write("part-00000000.parquet", b"content")
    assert list(tmp_path.iterdir()) == []
    store.write("part-00000000.parquet", b"content")
    assert store.parts() == {0}


def test_a_writer_whose_file_another_run_removes_writes_again(tmp_path, monkeypatch):
    store, write, written = Store(str(tmp_path)), Path.write_bytes, []

    def removed_once(path, content):
        write(path, content)
        written.append(path)
        if len(written) == 1:
            store.remove_leftovers({MANIFEST})
            assert not path.exists()

    monkeypatch.setattr(Path, "write_bytes", removed_once)
    store.write(MANIFEST, b"content")
    assert store.read(MANIFEST) == b"content" and len(written) == 2


def test_object_stores(config):
    store = Store("memory://bucket/run")
    assert store.read_manifest() is None and store.parts() == set()
    store.write(part_name(3), b"content")
    assert store.parts() == {3} and store.read(part_name(3)) == b"content"
    assert store.read(part_name(4)) is None
    store.remove_leftovers({part_name(3)})
    with pytest.raises(ValueError, match="nosuch"):
        Store("nosuch://bucket")


@pytest.mark.skipif(os.getuid() != 0, reason="only root mounts a file system")
def test_a_full_disk_ends_the_run_and_leaves_nothing_half_written(config, tmp_path):
    (tmp_path / "out").mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(tmp_path / "out")]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        told = [json.loads(t["told"]) for t in run_here(config(keep=("patches",)))]
        assert "failed" not in told[0] and told[-1]["failed"] == "No space left on device"
        written = sorted(os.listdir(tmp_path / "out"))
        assert written[0] == "_listing.parquet" and not any(n.startswith(".") for n in written)
        with pytest.raises(OSError, match="out: No space left on device"):
            _Progress().add(told[-1], config().out)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path / "out")], check=True)


def test_processes_that_died_too_often_are_not_tried_again(config):
    told = {"part": 1, "died": True}
    assert json.loads(write_part({"told": json.dumps(told), "table": b""}, None)["told"]) == told
    progress = _Progress()
    progress.add(told, "out")
    assert progress.done == set()


def test_sizes_of_parts_shards_and_the_missing_extra():
    assert default_rows_per_part(3 * 224 * 224, 8192) == 256
    assert default_rows_per_part(3 * 1024 * 1024, 8192) == 16
    assert default_rows_per_part(1e9, 8192) == 1 and default_rows_per_part(10, 10) == 512
    assert parse_shard("1/4") == (1, 4)
    for wrong in ("4/4", "1", "a/2", "-1/2"):
        with pytest.raises(ValueError, match="--shard"):
            parse_shard(wrong)
    with pytest.raises(ValueError, match="shard 2/2"):
        Resources(shard=(2, 2))
    with pytest.raises(
        ValueError, match=r"nosuchmodule: not installed; pip install 'hrvlm\[scale\]"
    ):
        need_extra("torch", "nosuchmodule")
    with pytest.raises(ValueError, match="keep='everything'"):
        EmbedConfig("in", "out", keep=("everything",))


def test_turned_pictures_are_upright(tmp_path, encoder, folder):
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "in" / "a.jpg", exif=exif)
    config = EmbedConfig(str(tmp_path / "in"), str(tmp_path / "out"), model=str(folder / "model"))
    run_here(config)
    (row,) = rows_of(tmp_path / "out", "height", "width", "grid_height", "grid_width")
    assert list(row.values()) == [64, 32, 4, 2]
    assert Run(config, None).gives_up("decode", 0) is False
