"""What tools for transformers' vision-language models look for in a model, and find in ours."""

import copy
import inspect

import pytest
import torch
from transformers import GenerationMixin, PreTrainedModel, StaticCache, pipeline

from hrvlm.encoder.vision_transformer import DINOv3Encoder
from hrvlm.vlm.config import VLMConfig
from hrvlm.vlm.vision_language_model import VisionLanguageModel
from tests.tiny import (
    config_of,
    images_of,
    model_of,
    picture,
    processor_of,
    siglip_config_of,
    text_config_of,
    vision_config_of,
)
from tests.vlm.test_vision_language_model import IMAGE, TEXTS, alone, batch_of


@pytest.fixture(scope="module")
def model():
    return model_of()


# Signatures


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("generate", GenerationMixin),
        ("prepare_inputs_for_generation", GenerationMixin),
        ("resize_token_embeddings", PreTrainedModel),
    ],
)
def test_an_overridden_method_has_the_parameters_of_the_base(name, base):
    ours = inspect.signature(getattr(VisionLanguageModel, name)).parameters
    assert [*ours] == [*inspect.signature(getattr(base, name)).parameters]


# Embeddings in place of ids


def test_images_find_their_places_among_embeddings(model):
    batch = batch_of()
    expected = model(**batch).logits
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    assert torch.equal(model(inputs_embeds=embeds, **batch).logits, expected)


def test_generation_goes_on_from_embeddings_with_images_and_with_beams(model):
    options = {"max_new_tokens": 4, "do_sample": False}
    for sample in range(3):
        inputs = alone(batch_of(), sample)
        ids = inputs.pop("input_ids")
        embeds = model.get_input_embeddings()(ids)
        for beams in (1, 2):
            whole = model.generate(input_ids=ids, **inputs, **options, num_beams=beams)
            new = model.generate(inputs_embeds=embeds, **inputs, **options, num_beams=beams)
            assert torch.equal(new, whole[:, ids.shape[1] :]), (sample, beams)


# A draft model


def test_the_model_can_be_its_own_draft_and_sees_the_images(model):
    inputs = alone(batch_of(), 0)
    options = {"max_new_tokens": 6, "do_sample": False}
    draft, seen = copy.deepcopy(model), []
    hook = draft.vision_encoder.register_forward_pre_hook(lambda *_: seen.append(1))
    drafted = model.generate(**inputs, **options, assistant_model=draft)
    hook.remove()
    assert torch.equal(drafted, model.generate(**inputs, **options)) and len(seen) == 1


# The model without its head


@pytest.mark.parametrize("vision", [vision_config_of, siglip_config_of])
def test_the_base_model_ends_before_the_head(vision):
    model = model_of(vision=vision())
    batch = batch_of()
    if vision is siglip_config_of:
        batch = batch_of([[7, *[IMAGE] * 4]], [(4, 4)])
    whole, base = model(**batch, output_hidden_states=True), model.base_model
    out = base(**batch, logits_to_keep=2, use_cache=True)
    assert torch.equal(out.last_hidden_state, whole.hidden_states[-1])
    assert torch.equal(model.get_output_embeddings()(out.last_hidden_state), whole.logits)
    assert torch.equal(out.image_hidden_states, whole.image_hidden_states)
    assert out.past_key_values.get_seq_length() == batch["input_ids"].shape[1]
    assert torch.equal(base(**batch, return_dict=False)[0], out.last_hidden_state)


def test_the_base_model_is_the_model_less_its_head():
    model = model_of(text=text_config_of(tie_word_embeddings=False))
    base = model.base_model
    ids = {id(p) for p in base.parameters()}
    assert {n for n, p in model.named_parameters() if id(p) not in ids} == {
        "decoder.lm_head.weight"
    }
    assert base.config is model.config and base.get_decoder() is model.decoder
    assert not [n for n, _ in model.named_modules() if "headless" in n]
    copied = copy.deepcopy(model)
    assert copied.base_model.decoder is copied.decoder.model


