"""What model, processor and config say to arguments of the wrong kind."""

import numpy as np
import pytest
import torch

from hrvlm import (
    DINOv2Encoder,
    DINOv3Encoder,
    ModalityProjector,
    VisionLanguageModel,
    VLMProcessor,
    VLMTrainingArguments,
    get_tokenizer,
    image_token_count,
    load_checkpoint,
    load_into,
    normalization_for,
    pixel_shuffle,
    pixel_unshuffle,
    unpatchify,
)
from hrvlm.export.graphs import export_program
from hrvlm.images.patches import patchify
from hrvlm.vlm.config import VLMConfig
from hrvlm.vlm.tokenizer import get_image_string
from tests.tiny import model_of, picture, processor_of, siglip_config_of, tokenizer_of

IDS = torch.ones(1, 3, dtype=torch.long)
PATCHES = torch.zeros(4, 3 * 8 * 8)


def projector():
    return ModalityProjector(vit_hidden_dim=8, lm_hidden_dim=8)


def processor_with(**options):
    return VLMProcessor(processor_of().image_processor, tokenizer_of(), **options)


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def processor():
    return processor_of()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": IDS.float()}, r"input_ids: expected integers \[B, L\], got torch.float32"),
        ({"input_ids": IDS[0]}, r"input_ids: expected integers \[B, L\], got torch.int64 \(3,\)"),
        ({"input_ids": [[1]]}, "input_ids: expected a tensor, got list"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :2]}, r"attention_mask: \(1, 2\), expected"),
        ({"input_ids": IDS, "labels": IDS[:, :2]}, r"labels: expected integers \(1, 3\), .*1, 2\)"),
        ({"input_ids": IDS, "labels": IDS.float()}, r"labels: expected integers .*torch.float32"),
        ({"input_ids": IDS, "labels": [1]}, "labels: expected a tensor, got list"),
        (
            {"input_ids": IDS, "pixel_values": PATCHES, "image_grid_hw": 4},
            "image_grid_hw: expected a pair of ints for each image, got 4",
        ),
        ({"input_ids": IDS, "pixel_values": [1]}, "pixel_values: expected a tensor, got list"),
        (
            {"inputs_embeds": torch.zeros(3, 4)},
            r"inputs_embeds: expected \[B, L, C\], got \(3, 4\)",
        ),
        ({"input_ids": IDS, "logits_to_keep": "x"}, "logits_to_keep='x': expected a number"),
        ({"input_ids": IDS, "logits_to_keep": -1}, "logits_to_keep=-1: expected a number"),
        ({"input_ids": IDS, "logits_to_keep": torch.ones(1)}, r"logits_to_keep=tensor.* a number"),
        ({"input_ids": IDS.bool()}, r"input_ids: expected integers \[B, L\], got torch.bool"),
        ({"input_ids": IDS[:, :0]}, r"input_ids: \(1, 0\), samples without a token"),
        ({"input_ids": IDS, "attention_mask": [[1, 1, 1]]}, "attention_mask: expected a tensor"),
        ({"input_ids": IDS, "attention_mask": "x"}, "attention_mask: expected a tensor, got str"),
        ({"input_ids": IDS, "attention_mask": IDS[0]}, r"attention_mask: expected \[B, L\] or"),
        ({"input_ids": IDS, "position_ids": "x"}, "position_ids: expected a tensor, got str"),
        ({"input_ids": IDS, "position_ids": IDS[:, :2]}, r"position_ids: \(1, 2\), expected one"),
        ({"input_ids": IDS, "past_key_values": ((IDS,),)}, "expected a Cache of .*, got tuple"),
        (
            {"input_ids": IDS, "labels": torch.tensor([[1, -100, 9999]])},
            "labels: sample 0, position 2: token id 9999 is outside the vocabulary of",
        ),
        (
            {"input_ids": IDS, "labels": torch.tensor([[1, -7, 2]])},
            "labels: sample 0, position 1: token id -7 is outside",
        ),
        (
            {"inputs_embeds": torch.zeros(1, 3, 7)},
            r"inputs_embeds: expected floating-point numbers \[B, L, 48\], got .* \(1, 3, 7\)",
        ),
    ],
)
def test_inputs_are_named(model, inputs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        model(**inputs)


@pytest.mark.parametrize("pixels", [None, [1]])
def test_images_that_are_no_tensor_are_named(model, pixels):
    kind = type(pixels).__name__
    with pytest.raises(TypeError, match=f"pixel_values: expected a tensor, got {kind}"):
        model.get_image_features(pixels, [(2, 2)])
    if pixels is not None:
        with pytest.raises(TypeError, match=f"pixel_values: expected a tensor, got {kind}"):
            model.generate(input_ids=IDS, pixel_values=pixels, image_grid_hw=[(2, 2)])


def test_labels_may_be_of_any_integers_and_name_what_has_no_loss(model):
    want = model(input_ids=IDS, labels=IDS).loss
    assert torch.equal(model(input_ids=IDS, labels=IDS.int()).loss, want)
    others = torch.tensor([[1, -1, 1]])
    assert torch.isfinite(model(input_ids=IDS, labels=others, ignore_index=-1).loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_ids": [[1]]}, "input_ids: expected a tensor, got list"),
        ({"input_ids": IDS[0]}, r"input_ids: expected integers \[B, L\], got \(3,\)"),
        ({"attention_mask": [1]}, "attention_mask: expected a tensor, got list"),
        ({"num_beams": 0}, "num_beams=0: expected a whole number"),
        ({"max_new_tokens": "x"}, "max_new_tokens='x': expected a whole number"),
    ],
)
def test_inputs_of_generation_are_named(model, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        model.generate(**{"input_ids": IDS, "max_new_tokens": 1} | options)


def test_bytes_are_no_pixels(model):
    with pytest.raises(TypeError, match=r"pixel_values: torch.uint8, expected normalised"):
        model.get_image_features(PATCHES.byte(), [(2, 2)])
    siglip = model_of(vision=siglip_config_of())
    with pytest.raises(TypeError, match=r"pixel_values: torch.uint8, expected normalised"):
        siglip.get_image_features(torch.zeros(16, 192, dtype=torch.uint8), [(4, 4)])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_pixel": 3}, "max_pixel.*max_pixels"),
        ({"text_kwargs": {"paddin": True}}, "paddin.*padding"),
        ({"image": None}, "image.*images"),
    ],
)
def test_an_unknown_option_of_the_processor_is_refused(processor, options, name):
    with pytest.raises(TypeError, match=f"unknown option .{name}"):
        processor(images=picture(16, 16), text=processor.image_token, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images_kwargs": 3}, "images_kwargs: expected a mapping of options, got int"),
        ({"common_kwargs": [1]}, "common_kwargs: expected a mapping of options, got list"),
        ({"videos": [1]}, "videos: this processor takes images and text"),
        ({"max_img_size": "x"}, "max_img_size='x': expected a whole number"),
        ({"images_kwargs": {"max_img_size": "x"}}, "max_img_size='x': expected a whole number"),
        ({"do_resize": 1}, "do_resize"),
    ],
)
def test_options_of_a_call_are_named(processor, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        processor(images=picture(16, 16), text=processor.image_token, **options)


def test_numbers_of_numpy_are_numbers(processor):
    side = np.int64(32)
    inputs = processor(images=picture(32, 32), text=processor.image_token, max_img_size=side)
    assert inputs["image_grid_hw"].tolist() == [[4, 4]]
    assert VLMConfig(image_token_id=np.int64(8), max_img_size=np.int64(512)).to_json_string()


def test_options_for_all_parts_are_of_one_call(processor):
    assert isinstance(processor(text="a")["input_ids"], torch.Tensor)
    arrays = processor(text="a", common_kwargs={"return_tensors": "np"})
    assert not isinstance(arrays["input_ids"], torch.Tensor)
    assert isinstance(processor(text="a")["input_ids"], torch.Tensor)


def test_a_chat_template_is_a_text(processor):
    with pytest.raises(TypeError, match="chat_template: expected a text, got int"):
        processor.apply_chat_template([{"role": "user", "content": "a"}], chat_template=3)


def test_an_option_is_named_as_it_was_given():
    with pytest.raises(ValueError, match=r"^vit_num_registers=4: siglip has no register"):
        VLMConfig.from_names({"vit_architecture": "siglip", "vit_num_registers": 4})


def test_a_checkpoint_of_another_model_is_told_in_a_line(model, tmp_path):
    model.save_pretrained(tmp_path / "vlm")
    model.vision_encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"config of 'dinov3_vit', .*from_backbones") as raised:
        VisionLanguageModel.from_pretrained(tmp_path / "encoder")
    assert len(str(raised.value)) < 400
    with pytest.raises(ValueError, match=r"vlm: weights of hrvlm, .* of a DINOv3Encoder"):
        DINOv3Encoder.from_pretrained(tmp_path / "vlm")
    with pytest.raises(ValueError, match=r"encoder: weights of dinov3_vit, .* a DINOv2Encoder"):
        DINOv2Encoder.from_pretrained(tmp_path / "encoder")
    with pytest.raises(TypeError, match=r"expected a Dinov2Config, got DINOv3ViTConfig"):
        DINOv2Encoder(model.config.vision_config)


