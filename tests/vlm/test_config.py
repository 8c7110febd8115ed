import json
import os
import subprocess
import sys

import pytest
import yaml
from transformers import AutoConfig, LlamaConfig, SiglipConfig

from hrvlm.vlm.config import VLMConfig
from tests.fresh_processes import run_each
from tests.tiny import (
    config_of,
    model_of,
    processor_of,
    siglip_config_of,
    text_config_of,
    vision_config_of,
)


def names_to_yaml(tmp_path, **names):
    path = tmp_path / "vlm.yaml"
    path.write_text(yaml.safe_dump(names))
    return path


def test_without_arguments_it_is_dinov3_small_and_smollm2():
    config = VLMConfig()
    assert (config.vit_architecture, config.vit_patch_size, config.vit_hidden_dim) == (
        "dinov3",
        16,
        384,
    )
    assert config.num_prefix_tokens == 5 and config.vit_use_rope and config.square_size is None
    assert (config.lm_hidden_dim, config.lm_max_position_embeddings) == (960, 8192)
    assert config.get_text_config() is config.text_config
    assert config.mp_pixel_shuffle_factor == 4 and config.max_img_size == 2048


def test_all_names_of_the_yaml_arrive(tmp_path):
    path = names_to_yaml(
        tmp_path,
        vit_architecture="dinov3",
        vit_patch_size=8,
        vit_use_rope=False,
        vit_hidden_dim=64,
        vit_inter_dim=96,
        vit_n_heads=4,
        vit_n_blocks=3,
        vit_ln_eps=1e-6,
        vit_dropout=0.0,
        vit_n_registers=2,
        backend="eager",
        max_img_size=128,
        resize_to_max_side_len=False,
        mp_pixel_shuffle_factor=2,
        mp_handle_special_tokens=True,
        mp_append_cls=True,
        mp_image_token_length=1,
        lm_hidden_dim=48,
        lm_inter_dim=80,
        lm_n_heads=4,
        lm_n_kv_heads=2,
        lm_n_blocks=1,
        lm_vocab_size=300,
        lm_max_position_embeddings=256,
        lm_rms_eps=1e-4,
        lm_re_base=5000,
        lm_dropout=0.1,
        lm_tie_weights=False,
        lm_tokenizer="some/tokenizer",
        vlm_extra_tokens={"image_token": "<|image|>"},
        image_token_id=299,
    )
    config = VLMConfig.from_yaml(path)
    vision, text = config.vision_config, config.text_config
    assert (vision.patch_size, vision.hidden_size, vision.intermediate_size) == (8, 64, 96)
    assert (vision.num_attention_heads, vision.num_hidden_layers) == (4, 3)
    assert (vision.layer_norm_eps, vision.num_register_tokens) == (1e-6, 2)
    assert vision.use_rope is False and vision.backend == "eager" and not config.vit_use_rope
    assert isinstance(text, LlamaConfig)
    assert (text.hidden_size, text.intermediate_size, text.head_dim) == (48, 80, 12)
    assert (text.num_attention_heads, text.num_key_value_heads) == (4, 2)
    assert (text.num_hidden_layers, text.vocab_size) == (1, 300)
    assert (text.max_position_embeddings, text.rms_norm_eps) == (256, 1e-4)
    assert text.rope_parameters["rope_theta"] == 5000 and text.attention_dropout == 0.1
    assert text.tie_word_embeddings is False
    assert (config.max_img_size, config.allow_upscale) == (128, False)
    assert (config.mp_pixel_shuffle_factor, config.mp_append_cls) == (2, True)
    assert (config.lm_tokenizer, config.image_token_id) == ("some/tokenizer", 299)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("vit_patchsize", "vit_patch_size"),
        ("max_image_size", "max_img_size"),
        ("mp_pixel_shuffle", "mp_pixel_shuffle_factor"),
        ("vit_arch", "vit_architecture"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(tmp_path, wrong, nearest):
    with pytest.raises(ValueError, match=f"{wrong}.*did you mean '{nearest}'"):
        VLMConfig.from_yaml(names_to_yaml(tmp_path, **{wrong: 4}))
    with pytest.raises(ValueError, match=f"{wrong}.*did you mean '{nearest}'"):
        VLMConfig(**{wrong: 4})


@pytest.mark.parametrize("make", [lambda n: VLMConfig(**n), VLMConfig.from_names])
@pytest.mark.parametrize(
    ("gone", "instead"),
    [("lm_max_length", "packing"), ("hf_repo_name", "push_to"), ("extra_token_amount", "enlarges")],
)
def test_a_name_that_was_dropped_is_refused_with_what_replaced_it(make, gone, instead):
    with pytest.raises(ValueError, match=f"'{gone}'.*{instead}") as refused:
        make({gone: None})
    assert "did you mean" not in str(refused.value)


@pytest.mark.parametrize("make", [lambda n: VLMConfig(**n), VLMConfig.from_names])
@pytest.mark.parametrize(
    ("name", "nothing", "other", "instead"),
    [
        ("vit_cls_flag", False, True, "mp_append_cls"),
        ("lm_use_tokens", False, True, "takes embeddings"),
        ("lm_attn_scaling", 1.0, 0.5, "its own config"),
        ("vlm_load_backbone_weights", False, True, "from_backbones"),
    ],
)
def test_a_name_is_taken_with_the_value_that_changes_nothing(make, name, nothing, other, instead):
    assert make({name: nothing}).to_dict() == make({}).to_dict()
    with pytest.raises(ValueError, match=f"^{name}={other}: .*{instead}"):
        make({name: other})


def test_the_image_token_is_in_the_vocabulary():
    names = {"lm_vocab_size": 512, "image_token_id": 511}
    assert VLMConfig.from_names(names).image_token_id == 511
    with pytest.raises(ValueError, match=r"image_token_id=600: .*lm_vocab_size .* is 512"):
        VLMConfig.from_names(names | {"image_token_id": 600})


def test_sizes_of_the_parts_are_not_taken_for_own_options():
    with pytest.raises(ValueError, match=r"'vit_patch_size' is a name of VLMConfig.from_names"):
        VLMConfig(vit_patch_size=8)


@pytest.mark.parametrize("make", [lambda n: VLMConfig(**n), VLMConfig.from_names])
def test_a_fixed_number_of_tokens_per_image_is_refused(make):
    with pytest.raises(ValueError, match=r"mp_image_token_length=64.*token grid, gh \* gw"):
        make({"mp_image_token_length": 64})
    assert make({"mp_image_token_length": 1}).mp_pixel_shuffle_factor == 4


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"vit_architecture": "clip"}, "vit_architecture='clip'.*dinov3.*siglip"),
        ({"vit_architecture": "siglip", "vit_use_rope": True}, "vit_use_rope=True: siglip"),
        ({"vit_architecture": "siglip", "mp_append_cls": True}, "mp_append_cls.*no CLS"),
        ({"vit_architecture": "siglip", "vit_n_registers": 4}, "siglip has no register"),
        ({"vit_architecture": "siglip", "vit_img_size": 224}, "image_size=224.*multiple of.* 64"),
        ({"vit_architecture": "siglip", "backend": "triton"}, "backend='triton': siglip runs"),
        ({"vit_architecture": "siglip", "vit_num_registers": 4}, "siglip has no register"),
        ({"vit_img_size": 0}, "vit_img_size=0: expected a whole number"),
        ({"vit_num_registers": -1}, "vit_num_registers=-1: expected a whole number of at least 0"),
        ({"vit_num_registers": "4"}, "vit_num_registers='4': expected a whole number"),
        ({"vit_hidden_dim": -4}, "vit_hidden_dim=-4: expected a whole number"),
        ({"vit_n_blocks": 2.5}, "vit_n_blocks=2.5: expected a whole number"),
        ({"lm_n_heads": 0}, "lm_n_heads=0: expected a whole number"),
        ({"lm_hidden_dim": None}, "lm_hidden_dim=None: expected a whole number"),
        ({"lm_vocab_size": True}, "lm_vocab_size=True: expected a whole number"),
        ({"vit_ln_eps": "1e-5"}, "vit_ln_eps='1e-5': expected a number of at least 0"),
        ({"lm_dropout": float("nan")}, "lm_dropout=nan: expected a number of at least 0"),
        ({"vit_use_sincos_pos": True}, "vit_use_sincos_pos=True: .*vit_use_rope.*False"),
        ({"vit_use_sincos_pos": "no"}, "vit_use_sincos_pos='no'"),
        (
            {"vit_num_registers": 4, "vit_n_registers": 0},
            "vit_num_registers=4 and vit_n_registers=0: two names of one option",
        ),
        (
            {"allow_upscale": True, "resize_to_max_side_len": False},
            "allow_upscale=True and resize_to_max_side_len=False",
        ),
        ({"mp_pixel_shuffle_factor": 0}, "mp_pixel_shuffle_factor=0"),
        ({"mp_pixel_shuffle_factor": "4"}, "mp_pixel_shuffle_factor"),
        ({"max_img_size": 32}, "max_img_size=32.*16 \\* 4 = 64"),
        ({"mp_append_cls": True, "mp_handle_special_tokens": False}, "mp_append_cls"),
    ],
)
def test_values_that_do_not_fit_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        VLMConfig.from_names(names)


