"""Checkpoint files of every container format load, and convert() writes transformers' layout."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map
from transformers import AutoImageProcessor, DINOv3ViTConfig, DINOv3ViTModel

from hrvlm import DINOv3Encoder
from hrvlm.checkpoints.convert import (
    convert,
    from_transformers,
    load_checkpoint,
    load_into,
    to_transformers,
)
from hrvlm.checkpoints.family import get_config
from tests.checkpoints.states import assert_same, canonical_of, meta_state, periods_of
from tests.encoder.encoders import config_of


def test_files_of_every_kind_load(tmp_path):
    _, tensors = canonical_of()
    torch.save(tensors, tmp_path / "zip.pth")
    torch.save({"model": tensors}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "weights.bin")  # the content counts, not the name
    assert_same(load_checkpoint(tmp_path / "zip.pth"), tensors)
    assert_same(to_transformers(load_checkpoint(tmp_path / "legacy")), tensors)
    assert_same(load_checkpoint(str(tmp_path / "weights.bin")), tensors)

    DINOv3ViTModel(config_of()).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shards = sorted((tmp_path / "sharded").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    whole = load_checkpoint(tmp_path / "sharded")
    assert whole.keys() == tensors.keys()
    assert_same(load_checkpoint(tmp_path / "sharded" / "model.safetensors.index.json"), whole)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"its shard {shards[0].name} is missing"):
        load_checkpoint(tmp_path / "sharded")

    single = tmp_path / "single"
    single.mkdir()
    torch.save(tensors, single / "teacher_checkpoint.pth")
    assert_same(load_checkpoint(single), tensors)
    torch.save(tensors, single / "another.pth")
    with pytest.raises(ValueError, match=r"several checkpoints \(another\.pth, teacher_checkpoint"):
        load_checkpoint(single)


def test_a_header_may_begin_like_a_pickle_or_an_archive(tmp_path):
    """safetensors begins with the length of its header: of 1 in 32 files the byte of a pickle."""
    begins = set()
    for length in range(0, 256, 8):
        save_file({"w": torch.ones(2)}, tmp_path / "w", metadata={"padding": "x" * length})
        begins.add((tmp_path / "w").read_bytes()[:1])
        assert torch.equal(load_checkpoint(tmp_path / "w")["w"], torch.ones(2))
    assert b"\x80" in begins


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({0: 1.0}, "the key 0 of a tensor is no string"),
        ({"m": {"0": 1.0, 0: 2.0}}, "two tensors have the key 'm.0'"),
        ({"m": {"0": {"w": 1.0}, 0: {"w": 2.0}}}, "two tensors have the key 'm.0.w'"),
        ({"m": {"w": 1.0}, "m.w": 2.0}, "two tensors have the key 'm.w'"),
    ],
)
def test_keys_of_tensors_are_strings_and_stand_once(tmp_path, tree, message):
    tree = tree_map(torch.tensor, tree)
    torch.save(tree, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"w\.pth: {message}"):
        load_checkpoint(tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"^{message}"):
        to_transformers(tree)


def test_the_state_of_an_optimizer_has_numbers_for_keys(tmp_path):
    layer = torch.nn.Linear(2, 2)
    layer(torch.ones(2)).sum().backward()
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.step()
    states = {"model": layer.state_dict(), "optimizer": optimizer.state_dict()}
    states["losses"] = {0: torch.tensor(1.0)}
    torch.save(states, tmp_path / "w.pth")
    loaded = load_checkpoint(tmp_path / "w.pth")
    assert torch.equal(loaded["model.weight"], layer.weight)
    assert "optimizer.state.0.exp_avg" in loaded


class Payload:
    def __reduce__(self):
        return print, ("code in a checkpoint ran",)


def test_bad_files_are_named_and_run_no_code(tmp_path, capsys):
    _, tensors = canonical_of()
    save_file(tensors, tmp_path / "good.safetensors")
    content = (tmp_path / "good.safetensors").read_bytes()
    torch.save(tensors, tmp_path / "good.pth")
    bad = {
        "cut.safetensors": content[:-100],
        "cut.pth": (tmp_path / "good.pth").read_bytes()[:-1000],
        "text.pth": b"version https://git-lfs.github.com/spec/v1\n",
        "empty.pth": b"",
        "code.pth": pickle.dumps({"model": Payload()}, protocol=2),
        "list.pth": None,
        "numbers.pth": None,
    }
    for name, data in bad.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 1}, tmp_path / "numbers.pth")
    for name in bad:
        with pytest.raises(ValueError, match=name):
            load_checkpoint(tmp_path / name)
    assert "ran" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(ValueError, match="no checkpoint in it"):
        load_checkpoint(tmp_path / "hollow")
    index = tmp_path / "model.safetensors.index.json"
    for document, message in (
        ({"weight_map": {"norm.weight": "../good.safetensors"}}, "not a plain file name"),
        ({"weight_map": {"absent": "good.safetensors"}}, "the first is absent"),
        ({"metadata": {}}, "no weight_map"),
    ):
        index.write_text(json.dumps(document))
        with pytest.raises(ValueError, match=message):
            load_checkpoint(index)
    index.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_checkpoint(index)


@pytest.mark.parametrize("name", ["vit", "vit_gated", "vit_7b", "patch_8"])
def test_converted_checkpoints_load_bit_equal_in_transformers(name, tmp_path):
    config = config_of(name, layer_norm_eps=1e-5)
    state = meta_state(config) | periods_of(
        config.rope_theta, config.hidden_size // config.num_attention_heads // 4
    )
    torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()}}, tmp_path / "eval.pth")
    info = convert(tmp_path / "eval.pth", tmp_path / "out")
    assert info.layout == "meta" and info.prefix == "teacher.backbone."
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    model, report = DINOv3ViTModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert_same(to_transformers(model.state_dict()), to_transformers(state))
    for key, value in config.to_dict().items():
        if key not in ("architectures", "dtype", "transformers_version", "_name_or_path"):
            assert getattr(model.config, key) == value, key
    assert model.config.architectures == ["DINOv3ViTModel"]
    assert DINOv3Encoder.from_pretrained(tmp_path / "out").config.hidden_size == config.hidden_size
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert type(processor).__name__.startswith("DINOv3ViTImageProcessor")
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406)


def test_convert_casts_overwrites_and_leaves_nothing_half_done(tmp_path):
    _, tensors = canonical_of()
    out = tmp_path / "deep" / "out"
    with pytest.raises(ValueError, match="num_attention_heads"):
        convert(tensors, out)
    with pytest.raises(TypeError, match="no fields of DINOv3ViTConfig: heads"):
        convert(tensors, out, heads=2)
    with pytest.raises(
        ValueError, match=r"(?s)the config does not fit.*\nshape \[96, 64\] instead of"
    ):
        convert(tensors, out, num_attention_heads=2, intermediate_size=128)
    with pytest.raises(
        ValueError, match="pixel_statistics must be imagenet or sat493m, got 'clip'"
    ):
        convert(tensors, out, num_attention_heads=2, pixel_statistics="clip")
    assert not out.exists()
    convert(tensors, out, dtype=torch.bfloat16, num_attention_heads=2)
    stored = load_file(out / "model.safetensors")
    assert_same(stored, {key: value.bfloat16() for key, value in tensors.items()})
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert DINOv3ViTModel.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o666 & ~_umask()}
    with pytest.raises(
        FileExistsError, match=r"config\.json, .*model\.safetensors; pass overwrite"
    ):
        convert(tensors, out, num_attention_heads=2)
    assert_same(load_file(out / "model.safetensors"), stored)
    convert(tensors, out, num_attention_heads=2, overwrite=True)
    assert_same(load_file(out / "model.safetensors"), tensors)
    assert len(list(out.iterdir())) == 3


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_convert_keeps_the_documents_of_a_transformers_directory(tmp_path):
    config, tensors = canonical_of("patch_8")
    source = tmp_path / "source"
    model = DINOv3ViTModel(config)
    load_into(model, tensors)
    model.save_pretrained(source)
    preprocessor = {
        "image_processor_type": "DINOv3ViTImageProcessor",
        "size": {"height": 64, "width": 64},
    }
    (source / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    convert(source, tmp_path / "out", image_size=512)
    again = DINOv3ViTConfig.from_pretrained(tmp_path / "out")
    assert (again.rope_theta, again.layer_norm_eps, again.image_size) == (50.0, 1e-6, 512)
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == preprocessor
    assert_same(load_checkpoint(tmp_path / "out"), tensors)
    convert(source, source, overwrite=True, pixel_statistics="sat493m")
    stored = json.loads((source / "preprocessor_config.json").read_text())
    assert stored["image_mean"] == [0.430, 0.411, 0.296]
    assert_same(load_checkpoint(source), tensors)


def test_a_satellite_vit_l_is_told_by_its_local_norm(tmp_path):
    """Shapes of a ViT-L with one layer: only the one trained on satellite images has the norm."""
    state = from_transformers(
        _zeros_of(get_config("vitl16", num_hidden_layers=1, intermediate_size=8, patch_size=1)),
        "meta",
    )
    norm = {"local_cls_norm.weight": torch.ones(1024), "local_cls_norm.bias": torch.zeros(1024)}
    for extra, mean in (({}, 0.485), (norm, 0.430)):
        convert(state | extra, tmp_path / str(mean))
        stored = json.loads((tmp_path / str(mean) / "preprocessor_config.json").read_text())
        assert stored["image_mean"][0] == mean


def _zeros_of(config):
    with torch.device("meta"):
        state = DINOv3ViTModel(config).state_dict()
    return {key: torch.zeros(value.shape) for key, value in state.items()}
