"""Features by the vision tower of another model, from its directory: rows, layers, a search."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3Model,
    MistralModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Siglip2Config,
    Siglip2Model,
)

from hrvlm import VisionLanguageModel, VLMProcessor
from hrvlm.embed.config import EmbedConfig
from hrvlm.embed.store import Store, part_name
from hrvlm.images.processor import get_image_processor
from hrvlm.inference.towers import load_tower
from hrvlm.vlm.tokenizer import get_tokenizer
from tests.commands.helpers import error_of, run
from tests.embed.here import rows_of, run_here
from tests.embed.pictures import MEAN, STD, write_pictures

COUNT = 6
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 64}
_QWEN = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "patch_size": 8}
_QWEN |= {"out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1]}


def qwen():
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    config = Qwen2_5_VLConfig(vision_config=_QWEN, text_config=text)
    return Qwen2_5_VLForConditionalGeneration(config)


def mistral():
    vision = {"model_type": "pixtral", **SMALL, "patch_size": 8, "image_size": 64}
    text = {"model_type": "mistral", **TEXT, "head_dim": 16}
    return Mistral3Model(Mistral3Config(vision_config=vision, text_config=text))


def siglip2():
    vision, text = {**SMALL, "patch_size": 8, "num_patches": 16}, {**SMALL, "vocab_size": 32}
    return Siglip2Model(Siglip2Config(vision_config=vision, text_config=text))


MODELS = {"qwen2_5_vl": (qwen, 2), "mistral3": (mistral, 1), "siglip2": (siglip2, 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    write_pictures(folder / "in", COUNT, broken_every=5)
    for name, (make, _) in MODELS.items():
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder / name)
        means = {"image_mean": MEAN, "image_std": STD}
        together = name == "qwen2_5_vl"  # as processors of transformers 5 are saved
        file = "processor_config.json" if together else "preprocessor_config.json"
        stored = {"image_processor": means} if together else means
        (folder / name / file).write_text(json.dumps(stored))
    return folder


def config_of(folder, out, name, **options):
    given = {"model": str(folder / name), "max_img_size": 48, "rows_per_part": COUNT}
    return EmbedConfig(str(folder / "in"), str(out), **given | options)


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_the_tower_s_own(folder, tmp_path, name):
    run_here(config_of(folder, tmp_path / "out", name, keep=("patches",)))
    manifest = Store(str(tmp_path / "out")).read_manifest()
    factor = MODELS[name][1]
    assert (manifest.facts.factor, manifest.facts.num_prefix_tokens) == (factor, 0)
    assert manifest.facts.hidden_size == 32 and manifest.facts.name == str(folder / name)
    assert "cls" not in pq.read_schema(tmp_path / "out" / part_name(0)).names
    tower = load_tower(str(folder / name), device="cpu", dtype="float32")
    process = get_image_processor(
        48, vit_patch_size=8, pixel_shuffle_factor=factor, allow_upscale=False,
        image_mean=MEAN, image_std=STD,
    )  # fmt: skip
    columns = ("id", "error", "mean", "grid_height", "grid_width")
    rows = [row for row in rows_of(tmp_path / "out", *columns) if row["error"] is None]
    assert len(rows) == COUNT - 2
    for row in rows:
        pixels, _ = process(folder / "in" / row["id"])
        output = tower.encoder([pixels])
        mean = output.patches[0].mean(0)
        assert output.grids == ((row["grid_height"], row["grid_width"]),)
        torch.testing.assert_close(torch.tensor(row["mean"]), mean, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="layer=3: expected -2 to 2"):
        run_here(config_of(folder, tmp_path / "other", name, layer=3))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "siglip2"])
def test_of_a_vision_language_model_with_such_a_tower_it_is_the_tower_s_rows(
    folder, tmp_path, vlm, name
):
    language = LlamaForCausalLM(LlamaConfig(**TEXT | {"vocab_size": 300}))
    tokenizer = get_tokenizer(str(vlm))
    options = {"mp_pixel_shuffle_factor": 1, "max_img_size": 64}
    model = VisionLanguageModel.from_backbones(str(folder / name), language, tokenizer, **options)
    model.save_pretrained(tmp_path / "vlm")
    VLMProcessor.from_config(model.config, tokenizer).save_pretrained(tmp_path / "vlm")
    stored = tmp_path / "vlm" / "processor_config.json"
    written = json.loads(stored.read_text())
    written["image_processor"] |= {"image_mean": MEAN, "image_std": STD}
    stored.write_text(json.dumps(written))
    for out, of in (("own", name), ("out", str(tmp_path / "vlm"))):
        run_here(config_of(folder, tmp_path / out, of, batch_invariant=True))
    facts = Store(str(tmp_path / "out")).read_manifest().facts
    assert (facts.factor, facts.token_size, facts.image_mean) == (MODELS[name][1], 0, MEAN)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "own")
    with pytest.raises(ValueError, match="without projector has no projector tokens"):
        run_here(config_of(folder, tmp_path / "more", str(tmp_path / "vlm"), keep=("tokens",)))


def test_encode_writes_their_patches_and_pictures_without_attention(folder, tmp_path):
    picture, out = folder / "in" / "0003.png", tmp_path / "out"
    command = ("encode", picture, "--model", folder / "qwen2_5_vl", "--dtype", "float32", "--out")
    result = run(*command, out)
    assert result.exit_code == 0 and "share of the pass's patches" in result.stdout, result.output
    features = load_file(out / "0003.features.safetensors")
    loaded = load_tower(str(folder / "qwen2_5_vl"), device="cpu", dtype="float32")
    process = get_image_processor(
        1024, vit_patch_size=8, pixel_shuffle_factor=2, allow_upscale=False,
        image_mean=MEAN, image_std=STD,
    )  # fmt: skip
    (expected,) = loaded.encoder([process(picture)[0]]).to_maps()
    assert list(features) == ["patches"]
    torch.testing.assert_close(features["patches"], expected.permute(1, 2, 0))
    with Image.open(out / "0003.features.png") as two, Image.open(picture) as shown:
        assert two.width < 3 * max(720, shown.width)
    run(*command, tmp_path / "pooled", "--pooled", "--no-pictures")
    pooled = load_file(tmp_path / "pooled" / "0003.features.safetensors")
    assert list(pooled) == ["mean"]


def test_encode_takes_the_encoder_of_a_vision_language_model(folder, tmp_path, vlm):
    picture = folder / "in" / "0003.png"
    model = VisionLanguageModel.from_pretrained(vlm)
    model.vision_encoder.save_pretrained(tmp_path / "alone")
    written = json.loads((vlm / "processor_config.json").read_text())["image_processor"]
    (tmp_path / "alone" / "preprocessor_config.json").write_text(json.dumps(written))
    features = []
    for name in (tmp_path / "alone", vlm):
        out = tmp_path / f"of-{name.name}"
        result = run("encode", picture, "--model", name, "--dtype", "float32", "--out", out)
        assert result.exit_code == 0 and "share of the pass's FLOPs" in result.stdout, result.output
        features.append(load_file(out / "0003.features.safetensors"))
    alone, inside = features
    assert alone.keys() == inside.keys() == {"cls", "registers", "patches"}
    assert all(torch.equal(alone[key], inside[key]) for key in alone)


def test_a_search_compares_means_where_there_is_no_cls(folder, tmp_path):
    run_here(config_of(folder, tmp_path / "out", "siglip2", layer=1))
    query = folder / "in" / "0003.png"
    document = json.loads(run("search", query, "--index", tmp_path / "out", "--json").stdout)
    (found,) = document["queries"]
    assert document["by"] == "mean" and found["hits"][0]["id"] == "0003.png"
    by = run("search", query, "--index", tmp_path / "out", "--by", "cls")
    assert "by='cls'" in error_of(by)


def test_models_without_such_a_tower_or_its_weights_are_refused(folder, tmp_path):
    config = json.loads((folder / "siglip2" / "config.json").read_text())
    weights = load_file(folder / "siglip2" / "model.safetensors")
    lost = "vision_model.encoder.layers.1.mlp.fc1.weight"
    save_file({k: w for k, w in weights.items() if k != lost}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no image_mean and image_std in its image processor"):
        load_tower(str(tmp_path))
    means = {"image_mean": MEAN, "image_std": STD}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(means))
    with pytest.raises(ValueError, match=f"weights of its vision tower are missing: {lost}"):
        load_tower(str(tmp_path))
    text = Mistral3Config(text_config={"model_type": "mistral", **TEXT, "head_dim": 16}).text_config
    MistralModel(text).save_pretrained(tmp_path / "text")
    (tmp_path / "text" / "preprocessor_config.json").write_text(json.dumps(means))
    with pytest.raises(ValueError, match="MistralModel has no vision tower that takes images"):
        load_tower(str(tmp_path / "text"))
