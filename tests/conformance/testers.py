"""Tiny models and inputs in the form that transformers' mixins ask a ``model_tester`` for."""

from unittest import mock

import torch
from transformers import DINOv3ViTConfig, LlamaConfig, SiglipVisionConfig

from hrvlm.checkpoints.strict import load_strictly
from hrvlm.vlm.config import VLMConfig

PATCH, FACTOR = 4, 2
# The token of images is not among those that the mixins write themselves, 0 to 19, nor does a
# vocabulary shrunk by 15 lose it.
BATCH, LENGTH, IMAGE_TOKEN = 2, 13, 50


class LoadsNothing:
    """Two tests load a checkpoint without a weight of the model: as ours do if they are told to."""

    def test_can_init_all_missing_weights(self):
        with mock.patch.dict(load_strictly.__kwdefaults__, strict=False):
            super().test_can_init_all_missing_weights()

    def test_model_weights_reload_no_missing_tied_weights(self):
        with mock.patch.dict(load_strictly.__kwdefaults__, strict=False):
            super().test_model_weights_reload_no_missing_tied_weights()


class EncoderTester:
    """A batch of square images; the encoder has no loss, so nothing is trained."""

    batch_size = 3
    is_training = False
    image_size, patch_size, num_channels = 16, PATCH, 3
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 2
    num_register_tokens = 2
    mask_length, num_masks = (image_size // patch_size) ** 2, 5
    seq_length = mask_length + 1 + num_register_tokens

    def __init__(self, parent, config_class=DINOv3ViTConfig, **fields):
        self.parent, self.config_class, self.fields = parent, config_class, fields

    def get_config(self):
        return self.config_class(
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_register_tokens=self.num_register_tokens,
            layerscale_value=0.5,
            allow_fp16=True,
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self):
        side = self.image_size
        pixels = torch.randn(self.batch_size, self.num_channels, side, side)
        return self.get_config(), {"pixel_values": pixels}


class VLMTester:
    """Texts with an image each, the images packed.

    ``vision`` is "dinov3" or "siglip", and ``tied`` says whether head and embeddings are one.
    """

    batch_size, seq_length = BATCH, LENGTH
    is_training = True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, parent, vision="dinov3", tied=False, images=True):
        self.parent, self.vision, self.tied, self.images = parent, vision, tied, images
        self.grid = (4, 6) if vision == "dinov3" else (4, 4)
        self.vision_model_tester = _ImagesOnly(self)

    def get_config(self):
        own = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2}
        shared = own | {"num_attention_heads": 4, "patch_size": PATCH}
        if self.vision == "dinov3":
            vision = DINOv3ViTConfig(**shared, num_register_tokens=2)
        else:
            vision = SiglipVisionConfig(**shared, image_size=self.grid[0] * PATCH)
        text = LlamaConfig(
            **own,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=99,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=self.tied,
        )
        return VLMConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=IMAGE_TOKEN,
            mp_pixel_shuffle_factor=FACTOR,
            max_img_size=64,
        )

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(5, IMAGE_TOKEN, (BATCH, LENGTH))
        if self.images:
            hp, wp = self.grid
            ids[:, 1 : 1 + hp * wp // FACTOR**2] = IMAGE_TOKEN
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return self.get_config(), inputs | (self.packed() if self.images else {})

    def packed(self):
        rows = BATCH * self.grid[0] * self.grid[1]
        return {
            "pixel_values": torch.randn(rows, 3 * PATCH**2),
            "image_grid_hw": torch.tensor([self.grid] * BATCH),
        }


class _ImagesOnly:
    """What the tests of ``get_image_features`` ask for."""

    def __init__(self, whole):
        self.whole = whole
        self.num_hidden_layers, self.num_attention_heads, self.hidden_size = 2, 4, 32

    def prepare_config_and_inputs_for_common(self):
        return self.whole.get_config().vision_config, self.whole.packed()