def test_a_language_model_all_in_one_piece_has_no_base_model(model):
    whole = copy.deepcopy(model)
    whole.decoder = whole.decoder.model
    with pytest.raises(ValueError, match="LlamaModel has no base_model without its head"):
        whole.headless  # noqa: B018


# Flags


def test_hidden_states_of_the_encoder_come_with_image_features(model):
    grids, pixels = [(4, 6)], images_of([(4, 6)], torch.Generator().manual_seed(0))
    want = model.vision_encoder(pixels, grids=grids, output_hidden_states=True)
    out = model.get_image_features(pixels, grids, output_hidden_states=True)
    assert torch.equal(out.hidden_states[1], want.packed_hidden_states[1])
    assert model.get_image_features(pixels, grids).hidden_states is None
    batch = alone(batch_of(), 0)
    want = model.get_image_features(
        batch["pixel_values"], batch["image_grid_hw"], output_hidden_states=True
    )
    for given in (model, model.base_model):
        said = given(**batch, output_hidden_states=True).image_outputs
        assert all(map(torch.equal, said.hidden_states, want.hidden_states))
        assert said.last_hidden_state is given(**batch).image_outputs.hidden_states is None
    *_, said = model(**batch, return_dict=False)
    assert isinstance(said, tuple) and torch.equal(said[0][0], want.pooler_output[0])
    first, *_ = model.get_image_features(pixels, grids, return_dict=False)
    assert torch.equal(first, out.last_hidden_state)
    with pytest.raises(ValueError, match=r"output_attentions=True .*output_prefix_attentions"):
        model.get_image_features(pixels, grids, output_attentions=True)
    assert model.get_image_features(pixels, grids, output_attentions=False).attentions is None


def test_siglip_gives_its_attentions_where_it_computes_them():
    model = model_of(vision=siglip_config_of())
    grids, pixels = [(4, 4)], images_of([(4, 4)], torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match='"vision_config": "eager"'):
        model.get_image_features(pixels, grids, output_attentions=True)
    model.set_attn_implementation({"vision_config": "eager"})
    out = model.get_image_features(pixels, grids, output_attentions=True, output_hidden_states=True)
    assert out.attentions[0].shape == (1, 2, 16, 16) and len(out.hidden_states) == 3
    model.config.vision_config.output_hidden_states = True
    assert len(model.get_image_features(pixels, grids).hidden_states) == 3
    assert model.get_image_features(pixels, grids, output_hidden_states=False).hidden_states is None


def test_attentions_that_nobody_computes_are_refused_by_name():
    model, batch = model_of(), batch_of()
    with pytest.raises(ValueError, match=r'output_attentions.*"text_config": "eager"'):
        model(**batch, output_attentions=True)
    model.set_attn_implementation({"text_config": "eager"})
    out = model(**batch, output_attentions=True)
    assert out.attentions[0].shape == (3, 4, 10, 10)
    assert model.generate(
        **batch, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True
    ).attentions


@pytest.mark.parametrize("part", ["config", "text_config"])
def test_flags_of_the_config_are_those_of_a_call(part):
    model, batch = model_of(), batch_of()
    want = model(**batch, output_hidden_states=True).hidden_states
    config = model.config if part == "config" else model.config.text_config
    config.output_hidden_states = True
    assert all(map(torch.equal, model(**batch).hidden_states, want))
    if part == "config":
        config.return_dict = False
        out = model(**batch)
        assert isinstance(out, tuple) and all(map(torch.equal, out[2], want))
    assert model(**batch, output_hidden_states=False, return_dict=True).hidden_states is None


def test_flags_of_the_encoders_config_are_those_of_a_call(rng):
    config = vision_config_of(output_hidden_states=True, return_dict=False)
    encoder, images = DINOv3Encoder(config).eval(), torch.randn(1, 3, 16, 24, generator=rng)
    out = encoder(images)
    assert isinstance(out, tuple) and len(out[2]) == 3
    model = VisionLanguageModel(config_of(vision=config)).eval()
    assert len(model.get_image_features(*image_of(rng)).hidden_states) == 3
    assert model(**batch_of()).logits.shape == (3, 10, 261)
    config.output_hidden_states, config._attn_implementation = False, "eager"
    config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions=True"):
        encoder(images)
    assert len(encoder(images, output_attentions=False)) == 2


