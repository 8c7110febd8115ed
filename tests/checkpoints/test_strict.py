"""Weights that are not the model's raise and are named; transformers' own ways remain."""

import json
import shutil

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, DINOv3ViTConfig, DINOv3ViTModel
from transformers.integrations.peft import MIN_PEFT_VERSION

from hrvlm import DINOv3Encoder, VisionLanguageModel
from hrvlm.checkpoints.convert import convert, from_transformers
from hrvlm.images.processor import IMAGENET
from hrvlm.inference.loading import load_encoder
from hrvlm.training.trainer import VLMTrainer, VLMTrainingArguments
from hrvlm.vlm.backbones import load_vision
from tests.checkpoints.states import assert_same, canonical_of
from tests.encoder.encoders import config_of, pair_of
from tests.tiny import model_of, vision_config_of

WEIGHTS = "model.safetensors"
FEWER_LAYERS = {
    "num_hidden_layers": 2,
    "stage_names": None,
    "out_features": None,
    "out_indices": None,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of an encoder and of a vision-language model that uses it."""
    root = tmp_path_factory.mktemp("saved")
    pair_of()[1].save_pretrained(root / "encoder")
    model_of().save_pretrained(root / "vlm")
    return root


def changed(source, target, change=lambda weights: None, **fields):
    """A copy of a directory with other weights and other fields in its config."""
    shutil.copytree(source, target)
    weights = load_file(target / WEIGHTS)
    change(weights)
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


def without(*parts):
    def change(weights):
        for key in [key for key in weights if any(part in key for part in parts)]:
            del weights[key]

    return change


def more(**tensors):
    return lambda weights: weights.update(tensors)


NOTHING = without()
UNFIT = {
    "missing": ("encoder", without("norm1.bias"), {}, r"missing \(3\): layer.\{0..2\}.norm1.bias"),
    "no_keys": (
        "encoder",
        without("k_proj"),
        {},
        r"missing \(3\): layer.\{0..2\}.attention.k_proj.weight \(3\)\n\(",
    ),
    "left_over": ("encoder", more(extra=torch.ones(1)), {}, r"unexpected \(1\): extra"),
    "shape": (
        "encoder",
        lambda weights: weights.update({"norm.weight": torch.ones(3)}),
        {},
        r"shape \[3\] instead of \[64\] \(1\): norm.weight",
    ),
    "width_of_keys": (
        "encoder",
        lambda weights: weights.update({"layer.0.attention.k_proj.weight": torch.ones(64, 3)}),
        {},
        r"shape .* instead of .*: layer.0.attention.qkv.weight",
    ),
    "parts_of_a_matrix": (
        "encoder",
        lambda weights: weights.update(
            {
                "layer.0.attention.q_proj.weight": torch.ones(65, 64),
                "layer.0.attention.k_proj.weight": torch.ones(63, 64),
            }
        ),
        {},
        r"shape .* instead of .*: layer.0.attention.qkv.weight",
    ),
    "integers": (
        "encoder",
        lambda weights: weights.update({"norm.weight": weights["norm.weight"].to(torch.int8)}),
        {},
        r"norm.weight is stored as torch.int8, expected floating-point numbers",
    ),
    "integers_of_a_fused_matrix": (
        "vlm",
        lambda weights: weights.update(
            {key: t.to(torch.uint8) for key, t in weights.items() if "layer.1.attention.k_" in key}
        ),
        {},
        r"layer.1.attention.k_proj.weight is stored as torch.uint8",
    ),
    "twice": (
        "encoder",
        lambda weights: weights.update({"model.layer.1.norm1.bias": torch.zeros(64)}),
        {},
        r"stored twice: layer.1.norm1.bias",
    ),
    "twice_as_parts": (
        "vlm",
        more(**{"vision_encoder.layer.0.attention.qkv.weight": torch.zeros(96, 32)}),
        {},
        r"stored twice: vision_encoder.layer.0.attention.k_proj.weight, ",
    ),
    "of_another_model": (
        "encoder",
        lambda weights: [weights.update({f"net.{key}": weights.pop(key)}) for key in [*weights]],
        {},
        r"a checkpoint of another model: none of its 52 weights \(as net.embeddings.cls_token\)",
    ),
    "registers": ("encoder", NOTHING, {"num_register_tokens": 2}, r"\[1, 4, 64\] instead of"),
    "fewer_layers": (
        "encoder",
        NOTHING,
        FEWER_LAYERS,
        r"unexpected \(15\)",
    ),
    "more_layers": ("encoder", NOTHING, {"num_hidden_layers": 4}, r"missing \(15\): layer.3"),
    "other_size": ("encoder", NOTHING, {"hidden_size": 128}, r"shape \[64\] instead of \[128\]"),
    "other_mlp": ("encoder", NOTHING, {"use_gated_mlp": True}, r"missing .*mlp.gate_proj"),
    "projector": ("vlm", without("MP."), {}, r"missing \(1\): MP.proj.weight"),
    "factor": ("vlm", NOTHING, {"mp_pixel_shuffle_factor": 1}, r"\(1\): MP.proj.weight"),
    "language": (
        "vlm",
        without("layers.1.self_attn.q"),
        {},
        r"missing .*layers.1.self_attn.q",
    ),
    "vision": ("vlm", without("layer.1.norm2"), {}, r"missing .*layer.1.norm2.bias"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_weights_that_do_not_fit_raise_and_are_named(case, saved, tmp_path, caplog):
    kind, change, fields, message = UNFIT[case]
    directory = changed(saved / kind, tmp_path / "changed", change, **fields)
    classes = {"encoder": [DINOv3Encoder], "vlm": [VisionLanguageModel, AutoModel]}
    for model_class in classes[kind]:
        with pytest.raises(ValueError, match=f"(?s){directory}: .*{message}"):
            model_class.from_pretrained(directory)
    assert "LOAD REPORT" not in caplog.text


def test_transformers_own_leniency_can_be_asked_for(saved, tmp_path):
    directory = changed(saved / "vlm", tmp_path / "missing", without("MP."))
    model = AutoModelForImageTextToText.from_pretrained(directory, strict=False)
    assert model.MP.proj.weight.isfinite().all()
    _, info = VisionLanguageModel.from_pretrained(directory, strict=False, output_loading_info=True)
    assert info["missing_keys"] == {"MP.proj.weight"}

    directory = changed(saved / "encoder", tmp_path / "registers", num_register_tokens=2)
    other = DINOv3Encoder.from_pretrained(directory, ignore_mismatched_sizes=True)
    assert other.embeddings.register_tokens.shape == (1, 2, 64)
    with pytest.raises(ValueError, match=r"\(1\): embeddings.register_tokens"):
        DINOv3Encoder.from_pretrained(directory, strict=False)
    directory = changed(saved / "encoder", tmp_path / "both", without("cls_token"))
    with pytest.raises(ValueError, match=r"missing .*cls_token"):
        DINOv3Encoder.from_pretrained(directory, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("strict", ["no", None, 0])
def test_strict_is_true_or_false(strict, saved):
    with pytest.raises(ValueError, match=f"strict={strict!r}"):
        DINOv3Encoder.from_pretrained(saved / "encoder", strict=strict)


def test_numbers_that_no_model_has_name_their_file(saved, tmp_path):
    directory = changed(saved / "encoder", tmp_path / "complex")
    head = {"norm.weight": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}
    text = json.dumps(head).encode()
    (directory / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=f"{directory / WEIGHTS}: "):
        DINOv3Encoder.from_pretrained(directory)


def test_a_lacking_part_of_a_fused_matrix_is_missing_and_no_other_shape(saved, tmp_path):
    key = "vision_encoder.layer.1.attention.k_proj.weight"
    directory = changed(saved / "vlm", tmp_path / "vlm", without(key))
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=rf":\nmissing \(1\): {key}\n\("):
            VisionLanguageModel.from_pretrained(directory, **options)
    fused = key.replace("k_proj", "qkv")
    model, info = VisionLanguageModel.from_pretrained(
        directory, strict=False, output_loading_info=True
    )
    assert info["missing_keys"] == {fused} and not info["mismatched_keys"]
    assert 0 < model.get_parameter(fused).std() < 1
    assert not hasattr(model, "_absent_parts")


@pytest.mark.parametrize("part", ["encoder", "vlm"])
def test_one_part_of_a_fused_matrix_of_another_shape(part, saved, tmp_path):
    prefix = "" if part == "encoder" else "vision_encoder."
    key = f"{prefix}layer.1.attention.k_proj.weight"

    def shrink(weights):
        weights[key] = weights[key][:3, :3].clone()

    directory = changed(saved / part, tmp_path / part, shrink)
    model_class = DINOv3Encoder if part == "encoder" else VisionLanguageModel
    for options in ({}, {"strict": False}):
        with pytest.raises(ValueError, match=r"shape \[3, 3\] instead of \[(\d+), \1\] \(1\): "):
            model_class.from_pretrained(directory, **options)
    model = model_class.from_pretrained(directory, ignore_mismatched_sizes=True)
    drawn = model.get_parameter(f"{prefix}layer.1.attention.qkv.weight")
    assert 0 < drawn.std() < 0.1
    assert model.get_parameter(f"{prefix}layer.0.attention.qkv.weight").std() > 0.1


def test_what_is_no_file_and_no_directory_is_not_looked_for_on_the_hub(tmp_path):
    for path in ("dinov3_vits16.pth", tmp_path / "model.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"{path}: no such file or directory"):
            DINOv3Encoder.from_pretrained(path)
        with pytest.raises(ValueError, match=f"{path}: no such file or directory"):
            load_encoder(str(path))


def test_an_adapter_of_a_weight_file_says_how_to_load_it(tmp_path):
    _, tensors = canonical_of()
    torch.save(tensors, tmp_path / "dinov3.pth")
    encoder = DINOv3Encoder.from_pretrained(tmp_path / "dinov3.pth", num_attention_heads=2)
    adapter = get_peft_model(encoder, LoraConfig(target_modules=["qkv"]))
    adapter.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"an adapter of .*dinov3.pth.*PeftModel"):
        DINOv3Encoder.from_pretrained(tmp_path / "adapter")


def test_keys_of_transformers_memory_load_exactly_and_are_saved_as_in_its_files(tmp_path, saved):
    theirs, ours = pair_of()
    save_file(theirs.state_dict(), tmp_path / WEIGHTS, metadata={"format": "pt"})
    theirs.config.save_pretrained(tmp_path)
    loaded, info = DINOv3Encoder.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same(loaded.state_dict(), ours.state_dict())
    loaded.save_pretrained(tmp_path / "again")
    assert_same(load_file(tmp_path / "again" / WEIGHTS), load_file(saved / "encoder" / WEIGHTS))

    def renamed(weights):
        for key in [key for key in weights if key.startswith("vision_encoder.layer.")]:
            weights[key.replace(".layer.", ".model.layer.", 1)] = weights.pop(key)

    directory = changed(saved / "vlm", tmp_path / "vlm", renamed)
    assert_same(
        VisionLanguageModel.from_pretrained(directory).state_dict(),
        VisionLanguageModel.from_pretrained(saved / "vlm").state_dict(),
    )


def test_our_own_keys_in_memory_load_and_are_saved_as_in_transformers_files(tmp_path, saved):
    for kind, model_class in (("encoder", DINOv3Encoder), ("vlm", VisionLanguageModel)):
        model = model_class.from_pretrained(saved / kind)
        target = tmp_path / kind
        shutil.copytree(saved / kind, target)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        save_file(state, target / WEIGHTS, metadata={"format": "pt"})
        again = model_class.from_pretrained(target)
        assert_same(again.state_dict(), model.state_dict())
        again.save_pretrained(target / "again")
        assert (
            load_file(target / "again" / WEIGHTS).keys() == load_file(saved / kind / WEIGHTS).keys()
        )


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"dtype": "auto"},
        {"device_map": "cpu"},
        {"low_cpu_mem_usage": True},
        {"use_safetensors": True},
        {"device_map": {"": "disk"}},
    ],
    ids=str,
)
def test_transformers_options_go_on_working(options, saved, tmp_path):
    if "disk" in str(options):
        options = options | {"offload_folder": str(tmp_path)}
    model = VisionLanguageModel.from_pretrained(saved / "vlm", **options)
    assert not hasattr(model, "_own_loading_info")
    assert model.dtype == (
        torch.bfloat16 if options.get("dtype") == torch.bfloat16 else model.dtype
    )


def test_a_stock_checkpoint_in_shards_loads(tmp_path):
    theirs = DINOv3ViTModel(config_of())
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    ours = DINOv3Encoder.from_pretrained(tmp_path)
    reference = DINOv3Encoder(DINOv3ViTConfig.from_pretrained(tmp_path))
    reference.load_state_dict(theirs.state_dict())
    assert_same(ours.state_dict(), reference.state_dict())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_weight_in_two_shards_raises(suffix, saved, tmp_path):
    weights = load_file(saved / "encoder" / WEIGHTS)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = [f"{stem}-{i}.{suffix}" for i in (1, 2)]
    first = {key: tensor for key, tensor in weights.items() if key < "layer.1"}
    second = {key: tensor for key, tensor in weights.items() if key >= "layer.1"}
    second["embeddings.cls_token"] = torch.zeros(1, 1, 64)
    write = save_file if suffix == "safetensors" else torch.save
    for name, part in zip(names, (first, second), strict=True):
        write(part, tmp_path / name)
    files = dict.fromkeys(second, names[1]) | dict.fromkeys(first, names[0])
    index = tmp_path / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    with pytest.raises(ValueError, match=rf"{index}: embeddings.cls_token is in several shards"):
        convert(tmp_path, tmp_path / "converted")
    shutil.copy(saved / "encoder" / "config.json", tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}: stored twice: embeddings.cls_token$"):
        DINOv3Encoder.from_pretrained(tmp_path)


def test_parts_of_a_matrix_of_different_shapes_raise_in_resuming_too(saved):
    encoder = DINOv3Encoder.from_pretrained(saved / "encoder")
    state = load_file(saved / "encoder" / WEIGHTS)
    for name, rows in (("q", 65), ("k", 63)):
        state[f"layer.0.attention.{name}_proj.weight"] = torch.ones(rows, 64)
    with pytest.raises(RuntimeError, match=r"layer.0.attention.q_proj.weight, .*different shapes"):
        encoder.load_state_dict(state, strict=False)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers wants PEFT {MIN_PEFT_VERSION}, here is {peft.__version__}",
)
def test_an_adapter_is_judged_and_so_is_the_model_below_it(saved, tmp_path):
    base = shutil.copytree(saved / "vlm", tmp_path / "base")
    adapted = get_peft_model(
        VisionLanguageModel.from_pretrained(base), LoraConfig(target_modules=["q_proj", "qkv"])
    )
    directory, weights = tmp_path / "adapter", "adapter_model.safetensors"
    adapted.save_pretrained(directory)
    assert VisionLanguageModel.from_pretrained(directory).active_adapters() == ["default"]
    state = load_file(directory / weights)
    one = min(state)
    save_file({k: t for k, t in state.items() if k != one}, directory / weights)
    with pytest.raises(ValueError, match=r"adapter: .*\nmissing \(1\): .*lora_A"):
        VisionLanguageModel.from_pretrained(directory)
    save_file(state, directory / weights)
    state = load_file(base / WEIGHTS)
    del state["MP.proj.weight"]
    save_file(state, base / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"base: .*\nmissing \(1\): MP.proj"):
        VisionLanguageModel.from_pretrained(directory)


def test_resuming_from_shards_restores_all_and_lacking_weights_raise(tmp_path):
    """Of a layer, q, k and v come one after the other, in a shard each."""
    model = model_of(seed=1)
    model.save_pretrained(tmp_path / "whole")
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    whole = load_file(tmp_path / "whole" / WEIGHTS)
    parts = ("q_proj", "k_proj", "v_proj")
    files = {key: f"{next((p for p in parts if p in key), 'rest')}.safetensors" for key in whole}
    for file in set(files.values()):
        shard = {key: tensor for key, tensor in whole.items() if files[key] == file}
        save_file(shard, checkpoint / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (checkpoint / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    other = model_of(seed=2)
    arguments = VLMTrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
    trainer = VLMTrainer(other, arguments)
    trainer._load_from_checkpoint(str(checkpoint))
    assert_same(other.state_dict(), model.state_dict())

    changed(tmp_path / "whole", tmp_path / "lacking", without("layer.1.attention.k_proj", "MP."))
    with pytest.raises(ValueError, match=r"missing \(2\): MP.proj.weight, .*k_proj.weight"):
        trainer._load_from_checkpoint(str(tmp_path / "lacking"))


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "safetensors"])
@pytest.mark.parametrize("layout", ["meta", "timm", "transformers", "transformers_memory", "fused"])
def test_a_weight_file_of_any_layout_loads_as_converted(layout, suffix, tmp_path):
    _, tensors = canonical_of(hidden_size=384, num_attention_heads=6, num_hidden_layers=2)
    state = from_transformers(tensors, layout)
    if suffix == "safetensors":
        save_file({key: t.clone() for key, t in state.items()}, tmp_path / "weights.safetensors")
    else:
        state = {"teacher": {f"backbone.{key}": tensor for key, tensor in state.items()}}
        torch.save(state, tmp_path / f"weights.{suffix}")
    path = tmp_path / f"weights.{suffix}"
    convert(path, tmp_path / "converted")
    expected = DINOv3Encoder.from_pretrained(tmp_path / "converted")
    encoder = DINOv3Encoder.from_pretrained(path, backend="eager")
    assert_same(encoder.state_dict(), expected.state_dict())
    assert encoder.backend == "eager" and encoder.name_or_path == str(path)
    encoder.save_pretrained(tmp_path / "again")
    assert_same(
        load_file(tmp_path / "again" / WEIGHTS), load_file(tmp_path / "converted" / WEIGHTS)
    )


def test_files_take_options_and_a_config_and_are_strict(tmp_path):
    config, tensors = canonical_of()
    path = tmp_path / "weights" / "dinov3.pth"
    path.parent.mkdir()
    torch.save(from_transformers(tensors, "meta", config), path)
    from_directory = DINOv3Encoder.from_pretrained(path.parent, dtype=torch.bfloat16)
    assert from_directory.dtype == torch.bfloat16
    assert load_vision(str(path)).config.num_attention_heads == 2
    named = load_encoder(str(path), device="cpu")
    assert named.normalization.mean == IMAGENET.mean and not named.random_weights
    assert DINOv3Encoder.from_pretrained(path, layer_norm_eps=1e-3).norm.eps == 1e-3

    with pytest.raises(ValueError, match=r"num_hidden_layers=5, the weights have 3"):
        DINOv3Encoder.from_pretrained(path, config=config_of(num_hidden_layers=5))
    wrong = config_of(num_register_tokens=1)
    with pytest.raises(ValueError, match=r"shape \[1, 4, 64\] instead of \[1, 1, 64\]"):
        DINOv3Encoder.from_pretrained(path, config=wrong)
    fitted = DINOv3Encoder.from_pretrained(path, config=wrong, ignore_mismatched_sizes=True)
    assert fitted.num_prefix_tokens == 2
    for key in ("layer.1.norm1.bias", "norm.weight"):
        del tensors[key]
    torch.save(tensors, path)
    with pytest.raises(ValueError, match=r"dinov3.pth: .*\nmissing \(2\): .*norm.weight"):
        DINOv3Encoder.from_pretrained(path, config=config)
    lax, info = DINOv3Encoder.from_pretrained(
        path, config=config, strict=False, output_loading_info=True
    )
    assert info["missing_keys"] == {"layer.1.norm1.bias", "norm.weight"} and lax.norm.weight.all()
    for options in ({}, {"config": model_of().config}):
        with pytest.raises(ValueError, match="is a file, expected a directory or a hub id"):
            VisionLanguageModel.from_pretrained(path, **options)


def test_a_state_dict_in_place_of_a_directory_is_judged_too():
    _, ours = pair_of()
    state = ours.state_dict()
    del state["norm.bias"]
    with pytest.raises(ValueError, match=r"state_dict: .*\nmissing \(1\): norm.bias"):
        DINOv3Encoder.from_pretrained(None, config=ours.config, state_dict=state)
    assert vision_config_of().num_register_tokens == 4
