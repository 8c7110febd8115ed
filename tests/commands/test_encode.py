"""``hrvlm encode``."""

import http.server
import io
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from hrvlm import DINOv3Encoder
from hrvlm.cli import app
from hrvlm.images.processor import IMAGENET, SAT493M, get_image_processor
from hrvlm.inference.encode import EncodeOptions, encode
from hrvlm.inference.encode_formats import FORMATS
from hrvlm.inference.encode_formats import read_one_file as read_back
from hrvlm.inference.inputs import find_images, gathered
from hrvlm.inference.loading import LoadedEncoder, load_encoder
from tests.commands.helpers import error_of, run
from tests.encoder import dinov2_models
from tests.encoder.encoders import config_of


def test_encode_table_files_and_pictures(images, model, tmp_path):
    out = tmp_path / "new" / "out"
    result = run("encode", images, "--model", model, "--out", out, "--max-img-size", 128)
    assert result.exit_code == 0, result.output
    assert [line.split()[:2] for line in result.stdout.splitlines()[2:5]] == [
        [str(images / "a_turned.jpg"), "160x90"],
        [str(images / "b_wide.png"), "100x200"],
        [str(images / "c_tall.webp"), "150x40"],
    ]
    assert [line.split()[2:6] for line in result.stdout.splitlines()[2:5]] == [
        ["128x80", "1.11x", "8x5", "40"],  # whole patches of 16, and no more
        ["64x128", "1.00x", "4x8", "32"],
        ["128x32", "1.07x", "8x2", "16"],
    ]
    assert "height x width" in result.stdout and "token" not in result.stdout
    assert "3 images" in result.stdout and "1 packed pass" in result.stdout
    assert "RANDOM" not in result.output and str(model) in result.stdout
    names = ["a_turned", "b_wide", "c_tall"]
    assert sorted(p.name for p in out.iterdir()) == [
        f"{name}.features.{ending}" for name in names for ending in ("png", "safetensors")
    ]
    widths = {}
    for name in names:
        with Image.open(out / f"{name}.features.png") as picture:
            widths[name] = picture.size
    assert widths["b_wide"][0] > widths["b_wide"][1]


def test_a_dinov2_is_known_by_its_config_or_its_weights(images, tmp_path):
    theirs, _ = dinov2_models.pair_of("registers", hidden_size=384, num_attention_heads=6)
    theirs.save_pretrained(tmp_path / "directory")
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    for name in ("directory", "weights.pth"):
        result = run(
            "encode", images / "b_wide.png", "--model", tmp_path / name, "--max-img-size", 112
        )
        assert result.exit_code == 0, result.output
        words = result.stdout.splitlines()[2].split()
        assert words[1:6] == ["100x200", "56x112", "1.00x", "4x8", "32"]  # patches of 14