@pytest.mark.parametrize("dtype", ["int32", "tensor", "bf16", torch.int32])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_parts_are_joined_in_a_floating_point_dtype(model, name, dtype):
    parts = model.vision_encoder, model.decoder, tokenizer_of()
    message = rf"^{name}=.*: expected a floating-point torch.dtype"
    with pytest.raises(ValueError, match=message):
        VisionLanguageModel.from_backbones(*parts, **{name: dtype})
    other = {"dtype": "torch_dtype", "torch_dtype": "dtype"}[name]
    with pytest.raises(ValueError, match=message):
        VisionLanguageModel.from_backbones(*parts, **{name: dtype, other: torch.float32})


def test_two_names_of_a_dtype_have_one_value(model):
    parts = model.vision_encoder, model.decoder, tokenizer_of()
    with pytest.raises(ValueError, match=r"^dtype=torch.float32 and torch_dtype='bfloat16': two"):
        VisionLanguageModel.from_backbones(*parts, dtype=torch.float32, torch_dtype="bfloat16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"foo": 1}, "unknown option 'foo': expected mp_pixel_shuffle_factor, "),
        ({"factor": 2}, "unknown option 'factor'"),
        ({"patch_size": 14}, "unknown option 'patch_size'"),
        ({"device_map": "cpu"}, "unknown option 'device_map'"),
        ({"upscale": False}, "unknown option 'upscale': did you mean 'allow_upscale'"),
        ({"vit_cls_flag": True}, "vit_cls_flag=True: "),
        ({"vit_img_size": 512}, "'vit_img_size' is a name of VLMConfig.from_names"),
        ({"image_token_id": 5}, "'image_token_id' is no option: it is that of the tokenizer"),
        ({"text_config": {}}, "'text_config' is no option: it is that of the language model"),
    ],
)
def test_options_of_joining_are_named(model, options, message):
    parts = model.vision_encoder, model.decoder, tokenizer_of()
    with pytest.raises(ValueError, match=message):
        VisionLanguageModel.from_backbones(*parts, **options)


