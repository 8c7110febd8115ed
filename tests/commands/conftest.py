"""Images and tiny models for the commands."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from hrvlm.images.processor import SAT493M
from tests.encoder.encoders import config_of, pair_of


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three images of unlike shapes, one of them turned by EXIF."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)

    def picture(width, height):
        small = noise.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        return Image.fromarray(small).resize((width, height))

    picture(200, 100).save(folder / "b_wide.png")
    picture(40, 150).save(folder / "c_tall.webp")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(160, 90).save(folder / "a_turned.jpg", exif=exif)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny encoder as a checkpoint directory, with pixel statistics of its own."""
    folder = tmp_path_factory.mktemp("model")
    _, encoder = pair_of("vit")
    encoder.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": SAT493M.mean, "image_std": SAT493M.std})
    )
    return folder


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """A tiny vision-language model with random weights and its processor."""
    from hrvlm.vlm.config import VLMConfig
    from hrvlm.vlm.processors import VLMProcessor
    from hrvlm.vlm.tokenizer import get_tokenizer
    from hrvlm.vlm.vision_language_model import VisionLanguageModel

    folder = tmp_path_factory.mktemp("vlm")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "<end>"])}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    plain = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>")
    plain.save_pretrained(folder)
    tokenizer = get_tokenizer(str(folder))
    config = VLMConfig(
        vision_config=config_of("vit"),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            eos_token_id=None,
        ),
        image_token_id=tokenizer.image_token_id,
        max_img_size=128,
        mp_pixel_shuffle_factor=2,
    )
    torch.manual_seed(0)
    VisionLanguageModel(config).save_pretrained(folder)
    VLMProcessor.from_config(config, tokenizer).save_pretrained(folder)
    return folder
