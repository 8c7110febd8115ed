"""Damaged files of a checkpoint raise one error, which names the file, whatever a loader raises."""

import io
import json
import random
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from hrvlm import (
    DINOv3Encoder,
    VisionLanguageModel,
    VLMConfig,
    VLMImageProcessor,
    VLMProcessor,
)
from hrvlm.checkpoints.convert import convert, load_checkpoint, load_into
from hrvlm.checkpoints.foreign import open_checkpoint
from hrvlm.inference.chat import load_vlm
from hrvlm.inference.loading import load_encoder
from tests.checkpoints.damage import mutate, mutate_json, mutate_pickle_in_zip
from tests.checkpoints.states import meta_state, periods_of
from tests.encoder.encoders import config_of
from tests.tiny import model_of, processor_of

ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_register_tokens": 1,
    "patch_size": 2,
}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def saved(state, **options):
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Content and name of a good file of every container."""
    config = config_of(**ENCODER)
    state = meta_state(config) | periods_of(config.rope_theta, 4)
    path = tmp_path_factory.mktemp("good") / "model.safetensors"
    save_file(state, path)
    return {
        "zip": (saved({"teacher": state, "epoch": 3}), "weights.pth"),
        "legacy": (saved(state, _use_new_zipfile_serialization=False), "weights.pt"),
        "safetensors": (path.read_bytes(), "weights.safetensors"),
    }


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """An encoder in one file, in shards and in a pickle; a model with its processor."""
    root = tmp_path_factory.mktemp("directories")
    encoder = DINOv3Encoder(config_of(**ENCODER))
    encoder.save_pretrained(root / "single")
    encoder.save_pretrained(root / "shards", max_shard_size="3KB")
    shutil.copytree(root / "single", root / "pickle")
    weights = root / "pickle" / "model.safetensors"
    torch.save(load_file(weights), root / "pickle" / "pytorch_model.bin")
    weights.unlink()
    model_of().save_pretrained(root / "vlm")
    processor_of().save_pretrained(root / "vlm")
    return root


def check_named(load, path):
    """`load` succeeds, or its error names the path and has the loader's own as its cause."""
    try:
        load()
    except ValueError as error:
        assert str(path) in str(error) and not isinstance(error, UnicodeError)
        return error
    except OSError as error:  # transformers' own, for a file that is not there
        assert str(path) in str(error)
        return error
    return None


def test_good_files_load(files, tmp_path):
    """Else the tests below would be satisfied by any error."""
    for content, name in files.values():
        (tmp_path / name).write_bytes(content)
        assert open_checkpoint(tmp_path / name).config.hidden_size == 16


@pytest.mark.parametrize("kind", ["zip", "pickle", "legacy", "safetensors"])
def test_mutated_files_are_named(kind, files, tmp_path):
    content, name = files["zip" if kind == "pickle" else kind]
    change, path = (mutate_pickle_in_zip if kind == "pickle" else mutate), tmp_path / name
    named = 0
    for seed in range(150):
        path.write_bytes(change(content, random.Random(seed)))
        load = DINOv3Encoder.from_pretrained if seed % 30 == 0 else open_checkpoint
        named += check_named(lambda load=load: load(path), path) is not None
    assert named > 100


@pytest.mark.parametrize("kind", ["single", "shards", "pickle", "vlm"])
def test_mutated_directories_are_named(kind, directories, tmp_path):
    loaders = [DINOv3Encoder.from_pretrained, lambda path: load_encoder(str(path), device="cpu")]
    if kind == "vlm":
        loaders = [VisionLanguageModel.from_pretrained, VLMProcessor.from_pretrained]
        loaders += [lambda path: load_vlm(str(path), device="cpu")]
    directory, named = tmp_path / "damaged", 0
    for seed in range(24):
        rng = random.Random(seed)
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(directories / kind, directory)
        victim = rng.choice(sorted(directory.iterdir()))
        change = mutate_json if victim.suffix == ".json" else mutate
        victim.write_bytes(change(victim.read_bytes(), rng))
        load = rng.choice(loaders)
        named += check_named(lambda load=load: load(directory), directory) is not None
    assert named > 4


DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "cut_at_the_end": lambda content: content[:-30],
    "pointer": lambda content: POINTER,
    "page": lambda content: b"<!DOCTYPE html><html>Log in</html>",
    "zeros": lambda content: bytes(len(content)),
    "start_of_a_zip": lambda content: b"PK\x03\x04" + bytes(200),
    "list": lambda content: b"[1, 2]",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_each_file_of_a_directory_is_named_when_damaged(damage, directories, tmp_path):
    for kind, load, names in (
        ("single", DINOv3Encoder.from_pretrained, ["config.json", "model.safetensors"]),
        ("pickle", DINOv3Encoder.from_pretrained, ["pytorch_model.bin"]),
        ("shards", DINOv3Encoder.from_pretrained, ["model.safetensors.index.json"]),
        ("vlm", VisionLanguageModel.from_pretrained, ["config.json", "model.safetensors"]),
        ("vlm", VisionLanguageModel.from_pretrained, ["generation_config.json"]),
        ("vlm", VLMProcessor.from_pretrained, ["tokenizer.json", "processor_config.json"]),
    ):
        for name in names:
            directory = tmp_path / f"{kind}-{name}"
            shutil.copytree(directories / kind, directory)
            content = (directory / name).read_bytes()
            (directory / name).write_bytes(DAMAGE[damage](content))
            error = check_named(lambda load=load, path=directory: load(path), directory / name)
            assert isinstance(error, ValueError), (kind, name)
            if damage == "pointer":
                assert "git lfs pull" in str(error)


