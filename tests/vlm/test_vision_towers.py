"""VisionLanguageModel on vision towers of transformers: their own features, images of any sizes."""

import copy
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

import hrvlm
from hrvlm import VisionLanguageModel, VLMConfig, VLMProcessor
from hrvlm.images.patches import unpatchify
from hrvlm.images.processor import CLIP, IMAGENET, SIGLIP
from hrvlm.vlm.tower_classes import Form, tower_class, tower_form
from tests.numerics import relative_error
from tests.tiny import (
    FACTOR,
    config_of,
    images_of,
    model_of,
    picture,
    randomize,
    text_config_of,
    tokenizer_of,
)
from tests.towers.whole_towers import build, whole_towers

GRIDS = [(4, 6), (2, 2), (6, 2)]
# Beside those whose attention is packed; SigLIP2 is in test_architectures.py.
OTHERS = [
    ("pixtral", "PixtralVisionModel"),
    ("idefics2", "Idefics2VisionTransformer"),
    ("idefics3", "Idefics3VisionTransformer"),
    ("smolvlm", "SmolVLMVisionTransformer"),
]
# Ernie's merger is outside of its tower; the others take grids beside pixels, in other orders.
NOT_TAKEN = {"ernie4_5_vl_moe", "glm_image", "hunyuan_vl", "kimi_k25", "muse_glimmer"}
NOT_TAKEN |= {"video_llama_3", "dots3_note", "hy_v4_vl", "lfm3_vl", "minimax_m3_vl", "muse_spark"}
NOT_TAKEN |= {"cosmos3_edge", "minicpmv4_6", "paddleocr_vl"}
NOT_TAKEN |= {"minicpm_ocr", "minicpmv4_7", "inkling2", "radio"}
TOWERS = {model: name for model, name in [*OTHERS, *whole_towers()] if model not in NOT_TAKEN}
# In each form, those that people run.
RUN = ("pixtral", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")
OPTIONS = {
    "mp_pixel_shuffle_factor": FACTOR,
    "max_img_size": 64,
    "image_mean": SIGLIP.mean,
    "image_std": SIGLIP.std,
}


@pytest.fixture(scope="module")
def language():
    return randomize(AutoModelForCausalLM.from_config(text_config_of(vocab_size=260)), 2).eval()


def vlm_of(tower, language):
    return VisionLanguageModel.from_backbones(tower, language, tokenizer_of(), **OPTIONS).eval()


def alone(stock, rows, grid, patch):
    """What transformers' own model gives for one image, its patches by its own processor."""
    image = unpatchify(rows, grid, patch)
    config = stock.config
    if tower_form(config) is not Form.MERGED:
        hidden = stock(image[None].to(stock.dtype)).last_hidden_state[0]
        assert hidden.shape == (grid[0] * grid[1], config.hidden_size)
        return hidden
    plain = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), False)
    processor = Qwen2VLImageProcessor(
        patch_size=config.patch_size,
        merge_size=config.spatial_merge_size,
        temporal_patch_size=getattr(config, "temporal_patch_size", 1),
        **plain,
    )
    given = processor(images=[image], return_tensors="pt")
    return stock(given["pixel_values"], grid_thw=given["image_grid_thw"]).pooler_output


@pytest.mark.parametrize("name", TOWERS)
def test_features_are_those_of_transformers_one_by_one(name, language, rng, tmp_path):
    stock = build(name, TOWERS[name])
    model = vlm_of(copy.deepcopy(stock), language)
    patch = model.config.vit_patch_size
    assert patch == 4 * (2 if tower_form(stock.config) is Form.MERGED else 1)
    rows = images_of(GRIDS, rng, patch)

    def check(model, tolerance=1e-5):
        features = model.get_image_features(rows, GRIDS).pooler_output
        parts = rows.split([hp * wp for hp, wp in GRIDS])
        for part, grid, found in zip(parts, GRIDS, features, strict=True):
            shuffled = hrvlm.pixel_shuffle(alone(stock, part, grid, patch)[None], grid, FACTOR)
            assert relative_error(found, model.MP.proj(shuffled)[0]) <= tolerance

    with torch.no_grad():
        check(model)
        assert hrvlm.accelerate(model.vision_encoder).swapped
        check(model)
        if name in RUN:
            hrvlm.restore(model.vision_encoder)
            model.save_pretrained(tmp_path)
            loaded = VisionLanguageModel.from_pretrained(tmp_path)
            check(loaded)
            stock.bfloat16()
            check(loaded.bfloat16(), tolerance=0.02)


def test_those_that_are_not_taken_are_refused_by_name():
    assert len(TOWERS) >= 19
    for model, name in whole_towers():
        if model not in NOT_TAKEN:
            continue
        config = build(model, name).config
        assert tower_class(config) is None
        message = f"model_type='{config.model_type}': expected that of dinov3, dinov2, or a"
        with pytest.raises(ValueError, match=message):
            config_of(config)