def test_another_model_for_a_language_model_is_told_in_a_line(model, tmp_path):
    model.vision_encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a causal language model, got 'dinov3_vit'") as e:
        VisionLanguageModel.from_backbones(model.vision_encoder, str(tmp_path), tokenizer_of())
    assert str(e.value).startswith(f"language={str(tmp_path)!r}: ")
    with pytest.raises(ValueError, match="text_config: expected a causal language model"):
        model_of(text=model.config.vision_config)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: image_token_count("ab", 2), r"patch grid 'ab': expected two positive ints"),
        (lambda: image_token_count((2, 2), "x"), "factor='x': expected a whole number"),
        (lambda: pixel_shuffle("x", (2, 2), 2), "x: expected a tensor, got str"),
        (lambda: pixel_shuffle(torch.zeros(4, 8), 4, 2), r"patch grid 4: expected two positive"),
        (lambda: pixel_unshuffle(torch.zeros(1, 8), None, 2), r"patch grid None: expected two"),
        (lambda: unpatchify("x", (2, 2), 2), "patches: expected a tensor, got str"),
        (lambda: unpatchify(torch.zeros(4, 12), None, 16), "grid None: expected two positive"),
        (lambda: unpatchify(torch.zeros(4, 12), (2, 2), 0), "patch_size=0: expected a whole"),
        (lambda: unpatchify(torch.zeros(4), (2, 2), 2), r"patches: expected \[..., hp\*wp, 3\*p"),
        (lambda: patchify(torch.zeros(4, 4), 2), r"image: expected \[..., 3, H, W\], got \(4, 4\)"),
        (lambda: normalization_for(None), "name: expected the name of a checkpoint, got NoneType"),
        (lambda: get_image_string(tokenizer_of(), None), "grids: expected a list of .*NoneType"),
        (lambda: VLMProcessor.from_config(None, tokenizer_of()), "config: expected a VLMConfig"),
        (
            lambda: ModalityProjector({"vit_hidden_dim": 8}),
            "config: expected a VLMConfig, got dict",
        ),
        (
            lambda: ModalityProjector(vit_hidden_dim="8", lm_hidden_dim=8),
            "vit_hidden_dim='8', .*expected positive sizes",
        ),
        (lambda: projector()(None), "x: expected a tensor, got NoneType"),
        (
            lambda: projector()(torch.zeros(16, 8), packed="x"),
            "packed: expected PackedGrids, got str",
        ),
        (
            lambda: VLMConfig.from_names({"vit_architecture": ["dinov3"]}),
            r"=\['dinov3'\]: expected",
        ),
        (
            lambda: VLMConfig.from_names({"vit_architecture": {}}),
            r"vit_architecture=\{\}: expected",
        ),
        (lambda: VLMConfig(vision_config={"model_type": ["x"]}), "vision_config: .* model_type"),
        (lambda: VLMConfig(image_token_id="x"), "image_token_id='x': expected a token id"),
        (lambda: VLMConfig(allow_upscale="x"), "allow_upscale='x': expected True or False"),
        (lambda: VLMConfig(lm_tokenizer=3), "lm_tokenizer=3: expected a text"),
        (lambda: VLMConfig(vlm_extra_tokens=3), "vlm_extra_tokens=3: expected names with"),
        (lambda: VLMConfig.from_names({"vit_model_type": ["x"]}), r"vit_model_type=\['x'\]: exp"),
        (lambda: VLMConfig.from_names({"lm_model_type": 3}), "lm_model_type=3: expected a hub id"),
        (
            lambda: VLMConfig.from_names({"lm_re_base": ["x"]}),
            r"lm_re_base=.*: expected a pos",
        ),
        (lambda: VLMConfig.from_names({"backend": 3}), "backend must be one of auto"),
        (lambda: VLMProcessor.from_pretrained(3), "VLMProcessor.from_pretrained: expected a hub"),
        (lambda: processor_with(append_cls="x"), "append_cls='x': expected True or False"),
        (lambda: processor_with(square_size=0), "square_size=0: expected a whole number"),
        (lambda: processor_with(chat_template=3), "chat_template: expected a text, got int"),
        (lambda: model_of().resize_token_embeddings(-1), "new_num_tokens=-1: expected a whole"),
        (lambda: load_into(None, {}), "model: expected a model of torch, got NoneType"),
        (lambda: export_program(model_of()), "encoder: expected .*, got VisionLanguageModel"),
        (lambda: load_checkpoint(None), "checkpoint: expected a file or directory, got NoneType"),
        (lambda: get_tokenizer(3), "tokenizer: expected a hub id or a directory, got int"),
        (lambda: DINOv3Encoder(None), "config: expected a DINOv3ViTConfig, got NoneType"),
        (lambda: DINOv3Encoder(VLMConfig()), "config: expected a DINOv3ViTConfig, got VLMConfig"),
        (
            lambda: VLMTrainingArguments("runs/x", use_cpu=True, learning_rate_vision="fast"),
            "learning_rate_vision='fast': expected a number from 0 on",
        ),
    ],
)
def test_arguments_of_functions_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_directory_without_a_config_is_none(tmp_path):
    with pytest.raises(OSError, match=r"there is no config\.json in it"):
        VLMConfig.from_pretrained(tmp_path)