@pytest.mark.parametrize("content", [b"null", b"3", b"[]", b"\xff\xfe", b"{"], ids=repr)
def test_documents_that_are_read_alone_are_named_when_damaged(content, directories, tmp_path):
    shutil.copytree(directories / "vlm", tmp_path / "vlm")
    for name, load in (
        ("processor_config.json", VLMImageProcessor.from_pretrained),
        ("config.json", VLMConfig.from_pretrained),
    ):
        (tmp_path / "vlm" / name).write_bytes(content)
        error = check_named(lambda load=load: load(tmp_path / "vlm"), tmp_path / "vlm")
        assert error is not None and name in str(error)


@pytest.mark.parametrize("key", [1, None, ("a", "b"), b"x"], ids=repr)
def test_keys_that_are_no_strings_name_their_file(key, directories, tmp_path):
    for kind, load in (
        ("pickle", DINOv3Encoder.from_pretrained),
        ("vlm", VisionLanguageModel.from_pretrained),
    ):
        shutil.copytree(directories / kind, tmp_path / kind)
        weights, path = tmp_path / kind / "model.safetensors", tmp_path / kind / "pytorch_model.bin"
        state = load_file(weights) if weights.exists() else torch.load(path)
        weights.unlink(missing_ok=True)
        torch.save({**state, key: torch.zeros(2)}, path)
        error = check_named(lambda kind=kind, load=load: load(tmp_path / kind), path)
        assert "no string" in str(error)
    torch.save({key: torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth: the key .* is no string"):
        load_checkpoint(tmp_path / "weights.pth")


def test_what_is_not_a_checkpoint_is_named(files, tmp_path):
    for name, content in (
        ("config.pth", saved({"epoch": 1})),
        ("list.pth", saved([torch.ones(1)])),
        ("other.pth", saved({"fc.weight": torch.ones(2, 2)})),
        (
            "scalars.pth",
            saved({"patch_embed.proj.weight": torch.ones(()), "reg_token": torch.ones(1)}),
        ),
        ("integers.pth", saved(_integers(files))),
        ("heads.pth", saved(_without_periods(files))),
        ("sparse.pth", saved(_with_norm(files, torch.ones(64).to_sparse()))),
        ("meta.pth", saved(_with_norm(files, torch.ones(64, device="meta")))),
        ("no_layer.pth", saved(_without_layers(files))),
        ("index.json", json.dumps({"weight_map": {"a": 1}}).encode()),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        for load in (
            DINOv3Encoder.from_pretrained,
            lambda path: convert(path, tmp_path / "out"),
            lambda path: load_encoder(str(path), device="cpu"),
            lambda path: load_into(DINOv3Encoder(config_of()), path),
        ):
            error = check_named(lambda load=load, path=path: load(path), path)
            assert isinstance(error, ValueError), name
    recursive: dict = {"model": {}}
    recursive["model"]["again"] = recursive
    torch.save(recursive, tmp_path / "recursive.pth")
    with pytest.raises(ValueError, match=r"recursive\.pth: damaged torch\.save file"):
        load_checkpoint(tmp_path / "recursive.pth")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(ValueError, match=r"folder\.pth: no checkpoint in it"):
        DINOv3Encoder.from_pretrained(tmp_path / "folder.pth")


def test_a_tensor_that_is_not_stored_whole(files, directories, tmp_path):
    """torch would take what comes behind it in the file for the rest."""
    shutil.copytree(directories / "pickle", tmp_path / "pickle")
    for path, load in (
        (tmp_path / "weights.pth", load_checkpoint),
        (tmp_path / "pickle" / "pytorch_model.bin", lambda _: load_encoder(tmp_path / "pickle")),
    ):
        content = path.read_bytes() if path.exists() else files["zip"][0]
        with (
            zipfile.ZipFile(io.BytesIO(content)) as whole,
            zipfile.ZipFile(path, "w") as cut,
        ):
            for info in whole.infolist():
                data = whole.read(info)
                cut.writestr(info.filename, data[:3] if info.filename.endswith("data/1") else data)
        with pytest.raises(ValueError, match=rf"{path}: damaged .*bytes is not stored whole"):
            load(path)


def _without_layers(files):
    state = torch.load(io.BytesIO(files["legacy"][0]))
    return {key: tensor for key, tensor in state.items() if "blocks." not in key}


def _integers(files):
    state = torch.load(io.BytesIO(files["legacy"][0]))
    return {key: tensor.to(torch.int32) for key, tensor in state.items()}


def _with_norm(files, weight):
    return torch.load(io.BytesIO(files["legacy"][0])) | {"norm.weight": weight}


def _without_periods(files):
    state = torch.load(io.BytesIO(files["legacy"][0]))
    return {key: tensor for key, tensor in state.items() if "periods" not in key}