@pytest.mark.parametrize("name", RUN)
def test_it_learns_with_every_parameter_of_the_tower(name, rng):
    config = config_of(build(name, TOWERS[name]).config, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model = model_of(config).train()
    assert hrvlm.accelerate(model).swapped
    ids = [5, *[config.image_token_id] * (sum(hp * wp for hp, wp in GRIDS) // FACTOR**2), 7, 8]
    ids = torch.tensor([ids])
    pixels = images_of(GRIDS, rng, config.vit_patch_size)
    model(
        input_ids=ids, labels=ids.clone(), pixel_values=pixels, image_grid_hw=GRIDS
    ).loss.backward()
    without = {key for key, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without


@pytest.mark.parametrize("name", ["pixtral", "smolvlm", "qwen2_5_vl"])
def test_hidden_states_are_without_padding(name, language, rng):
    model = vlm_of(build(name, TOWERS[name]), language)
    rows = images_of(GRIDS, rng, model.config.vit_patch_size)
    merged = 4 if name == "qwen2_5_vl" else 1
    with torch.no_grad():
        for _ in range(2):
            out = model.get_image_features(rows, GRIDS, output_hidden_states=True)
            assert len(out.last_hidden_state) == len(rows)
            assert {len(state) for state in out.hidden_states} == {merged * len(rows)}
            hrvlm.accelerate(model)
    with pytest.raises(ValueError, match=r"pixel_values: \(3, \d+\), expected \(4, \d+\) for 1 im"):
        model.get_image_features(rows[:3], [(2, 2)])


def test_a_whole_model_gives_its_tower_mean_and_std(language, tmp_path, rng):
    tower = build("qwen2_5_vl", TOWERS["qwen2_5_vl"])
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    whole = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(vision_config=tower.config.to_dict(), text_config=text)
    )
    whole.model.visual.load_state_dict(tower.state_dict())
    whole.save_pretrained(tmp_path)
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "max_pixels": 3136}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    options = {"mp_pixel_shuffle_factor": FACTOR, "max_img_size": 64}
    model = VisionLanguageModel.from_backbones(str(tmp_path), language, tokenizer_of(), **options)
    theirs, mine = tower.state_dict(), model.vision_encoder.state_dict()
    assert theirs.keys() == mine.keys() and all(torch.equal(theirs[k], mine[k]) for k in mine)
    config = VLMConfig.from_dict(model.config.to_dict())
    processor = VLMProcessor.from_config(config, tokenizer_of())
    assert tuple(processor.image_processor.image_mean) == (0.1, 0.2, 0.3)
    out = processor(images=[picture(64, 40)], text="<|image|>")
    assert out["image_grid_hw"].tolist() == [[6, 8]]  # patches of 2 x 4 pixels, whatever max_pixels
    with torch.no_grad():
        features = model.eval().get_image_features(out["pixel_values"], out["image_grid_hw"])
    assert [len(part) for part in features.pooler_output] == [12]


def test_qwen3_vl_without_features_for_layers_of_its_language_model(language):
    tower = build("qwen3_vl", TOWERS["qwen3_vl"])
    assert tower.config.deepstack_visual_indexes == [0]
    model = vlm_of(tower, language)
    assert not len(model.vision_encoder.deepstack_merger_list)
    assert len(tower.deepstack_merger_list) == 1  # what was given stays as it is
    assert model.vision_encoder.blocks[0].norm1.weight is not None
    plain = vlm_of(build("pixtral", TOWERS["pixtral"]), language).vision_encoder
    assert vlm_of(plain, language).vision_encoder is plain


def test_names_and_numbers():
    qwen = {"vit_architecture": "qwen2_5_vl", "vit_hidden_dim": 64, "vit_n_blocks": 2}
    config = VLMConfig.from_names(qwen | {"vit_n_heads": 4, "vit_patch_size": 16})
    vision = config.vision_config
    assert (vision.depth, vision.num_heads, vision.hidden_size) == (2, 4, 64)
    assert (config.vit_hidden_dim, config.vit_patch_size) == (64, 32)
    assert (config.vit_architecture, config.num_prefix_tokens) == ("qwen2_5_vl", 0)
    for name, family in {
        "pixtral": CLIP,
        "qwen2_vl": CLIP,
        "qwen2_5_vl": CLIP,
        "glm4v": CLIP,
        "qwen3_vl": SIGLIP,
        "idefics3": SIGLIP,
        "smolvlm": SIGLIP,
        "dinov2": IMAGENET,
    }.items():
        assert VLMConfig.from_names({"vit_architecture": name}).normalization == family, name
    for names, message in (
        ({"vit_architecture": "glm_ocr"}, "image_mean=None: no mean and std of glm_ocr is known"),
        ({"vit_architecture": "pixtral", "backend": "triton"}, "runs as transformers' PixtralVis"),
        ({"vit_architecture": "pixtral", "vit_ln_eps": 1}, "vit_ln_eps=1: a pixtral config has no"),
        ({"vit_architecture": "smolvlm", "mp_append_cls": True}, "smolvlm has no CLS token"),
        ({"vit_architecture": "clip"}, "vit_architecture='clip': expected dinov3, dinov2, or a vi"),
    ):
        with pytest.raises(ValueError, match=message):
            VLMConfig.from_names(names)