def test_names_that_change_nothing_are_taken():
    names = {"vit_use_sincos_pos": False, "vit_num_registers": 2, "vit_img_size": 224}
    config = VLMConfig.from_names(names | {"vit_n_registers": 2})
    assert config.vision_config.num_register_tokens == 2 and config.num_prefix_tokens == 3
    assert config.vit_img_size == 224 and config.square_size is None
    assert VLMConfig.from_names({"vit_img_size": None}).square_size is None
    siglip = {"vit_architecture": "siglip", "vit_use_rope": False, "backend": "auto"}
    config = VLMConfig.from_names(siglip | names | {"vit_img_size": 256, "vit_num_registers": 0})
    assert config.num_prefix_tokens == 0 and config.square_size == 256
    assert VLMConfig(vit_use_sincos_pos=False).vit_use_rope


def test_a_small_number_of_a_yaml_needs_no_point(tmp_path):
    path = tmp_path / "names.yaml"
    path.write_text("vit_ln_eps: 1e-6\n")
    assert VLMConfig.from_yaml(path).vision_config.layer_norm_eps == 1e-6
    path.write_bytes(b"\xff\x81")
    with pytest.raises(ValueError, match=r"names.yaml: no text"):
        VLMConfig.from_yaml(path)


def test_a_yaml_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="expected a mapping"):
        VLMConfig.from_yaml(path)