def test_features_are_those_of_the_encoder_on_the_image_alone(images, model, tmp_path):
    run("encode", images, "--model", model, "--out", tmp_path, "--max-img-size", 128)
    encoder = DINOv3Encoder.from_pretrained(model).eval()
    process = get_image_processor(128, pixel_shuffle_factor=1, allow_upscale=False,
                                  image_mean=SAT493M.mean, image_std=SAT493M.std)  # fmt: skip
    for name in ("a_turned.jpg", "b_wide.png", "c_tall.webp"):
        pixels, grid = process(images / name)
        with torch.no_grad():
            alone = encoder([pixels])
        path = (tmp_path / name).with_suffix(".features.safetensors")
        with safe_open(path, framework="pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            metadata = stored.metadata()
        hp, wp = alone.grids[0]
        assert tensors["patches"].shape == (hp, wp, 64)
        torch.testing.assert_close(tensors["patches"].flatten(0, 1), alone.patches[0])
        torch.testing.assert_close(tensors["cls"], alone.cls[0])
        torch.testing.assert_close(tensors["registers"], alone.registers[0])
        assert json.loads(metadata["patch_grid"]) == [hp, wp] == list(grid)
        assert metadata["weights"] == "pretrained" and metadata["image"] == name
        assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    current = os.umask(0)
    os.umask(current)
    return current


def test_random_weights_are_never_hidden_and_always_the_same(images, tmp_path):
    arguments = ("encode", images / "b_wide.png", "--max-img-size", 64)
    shown = run(*arguments)
    assert "weights are random" in shown.stderr and "RANDOM WEIGHTS" in shown.stdout
    torch.manual_seed(99)
    document = json.loads(run(*arguments, "--json", "--out", tmp_path / "1").stdout)
    assert document["weights"] == "random" and "RANDOM WEIGHTS" in document["model"]
    run(*arguments, "--out", tmp_path / "2")
    stored = [next((tmp_path / n).glob("*.safetensors")) for n in "12"]
    with (
        safe_open(stored[0], framework="pt") as first,
        safe_open(stored[1], framework="pt") as second,
    ):
        assert first.metadata() == second.metadata()
        assert first.metadata()["weights"] == "random"
        assert first.get_tensor("cls").shape == (384,)
        for key in ("cls", "registers", "patches"):
            assert torch.equal(first.get_tensor(key), second.get_tensor(key))


def test_json_is_alone_on_stdout_and_complete(images, model, tmp_path):
    result = run("encode", images, "--model", model, "--json", "--max-tokens-per-pass", 85,
                 "--out", tmp_path, "--max-img-size", 128)  # fmt: skip
    document = json.loads(result.stdout)
    assert [image["pass"] for image in document["images"]] == [0, 0, 1]
    assert [p["images"] for p in document["passes"]] == [2, 1]
    for i, timed in enumerate(document["passes"]):
        own = [image for image in document["images"] if image["pass"] == i]
        assert sum(image["share"] for image in own) == pytest.approx(1)
        assert sum(image["seconds"] for image in own) == pytest.approx(timed["seconds"])
    assert document["patches"] == sum(image["patches"] for image in document["images"])
    assert all(1 <= image["stretch"] < 1.12 for image in document["images"])
    assert document["weights"] == "pretrained" and document["attention_backend"] == "sdpa"
    assert all(os.path.exists(image["picture"]) for image in document["images"])


def test_passes_do_not_change_features(images, model, tmp_path):
    for name, limit in (("one", 4096), ("many", 1)):
        options = ("--max-tokens-per-pass", limit, "--max-img-size", 128, "--no-pictures")
        result = run("encode", images, "--model", model, "--out", tmp_path / name, *options)
        assert ("3 packed passes" in result.stdout) == (limit == 1)
    for path in (tmp_path / "one").iterdir():
        assert path.suffix == ".safetensors"
        with (
            safe_open(path, framework="pt") as one,
            safe_open(tmp_path / "many" / path.name, framework="pt") as many,
        ):
            for key in ("cls", "registers", "patches"):
                torch.testing.assert_close(one.get_tensor(key), many.get_tensor(key))


def test_bfloat16_features_are_stored_as_such(images, model, tmp_path):
    result = run("encode", images / "b_wide.png", "--model", model, "--out", tmp_path,
                 "--dtype", "bfloat16", "--max-img-size", 64)  # fmt: skip
    assert result.exit_code == 0, result.output
    with safe_open(tmp_path / "b_wide.features.safetensors", framework="pt") as stored:
        assert stored.get_tensor("patches").dtype == torch.bfloat16


def test_joint_pictures_differ_from_single_ones(images, model, tmp_path):
    for name, *options in (("single",), ("joint", "--joint-pca", "--max-tokens-per-pass", 1)):
        run("encode", images, "--model", model, "--out", tmp_path / name, "--max-img-size", 128,
            *options)  # fmt: skip
    names = sorted(p.name for p in (tmp_path / "joint").glob("*.png"))
    assert len(names) == 3
    differ = [(tmp_path / d / n).read_bytes() for n in names for d in ("single", "joint")]
    assert all(a != b for a, b in zip(differ[::2], differ[1::2], strict=True))


def test_bad_images_are_named_refused_or_skipped(images, model, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((images / "b_wide.png").read_bytes()[:300])
    arguments = ("encode", broken, images / "b_wide.png", "--model", model, "--max-img-size", 64)
    assert "broken.png" in error_of(run(*arguments))
    skipping = run(*arguments, "--skip-bad")
    assert skipping.exit_code == 0 and "b_wide.png" in skipping.stdout
    assert f"skipped {broken}: " in skipping.stderr
    document = json.loads(run(*arguments, "--skip-bad", "--json").stdout)
    assert [bad["image"] for bad in document["bad"]] == [str(broken)]
    assert len(document["images"]) == 1
    nothing = run("encode", broken, "--model", model, "--skip-bad")
    assert nothing.exit_code == 2 and "no image could be read" in nothing.stderr


def test_directories_expand_sorted_and_files_stay_in_order(images):
    tall = images / "c_tall.webp"
    found = find_images([tall, images])
    assert [p.name for p in found] == ["c_tall.webp", "a_turned.jpg", "b_wide.png", "c_tall.webp"]


def test_folders_are_read_to_their_depths_and_what_is_skipped_is_named(images, model, tmp_path):
    deep = tmp_path / "in" / "a" / "b"
    deep.mkdir(parents=True)
    for name in ("one.png", "two.PNG"):
        Image.new("RGB", (32, 32)).save(deep / name)
    (tmp_path / "in" / "list.csv").write_text("no image")
    shown = run("encode", tmp_path / "in", "--model", model, "--json")
    document = json.loads(shown.stdout)
    names = [image["image"] for image in document["images"]]
    assert names == [str(deep / "one.png"), str(deep / "two.PNG")]
    assert document["skipped"] == [str(tmp_path / "in" / "list.csv")]
    assert f"skipped {tmp_path / 'in' / 'list.csv'}: no image by its name" in shown.stderr
    inside = run("encode", tmp_path / "in", "--model", model, "--out", deep / "out")
    assert "lies in one of the inputs" in error_of(inside)


def test_links_that_lead_nowhere_and_links_to_folders_are_named(images, model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").symlink_to(images / "a_turned.jpg")
    (folder / "gone.jpg").symlink_to(tmp_path / "gone.jpg")
    (folder / "round.png").symlink_to("round.png")
    for name in ("folder", "folder.png"):
        (folder / name).symlink_to(images)
    command = ("encode", folder, "--model", model, "--out", tmp_path / "out")
    assert "gone.jpg" in error_of(run(*command))
    shown = run(*command, "--skip-bad", "--json")
    document = json.loads(shown.stdout)
    assert [image["image"] for image in document["images"]] == [str(folder / "a.jpg")]
    bad = [str(folder / "gone.jpg"), str(folder / "round.png")]
    assert [each["image"] for each in document["bad"]] == bad
    assert document["skipped"] == [str(folder / "folder"), str(folder / "folder.png")]
    assert f"skipped {folder / 'folder'}: a link to a folder" in shown.stderr


def test_a_pipe_is_an_image_that_can_not_be_read(images, model, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    shutil.copy(images / "b_wide.png", folder / "a.png")
    os.mkfifo(folder / "b.png")  # to open it would wait for ever
    arguments = ("encode", folder, "--model", model, "--max-img-size", 64, "--out", out)
    assert "b.png' is a pipe or a device" in error_of(run(*arguments))
    for kind in ((), ("--format", "safetensors")):
        document = json.loads(run(*arguments, *kind, "--skip-bad", "--json").stdout)
        assert [bad["image"] for bad in document["bad"]] == [str(folder / "b.png")]
        assert [image["image"] for image in document["images"]] == [str(folder / "a.png")]


def test_a_pipe_in_the_place_of_a_result_is_replaced(images, model, tmp_path):
    names = ("b_wide.features.safetensors", "b_wide.features.png", "features.npz")
    for name in names:
        os.mkfifo(tmp_path / name)
    for kind in ((), ("--format", "npz")):
        run("encode", images / "b_wide.png", "--model", model, "--max-img-size", 64,
            "--out", tmp_path, *kind)  # fmt: skip
    assert all((tmp_path / name).is_file() for name in names)


def test_what_is_there_stays_and_what_changed_is_made_anew(images, model, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (50 * i, 9, 9)).save(source / f"{i}.png")
    arguments = ("encode", source, "--model", model, "--out", out, "--max-tokens-per-pass", 1)
    run(*arguments)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    for name in ("1.features.safetensors", "2.features.png"):
        (out / name).unlink()
    again = run(*arguments, "--json")
    document = json.loads(again.stdout)
    assert [there["image"] for there in document["there"]] == [str(source / "0.png")]
    assert "1 image done by an earlier run" in again.stderr and len(document["images"]) == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    Image.new("RGB", (32, 32)).save(source / "1.png")
    document = json.loads(run(*arguments, "--json").stdout)
    assert [image["image"] for image in document["images"]] == [str(source / "1.png")]
    document = json.loads(run(*arguments, "--json", "--pooled").stdout)
    assert len(document["images"]) == 3 and not document["there"]
    with safe_open(out / "0.features.safetensors", framework="pt") as stored:
        assert set(stored.keys()) == {"cls", "mean"}


@pytest.mark.parametrize(
    "pooled, kind", [(0, "safetensors"), (1, "npz"), (0, "npz"), (1, "parquet")]
)
def test_one_file_holds_all_images_and_equal_runs_give_equal_bytes(
    images, model, tmp_path, kind, pooled
):
    arguments = ["encode", images, "--model", model, "--max-img-size", 64, "--no-pictures"]
    run(*arguments, "--out", tmp_path / "each")
    arguments += ["--format", kind, *(["--pooled"] if pooled else [])]
    for name in ("1", "2"):
        assert run(*arguments, "--out", tmp_path / name).exit_code == 0
    target = tmp_path / "1" / f"features.{kind}"
    assert [path.name for path in (tmp_path / "1").iterdir()] == [target.name]
    assert target.read_bytes() == (tmp_path / "2" / target.name).read_bytes()
    again = run(*arguments, "--out", tmp_path / "1")
    assert again.exit_code == 0 and "3 images done by an earlier run" in again.stderr
    keys = ("cls", "mean") if pooled else ("cls", "registers", "patches")
    for name, tensors in read_one_file(target, ("a_turned", "b_wide", "c_tall"), keys).items():
        path = tmp_path / "each" / f"{name}.features.safetensors"
        with safe_open(path, framework="pt") as stored:
            one = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            metadata = stored.metadata()
        one["mean"] = one["patches"].flatten(0, 1).mean(0)
        assert tensors["metadata"].pop("made_of") and metadata.pop("made_of")
        assert tensors.pop("metadata") == metadata
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, one[key].reshape(tensor.shape))


@pytest.mark.parametrize("kind", FORMATS)
def test_one_file_goes_on_after_a_stop_and_with_bad_images(images, model, tmp_path, kind):
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(images, source)
    whole = (source / "c_tall.webp").read_bytes()
    (source / "c_tall.webp").write_bytes(whole[:40])
    arguments = ("encode", source, "--model", model, "--format", kind, "--no-pictures",
                 "--max-img-size", 64, "--max-tokens-per-pass", 1)  # fmt: skip

    def encoded(*options, there, new, bad=0):
        result = run(*arguments, "--out", out, "--json", *options)
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        names = [[Path(i["image"]).name for i in document[key]] for key in ("there", "images")]
        assert names == [there, new] and len(document["bad"]) == bad
        assert [path.name for path in out.iterdir()] == [target.name]

    target = out / f"features.{kind}"
    assert "c_tall.webp" in error_of(run(*arguments, "--out", out))
    assert [path.name for path in out.iterdir()] == [f".{target.name}.parts"]
    encoded("--skip-bad", there=["a_turned.jpg"], new=["b_wide.png"], bad=1)
    written = target.stat().st_mtime_ns
    encoded("--skip-bad", there=["a_turned.jpg", "b_wide.png"], new=[], bad=1)
    assert target.stat().st_mtime_ns == written
    (source / "c_tall.webp").write_bytes(whole)
    encoded(there=["a_turned.jpg", "b_wide.png"], new=["c_tall.webp"])
    run(*arguments, "--out", tmp_path / "anew")
    assert target.read_bytes() == (tmp_path / "anew" / target.name).read_bytes()
    (source / "c_tall.webp").unlink()
    message = error_of(run(*arguments, "--out", out))
    assert "holds the features of 'c_tall.webp', which is none of these" in message
    target.write_bytes(target.read_bytes()[:-100])
    assert "damaged, or not written by hrvlm encode" in error_of(run(*arguments, "--out", out))


def test_another_image_of_the_same_name_replaces_nothing(model, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    first, second = source / "a.png", source / "sub" / "a.png"
    for path, color in ((first, "red"), (second, "blue")):
        Image.new("RGB", (32, 32), color).save(path)

    def written(*images, there=False, content=None):
        arguments = ("encode", *images, "--model", model, "--out", out, "--json")
        result = CliRunner().invoke(app, [str(a) for a in arguments], input=content)
        document = json.loads(result.stdout)
        assert bool(document["images"]) != there
        return [Path(i["features"]).name for i in document["there"] + document["images"]]

    assert written(first) == ["a.features.safetensors"]
    kept = {path: path.read_bytes() for path in out.iterdir()}
    assert written(second) == ["a-2.features.safetensors"]
    assert written(second, first, there=True) == [
        "a-2.features.safetensors",
        "a.features.safetensors",
    ]
    source.rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "sub" / "a.png"
    assert written(moved, there=True) == ["a-2.features.safetensors"]
    assert {path: path.read_bytes() for path in kept} == kept and len(list(out.iterdir())) == 4
    Image.new("RGB", (32, 32), "green").save(tmp_path / "one.png")
    for name, path, there in (("stdin", moved, 0), ("stdin-2", "one.png", 0), ("stdin", moved, 1)):
        content = (tmp_path / path).read_bytes()
        assert written("-", there=there, content=content) == [f"{name}.features.safetensors"]


def test_pictures_that_are_none_or_drawn_otherwise_are_drawn_anew(images, model, tmp_path):
    arguments = ("encode", images, "--model", model, "--out", tmp_path, "--max-img-size", 64)

    def encoded(*options):
        return len(json.loads(run(*arguments, "--json", *options).stdout)["images"])

    assert encoded() == 3 and encoded() == 0
    single = {path: path.read_bytes() for path in tmp_path.glob("*.png")}
    junk = tmp_path / "b_wide.features.png"
    for content in (b"junk", (images / "b_wide.png").read_bytes(), junk.read_bytes()[:-40]):
        junk.write_bytes(content)
        assert encoded() == 1
    assert encoded("--joint-pca") == 3 and encoded("--joint-pca") == 0
    assert all(path.read_bytes() != single[path] for path in single)
    assert encoded() == 3 and {path: path.read_bytes() for path in single} == single


def read_one_file(target, names, keys):
    if target.suffix == ".safetensors":
        with safe_open(target, framework="pt") as stored:
            assert set(stored.keys()) == {f"{name}.{key}" for name in names for key in keys}
            return {
                name: {key: stored.get_tensor(f"{name}.{key}") for key in keys}
                | {"metadata": json.loads(stored.metadata()[name])}
                for name in names
            }
    if target.suffix == ".npz":
        with np.load(target) as arrays:
            return {
                name: {key: torch.from_numpy(arrays[f"{name}.{key}"]) for key in keys}
                | {"metadata": json.loads(str(arrays[f"{name}.metadata"]))}
                for name in names
            }
    rows = pq.read_table(target).to_pylist()
    assert [row["name"] for row in rows] == list(names)
    return {
        row["name"]: {key: torch.tensor(row[key]) for key in keys}
        | {"metadata": json.loads(row["metadata"])}
        for row in rows
    }


def test_standard_input_and_addresses(images, model, tmp_path, server, monkeypatch):
    content = (images / "b_wide.png").read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    with gathered(["-"]) as inputs:
        (path,) = inputs.paths
        assert path.read_bytes() == content and inputs.name(path) == "-"
    assert not path.exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    address = server(content)
    refused = run("encode", address, "--model", model)
    assert f"{address}: addresses are fetched only with --fetch" in error_of(refused)
    arguments = ("encode", address, "--model", model, "--fetch", "--out", tmp_path / "out")
    (image,) = json.loads(run(*arguments, "--json").stdout)["images"]
    assert image["image"] == address and image["size"] == [100, 200]
    assert image["features"] == str(tmp_path / "out" / "picture.features.safetensors")
    missing = f"{address}.none"
    assert "can't be fetched" in error_of(run("encode", missing, "--model", model, "--fetch"))
    arguments = ("encode", missing, address, "--model", model, "--fetch", "--skip-bad", "--json")
    document = json.loads(run(*arguments).stdout)
    assert [bad["image"] for bad in document["bad"]] == [missing] and len(document["images"]) == 1


@pytest.fixture
def server():
    """A function that serves some bytes as picture.png until the test ends; their address."""
    running = []

    def serve(content):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                found = self.path == "/deep/picture.png"
                self.send_response(200 if found else 404)
                self.end_headers()
                self.wfile.write(content if found else b"")

            def log_message(self, *_):
                pass

        running.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}/deep/picture.png"

    yield serve
    for one in running:
        one.shutdown()
        one.server_close()


def test_results_of_equal_names_do_not_collide(images, model, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    for folder, name in (("x", "one.png"), ("y", "one.png"), ("y", "ONE.bmp")):
        Image.new("RGB", (64, 64)).save(tmp_path / folder / name)
    out = tmp_path / "out"
    arguments = ("encode", tmp_path / "x", tmp_path / "y", "--model", model, "--out", out)
    document = json.loads(run(*arguments, "--json").stdout)
    written = [image["features"] for image in document["images"]]
    assert len(set(written)) == 3 and len(list(out.glob("*.png"))) == 3


def test_names_that_are_no_text(model, tmp_path):
    name = os.fsdecode(b"caf\xc3\xa9 \xff [red].png")
    try:
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    except OSError:
        pytest.skip("this file system has no such names")
    arguments = ("encode", tmp_path / name, "--model", model, "--out", tmp_path / "out")
    table = run(*arguments)
    assert table.exit_code == 0 and "café \\udcff [red].png" in table.stdout
    document = json.loads(run(*arguments, "--json").stdout)
    assert os.path.exists(document["there"][0]["features"])
    Image.new("RGB", (64, 64), "red").save(tmp_path / name.replace("\udcff", "\udcfe"))
    for kind in FORMATS:
        result = run("encode", *sorted(tmp_path.glob("*.png")), "--model", model, "--out",
                     tmp_path / "out", "--format", kind, "--no-pictures")  # fmt: skip
        assert result.exit_code == 0, result.output
        target = tmp_path / "out" / f"features.{kind}"
        assert list(read_back(target)) == ["café ? [red]", "café ? [red]-2"]


def test_too_large_a_pass_says_what_to_lower(images, model, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(DINOv3Encoder, "forward", full)
    result = run("encode", images, "--model", model, "--max-img-size", 128)
    message = error_of(result, 1)
    assert "3 images with 88 patches" in message and "lower --max-tokens-per-pass" in message


def test_inputs_are_never_replaced(model, tmp_path):
    source = tmp_path / "one.png"
    Image.new("RGB", (64, 64)).save(source)
    inside = run("encode", tmp_path, "--model", model, "--out", tmp_path)
    assert "is one of the inputs" in error_of(inside)
    assert run("encode", source, "--model", model, "--out", tmp_path).exit_code == 0
    again = run("encode", source, tmp_path / "one.features.png", "--model", model, "--out",
                tmp_path)  # fmt: skip
    assert "is an input and would be replaced" in error_of(again)


def test_without_out_nothing_is_written(images, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("encode", images, "--model", model, "--max-img-size", 64).exit_code == 0
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_nothing_half_done(images, model, tmp_path, monkeypatch):
    target = tmp_path / "b_wide.features.png"
    target.write_bytes(b"of an earlier run")

    write = Path.write_bytes

    def failing(path, content):
        if ".png" not in path.name:
            return write(path, content)
        write(path, b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", failing)
    result = run("encode", images / "b_wide.png", "--model", model, "--out", tmp_path)
    assert "disk full" in error_of(result)
    assert target.read_bytes() == b"of an earlier run"
    assert {p.name for p in tmp_path.iterdir()} == {target.name, "b_wide.features.safetensors"}


def test_model_of_one_layer_and_no_registers(tmp_path):
    encoder = DINOv3Encoder(config_of("no_registers_no_biases", num_hidden_layers=1)).freeze()
    Image.new("RGB", (16, 16)).save(tmp_path / "dot.png")
    options = EncodeOptions(max_img_size=16, out=tmp_path / "out")
    loaded = LoadedEncoder(encoder, "tiny", False, IMAGENET)
    result = encode([tmp_path / "dot.png"], loaded, options)
    assert result.images[0].geometry.patch_grid == (1, 1)
    with safe_open(result.images[0].features, framework="pt") as stored:
        assert stored.get_tensor("registers").shape == (0, 64)
        assert stored.get_tensor("patches").shape == (1, 1, 64)
    assert result.images[0].picture.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "triton"}, "backend 'triton' can't run: the tensors are on the CPU"),
        ({"backend": "fast"}, "backend must be one of"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16"),
        ({"device": "cuda:77"}, "device 'cuda:77' can't be used"),
        ({"model": "./missing"}, "no such directory"),
        (
            {"model": "pyproject.toml"},
            "pyproject.toml: neither safetensors nor a file of torch.save",
        ),
    ],
)
def test_encoders_that_cannot_be_had(options, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=message):
        load_encoder(**({"device": "cpu"} | options))


def test_a_checkpoint_that_lacks_weights_is_refused(model, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    del weights["norm.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"missing \(1\): norm.bias"):
        load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is of type 'llama', expected 'dinov3_vit'"):
        load_encoder(str(tmp_path))