def image_of(rng):
    return images_of([(4, 6)], rng), [(4, 6)]


# A cache of fixed length


def waits_per_token(model, inputs, tokens, **options):
    """Reads of a tensor by the host from our own files while `tokens` tokens are made."""
    count, names = [], ("__bool__", "__int__", "__index__", "item", "tolist")
    originals = {name: getattr(torch.Tensor, name) for name in names}

    def spy(name):
        def read(self, *args):
            frames = inspect.stack(context=0)[1:8]
            count.extend(1 for f in frames[:1] if "/hrvlm/" in f.filename)
            return originals[name](self, *args)

        return read

    try:
        for name in names:
            setattr(torch.Tensor, name, spy(name))
        model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None, **options
        )
    finally:
        for name in names:
            setattr(torch.Tensor, name, originals[name])
    return len(count)


@pytest.mark.parametrize("cache", [None, "static"])
def test_no_token_makes_the_host_wait_for_the_device(model, cache):
    options = {"cache_implementation": cache, "disable_compile": True}
    for inputs in (alone(batch_of(), 0), alone(batch_of(), 1)):
        few, many = (waits_per_token(model, inputs, n, **options) for n in (2, 8))
        assert few == many > 0


def test_a_static_cache_is_checked_at_the_start_of_a_text(model):
    cache = StaticCache(config=model.config.text_config, max_cache_len=32)
    with pytest.raises(ValueError, match="got 7 image placeholders, expected 0"):
        model(input_ids=torch.tensor([TEXTS[0]]), past_key_values=cache)


def test_one_switch_lets_float16_run_by_argument_config_pipeline_and_autocast(tmp_path):
    model_of().save_pretrained(tmp_path)
    processor = processor_of()
    processor.save_pretrained(tmp_path)
    content = [{"type": "image", "image": picture(60, 40)}, {"type": "text", "text": "hi"}]
    chat = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    half = {"dtype": torch.float16}
    refused = pytest.raises(ValueError, match="or allow_fp16=True")
    with refused:
        VisionLanguageModel.from_pretrained(tmp_path, **half)(**inputs)
    config = VLMConfig.from_pretrained(tmp_path, allow_fp16=True)
    assert config.allow_fp16 and config.vision_config.allow_fp16
    assert config_of(allow_fp16=True).vision_config.allow_fp16 and not config_of().allow_fp16
    with pytest.raises(ValueError, match="allow_fp16='yes'"):
        config_of(allow_fp16="yes")
    for options in ({"allow_fp16": True}, {"config": config}):
        model = VisionLanguageModel.from_pretrained(tmp_path, **half, **options)
        assert model(**inputs).logits.dtype == torch.float16
    model.save_pretrained(tmp_path / "saved")  # the switch with it
    VisionLanguageModel.from_pretrained(tmp_path / "saved")(**inputs)
    model = VisionLanguageModel.from_pretrained(tmp_path)
    with torch.autocast("cpu", torch.float16):
        with refused:
            model(**inputs)
        model.config.allow_fp16 = True
        model(**inputs)
    options = half | {"model_kwargs": {"allow_fp16": True}}
    ask = pipeline("image-text-to-text", model=str(tmp_path), device="cpu", **options)
    assert ask(text=chat, max_new_tokens=2)


def test_inputs_of_other_types_are_named(model):
    for name, options in (
        ("input_ids", {"input_ids": [[1, 2]]}),
        ("input_ids", {"input_ids": "say"}),
        ("pixel_values", {"input_ids": torch.ones(1, 2).long(), "pixel_values": [picture(8, 8)]}),
    ):
        with pytest.raises(TypeError, match=rf"^{name}: expected a tensor, got .*VLMProcessor"):
            model(**options)
    with pytest.raises(ValueError, match="vision_config='dinov3': expected a config"):
        VLMConfig(vision_config="dinov3")
    with pytest.raises(ValueError, match=r"names: expected a mapping"):
        VLMConfig.from_names(["vit_n_blocks"])
