"""VisionLanguageModel on encoders of other families: DINOv2 with and without registers, SigLIP2."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Siglip2Config,
    Siglip2TextConfig,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

import hrvlm
from hrvlm import DINOv2Encoder, VisionLanguageModel, VLMConfig, VLMProcessor
from hrvlm.checkpoints.convert import to_transformers
from hrvlm.images.processor import IMAGENET, SIGLIP
from tests.numerics import relative_error
from tests.tiny import (
    FACTOR,
    PATCH,
    config_of,
    images_of,
    model_of,
    picture,
    randomize,
    text_config_of,
    tokenizer_of,
)

GRIDS = [(4, 6), (2, 2), (6, 2)]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": PATCH}
CONFIGS = {
    "dinov2": lambda: Dinov2Config(**SMALL, mlp_ratio=2, image_size=32),
    "dinov2_registers": lambda: Dinov2WithRegistersConfig(
        **SMALL, mlp_ratio=2, image_size=32, num_register_tokens=2
    ),
    # As many positions as a processor of its own would allow patches: fewer than images here have.
    "siglip2": lambda: Siglip2VisionConfig(**SMALL, intermediate_size=48, num_patches=16),
}
STOCK = {
    "dinov2": Dinov2Model,
    "dinov2_registers": Dinov2WithRegistersModel,
    "siglip2": Siglip2VisionModel,
}


def stock_patches(stock, rows, grid):
    """What transformers' own model gives for one image, without prefix tokens."""
    image = rows.unflatten(0, grid).unflatten(2, (3, PATCH, PATCH)).permute(2, 0, 3, 1, 4)
    if isinstance(stock, Siglip2VisionModel):
        hp, wp = grid
        own = image.permute(1, 3, 2, 4, 0).reshape(1, hp * wp, -1)  # dy, dx, channel in a patch
        mask = torch.ones(1, hp * wp, dtype=torch.long)
        return stock(own, mask, torch.tensor([grid])).last_hidden_state[0]
    pixels = image.flatten(1, 2).flatten(2, 3)[None]
    prefix = 1 + getattr(stock.config, "num_register_tokens", 0)
    return stock(pixels).last_hidden_state[0, prefix:]