def test_siglip_is_read_from_names_and_from_the_two_tower_config():
    config = VLMConfig.from_names({"vit_architecture": "siglip", "vit_img_size": 256})
    assert (config.vit_architecture, config.vit_img_size) == ("siglip", 256)
    assert config.num_prefix_tokens == 0 and not config.vit_use_rope
    two_towers = SiglipConfig(vision_config=siglip_config_of().to_dict())
    config = config_of(two_towers)
    assert config.vision_config.model_type == "siglip_vision_model"
    assert config.vit_img_size == 32


def test_names_change_the_config_of_a_checkpoint(tmp_path):
    vision_config_of(num_hidden_layers=5).save_pretrained(tmp_path / "vit")
    text_config_of(num_hidden_layers=7).save_pretrained(tmp_path / "lm")
    names = {
        "vit_model_type": str(tmp_path / "vit"),
        "lm_model_type": str(tmp_path / "lm"),
        "mp_pixel_shuffle_factor": 2,
    }
    config = VLMConfig.from_names(names | {"vit_n_registers": 1, "lm_n_heads": 2, "lm_n_blocks": 3})
    assert config.vision_config.num_hidden_layers == 5
    assert config.vision_config.num_register_tokens == 1
    assert (config.text_config.num_hidden_layers, config.text_config.head_dim) == (3, 24)
    with pytest.raises(ValueError, match="is a dinov3_vit, expected siglip"):
        VLMConfig.from_names(names | {"vit_architecture": "siglip"})


