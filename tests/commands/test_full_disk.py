"""Every kind of save where the disk gets full after some bytes: an error, and nothing is left."""

import json
import shutil

import pytest
from PIL import Image

from hrvlm import DINOv3Encoder, VisionLanguageModel, VLMProcessor
from hrvlm.embed.config import EmbedConfig
from tests.commands.helpers import error_of, run
from tests.disks import FILLED, FULL_DISKS
from tests.embed.here import run_here

SIZES = (0, 100, 5_000, 20_000, 70_000, 150_000)


@pytest.fixture(params=FULL_DISKS)
def full_at(request, tmp_path):
    """Run something into a folder on a disk of some size."""
    disk = tmp_path / "disk"

    def attempt(size, save):
        disk.mkdir(exist_ok=True)
        try:
            with FULL_DISKS[request.param](disk, size):
                result = save(disk / "new" / "out")
                left = {str(p.relative_to(disk)) for p in disk.rglob("*")} - {FILLED}
                return result, sorted(left)
        except PermissionError as error:
            pytest.skip(str(error))
        finally:
            shutil.rmtree(disk)

    return attempt


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    row = {"image": "a.png", "question": "What?", "answer": "Nothing"}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def index(images, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("index")
    run_here(EmbedConfig(str(images), str(out), model=str(model), max_img_size=64))
    return out


# By command: what it is called with, and how many of the sizes of disk don't suffice.
COMMANDS = {
    "encode": (lambda f: [f["images"] / "b_wide.png", "--model", f["model"], "--out", f["out"]], 4),
    "encode --format": (
        lambda f: [
            f["images"] / "b_wide.png", "--model", f["model"], "--out", f["out"], "--no-pictures",
            "--format", "npz",
        ],
        2,
    ),
    "explore": (
        lambda f: [f["images"], "--model", f["model"], "--out", f"{f['out']}.html"],
        2,
    ),
    "search --sheet": (
        lambda f: [f["images"] / "b_wide.png", "--index", f["index"], "--sheet", f"{f['out']}.jpg"],
        3,
    ),
    "search --page": (
        lambda f: [f["images"] / "b_wide.png", "--index", f["index"], "--page", f"{f['out']}.html"],
        2,
    ),
    "convert": (lambda f: [f["model"], f["out"]], 4),
    "evaluate": (
        lambda f: [f["questions"], "--model", f["vlm"], "--out", f"{f['out']}.jsonl"],
        2,
    ),
    "export": (lambda f: [f["model"], f"{f['out']}.pt2", "--format", "torch"], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_a_full_disk_leaves_nothing(
    name, full_at, model, vlm, images, questions, index, request
):
    (arguments, tries), command = COMMANDS[name], name.split()[0]
    if name == "export" and "file size" in request.node.name:
        pytest.skip("a program takes seconds to trace: on one of the disks")
    files = {"model": model, "vlm": vlm, "images": images, "questions": questions, "index": index}
    for size in SIZES[:tries]:
        result, left = full_at(size, lambda out: run(command, *arguments(files | {"out": out})))
        message = error_of(result)
        assert any(w in message for w in ("No space left", "File too large", "Input/output"))
        assert left == [], size


SAVES = {
    "encoder": (DINOv3Encoder, "model"),
    "model": (VisionLanguageModel, "vlm"),
    "processor": (VLMProcessor, "vlm"),
    "image processor": (VLMProcessor, "vlm"),
}


@pytest.mark.parametrize("name", SAVES)
def test_save_pretrained_on_a_full_disk_leaves_nothing(name, full_at, request):
    kind, folder = SAVES[name]
    what = kind.from_pretrained(request.getfixturevalue(folder))
    what = what.image_processor if name == "image processor" else what
    failed = 0
    for size in SIZES:

        def save(out):
            try:
                return what.save_pretrained(out)
            except OSError as error:
                return error

        result, left = full_at(size, save)
        if isinstance(result, OSError):
            failed += 1
            assert left == [], size
        else:
            assert not any(part.startswith(".") for name in left for part in name.split("/"))
    assert failed