@pytest.fixture(scope="module")
def language():
    return randomize(AutoModelForCausalLM.from_config(text_config_of(vocab_size=260)), 2).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_images_of_any_size_have_the_features_of_transformers_model(name, language, rng, tmp_path):
    stock = randomize(STOCK[name](CONFIGS[name]()), 1).eval()
    model = VisionLanguageModel.from_backbones(
        stock, language, tokenizer_of(), mp_pixel_shuffle_factor=FACTOR, max_img_size=64
    ).eval()
    assert model.config.vit_architecture == name.partition("_")[0]
    rows = images_of(GRIDS, rng)
    with torch.no_grad():
        out = model.get_image_features(rows, GRIDS, output_hidden_states=True)
        parts = rows.split([hp * wp for hp, wp in GRIDS])
        for part, grid, features in zip(parts, GRIDS, out.pooler_output, strict=True):
            patches = stock_patches(stock, part, grid)
            shuffled = hrvlm.pixel_shuffle(patches[None], grid, FACTOR)
            assert relative_error(features, model.MP.proj(shuffled)[0]) <= 1e-5
            assert len(features) == grid[0] * grid[1] // FACTOR**2
        assert len(out.hidden_states) == 3
        model.save_pretrained(tmp_path)
        loaded = VisionLanguageModel.from_pretrained(tmp_path)
        again = loaded.get_image_features(rows, GRIDS).pooler_output
    assert all(map(torch.equal, again, out.pooler_output))
    stored = load_file(tmp_path / "model.safetensors")
    of_encoder = {
        key.removeprefix("vision_encoder."): value
        for key, value in stored.items()
        if key.startswith("vision_encoder.")
    }
    theirs = stock.state_dict()
    if name == "siglip2":
        theirs = {key: value for key, value in theirs.items() if not key.startswith("head.")}
    else:  # whose names in memory are others than in files from transformers 5.24 on
        theirs = to_transformers(theirs)
    assert of_encoder.keys() == theirs.keys()
    assert all(torch.equal(of_encoder[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_learns_with_every_parameter_of_the_encoder(name, rng):
    model = model_of(config_of(CONFIGS[name]())).train()
    token = model.config.image_token_id
    tokens = sum(hp * wp for hp, wp in GRIDS) // FACTOR**2
    ids = torch.tensor([[5, *[token] * tokens, 7, 8]])
    loss = model(
        input_ids=ids, labels=ids.clone(), pixel_values=images_of(GRIDS, rng), image_grid_hw=GRIDS
    ).loss
    loss.backward()
    without = {key for key, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without


def test_an_accelerated_siglip2_runs_without_its_padding(rng):
    model, rows = model_of(config_of(CONFIGS["siglip2"]())), images_of(GRIDS, rng)
    with torch.no_grad():
        expected = model.get_image_features(rows, GRIDS).pooler_output
        assert "Siglip2" in str(hrvlm.accelerate(model))
        for a, b in zip(model.get_image_features(rows, GRIDS).pooler_output, expected, strict=True):
            assert relative_error(a, b) <= 1e-5
    with pytest.raises(ValueError, match=r"pixel_values: \(3, 192\), expected \(4, 192\) for 1 im"):
        model.get_image_features(rows[:3], [(2, 2)])


def test_mean_and_std_are_the_checkpoints_own(language, tmp_path):
    """Then those of the family; sizes are of token_grid, whatever its processor says."""
    vision = randomize(Dinov2Model(CONFIGS["dinov2"]()), 1)
    vision.save_pretrained(tmp_path)
    own = '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "max_num_patches": 4}'
    (tmp_path / "preprocessor_config.json").write_text(own)
    options = {"mp_pixel_shuffle_factor": FACTOR, "max_img_size": 64}
    model = VisionLanguageModel.from_backbones(str(tmp_path), language, tokenizer_of(), **options)
    assert type(model.vision_encoder) is DINOv2Encoder
    model.config.save_pretrained(tmp_path / "vlm")
    config = VLMConfig.from_pretrained(tmp_path / "vlm")
    processor = VLMProcessor.from_config(config, tokenizer_of())
    assert tuple(processor.image_processor.image_mean) == (0.1, 0.2, 0.3)
    out = processor(images=[picture(64, 40)], text="<|image|>")
    assert out["image_grid_hw"].tolist() == [[6, 8]]
    for name, family in (("dinov2", IMAGENET), ("siglip2", SIGLIP)):
        config = config_of(CONFIGS[name](), vit_model_type="my/encoder")
        assert config.normalization == family
    with pytest.raises(ValueError, match="image_std=None: expected both or none"):
        config_of(image_mean=[0.5, 0.5, 0.5])


def test_a_weight_file_of_either_family_is_a_vision_part(language, tmp_path):
    stock = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**(SMALL | {"hidden_size": 64, "num_attention_heads": 1}))
    )
    torch.save(stock.state_dict(), tmp_path / "weights.pth")
    options = {"mp_pixel_shuffle_factor": FACTOR}
    model = VisionLanguageModel.from_backbones(
        str(tmp_path / "weights.pth"), language, tokenizer_of(), **options
    )
    assert type(model.vision_encoder) is DINOv2Encoder
    assert model.config.num_prefix_tokens == 5


def test_names_of_dinov2_and_siglip2():
    names = {"vit_architecture": "dinov2", "vit_hidden_dim": 64, "vit_inter_dim": 128}
    config = VLMConfig.from_names(names | {"vit_n_heads": 2, "vit_n_registers": 3})
    vision = config.vision_config
    assert (vision.model_type, vision.mlp_ratio) == ("dinov2_with_registers", 2)
    assert (config.vit_patch_size, config.num_prefix_tokens, config.vit_use_rope) == (14, 4, False)
    plain = VLMConfig.from_names({"vit_architecture": "dinov2", "vit_n_registers": 0})
    assert (plain.vision_config.model_type, plain.vit_img_size) == ("dinov2", 518)
    siglip2 = VLMConfig.from_names({"vit_architecture": "siglip2", "vit_img_size": 512})
    assert siglip2.num_prefix_tokens == 0 and siglip2.square_size is None
    for given, message in (
        (names | {"vit_inter_dim": 100}, "vit_inter_dim=100: expected a multiple"),
        (names | {"vit_use_rope": True}, "vit_use_rope=True: dinov2 has positions of its own"),
        ({"vit_architecture": "siglip2", "vit_n_registers": 4}, "siglip2 has no register tokens"),
        ({"vit_architecture": "siglip2", "mp_append_cls": True}, "siglip2 has no CLS token"),
    ):
        with pytest.raises(ValueError, match=message):
            VLMConfig.from_names(given)
    assert VLMConfig.from_names({"vit_architecture": "dinov2", "mp_append_cls": True}).mp_append_cls
    both = Siglip2Config(
        vision_config=CONFIGS["siglip2"]().to_dict(), text_config=Siglip2TextConfig().to_dict()
    )
    assert config_of(both).vit_architecture == "siglip2"