def test_saving_and_loading_keeps_everything(tmp_path):
    vision = vision_config_of(use_rope=False, backend="eager")
    config = config_of(vision, mp_append_cls=True, lm_tokenizer="x", allow_upscale=False)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is VLMConfig
    assert loaded.vision_config.use_rope is False and loaded.vision_config.backend == "eager"
    before, after = (json.loads(c.to_json_string(use_diff=False)) for c in (config, loaded))
    assert before | {"_name_or_path": ""} == after | {"_name_or_path": ""}


ORDERS = [
    ("from transformers import pipeline, AutoImageProcessor", False),
    ("import hrvlm.vlm.config", False),
    ("import hrvlm.images.transformers_processor", False),
    ("import hrvlm.vlm.processors", False),
    ("import hrvlm.vlm.vision_language_model", False),
    ("import hrvlm.vlm.backbones", False),
    ("import transformers.modeling_layers", False),
    ("from transformers import DINOv3ViTConfig", False),
    ("import hrvlm.encoder.backbone", False),
    ("import hrvlm.towers.acceleration", False),
    ("from transformers import pipeline", True),
]
SCRIPT = """
import sys
if {late}:
    {first}
import hrvlm
heavy = {{"torch", "torchvision", "triton", "flash_attn", "transformers"}}
heavy &= sys.modules.keys() - globals().get("BEFORE", set())
assert {late} or not heavy, heavy
if not {late}:
    {first}
assert callable(hrvlm.accelerate)  # a module of that name would hide it
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
MODEL = "hrvlm.vlm.vision_language_model"
before = MODEL in sys.modules
classes = [AutoImageProcessor, AutoProcessor, AutoConfig]
loaded = [c.from_pretrained({path!r}) for c in classes]
hrvlm.VLMConfig()
assert (MODEL in sys.modules) == before, "a config imported the model"
classes = [AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM]
loaded += [AutoModel.from_config(loaded[2])]
loaded += [c.from_pretrained({path!r}) for c in classes]
assert all(c._model_mapping[hrvlm.VLMConfig] is hrvlm.VisionLanguageModel for c in classes)
from transformers import AutoBackbone
sizes = {{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}}
loaded.append(AutoBackbone.from_config(AutoConfig.for_model("hrvlm_dinov3", **sizes)))
print(*[type(x).__name__ for x in loaded])
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("vlm")
    model_of().save_pretrained(path)
    processor_of().save_pretrained(path)
    return str(path)


LOADED = [
    *("VLMImageProcessor", "VLMProcessor", "VLMConfig"),
    *["VisionLanguageModel"] * 4,
    "DINOv3Backbone",
]


@pytest.mark.slow
def test_auto_classes_know_ours_whatever_is_imported_first(saved):
    scripts = [SCRIPT.format(first=first, late=late, path=saved) for first, late in ORDERS]
    for order, (code, output) in zip(ORDERS, run_each(scripts), strict=True):
        assert code == 0, (order, output[-2000:])
        assert output.splitlines()[-1].split() == LOADED, order


def test_auto_classes_know_ours_and_installing_imports_nothing(saved):
    # The first import of all is of a config that imports the registry while it is made.
    first = "from transformers import SiglipVisionConfig"
    script = SCRIPT.format(first=first, late=False, path=saved)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == LOADED
