import copy

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BartForConditionalGeneration,
    DINOv3ViTModel,
    Gemma2Config,
    GPT2Config,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionModel,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hrvlm.encoder.vision_transformer import DINOv3Encoder
from hrvlm.training.collators import VQACollator
from hrvlm.vlm.config import VLMConfig
from hrvlm.vlm.vision_language_model import VisionLanguageModel
from tests.numerics import relative_error
from tests.tiny import (
    FACTOR,
    PATCH,
    config_of,
    images_of,
    model_of,
    picture,
    processor_of,
    randomize,
    siglip_config_of,
    text_config_of,
    tokenizer_of,
    vision_config_of,
)

IMAGE = 260
# Two images, none, one: of unlike shapes, in texts of unlike lengths.
GRIDS = [(4, 6), (2, 2), (8, 2)]
TEXTS = [[7, *[IMAGE] * 6, 8, IMAGE, 9], [40, 41, 42], [50, *[IMAGE] * 4, 51, 52]]


def batch_of(texts=TEXTS, grids=GRIDS, seed=0):
    """Left-padded texts with their packed images."""
    length = max(map(len, texts))
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.tensor([[0] * (length - len(t)) + t for t in texts]),
        "attention_mask": torch.tensor([[0] * (length - len(t)) + [1] * len(t) for t in texts]),
        "pixel_values": images_of(grids, generator),
        "image_grid_hw": torch.tensor(grids),
    }


def alone(batch, sample):
    """One sample of `batch_of()`, without padding."""
    first, last = [(0, 2), (2, 2), (2, 3)][sample]
    patches = batch["pixel_values"].split([hp * wp for hp, wp in GRIDS])
    inputs = {"input_ids": torch.tensor([TEXTS[sample]])}
    if first < last:
        inputs["pixel_values"] = torch.cat(patches[first:last])
        inputs["image_grid_hw"] = GRIDS[first:last]
    return inputs


def spy_on_embeddings(model):
    seen = []
    model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    return seen


@pytest.fixture(scope="module")
def model():
    return model_of()


# Forward


@pytest.mark.parametrize(
    "changes", [{}, {"mp_append_cls": True}, {"mp_handle_special_tokens": False}]
)
def test_features_land_exactly_on_their_placeholders(changes):
    model, batch = model_of(**changes), batch_of()
    if model.config.mp_append_cls:
        texts = [[7, *[IMAGE] * 7, 8, *[IMAGE] * 2, 9], TEXTS[1], [50, *[IMAGE] * 5, 51, 52]]
        batch = batch_of(texts)
    seen = spy_on_embeddings(model)
    out = model(**batch)
    features = model.get_image_features(batch["pixel_values"], batch["image_grid_hw"])
    extra = model.config.mp_append_cls
    assert [len(f) for f in features.pooler_output] == [6 + extra, 1 + extra, 4 + extra]
    packed = torch.cat(features.pooler_output)
    is_image = batch["input_ids"] == IMAGE
    assert torch.equal(seen[0][is_image], packed)
    assert torch.equal(out.image_hidden_states, packed)
    assert torch.equal(torch.cat(out.image_outputs.pooler_output), packed)
    words = model.get_input_embeddings()(batch["input_ids"])
    assert torch.equal(seen[0][~is_image], words[~is_image])


def test_features_are_those_of_encoder_and_projector(model):
    batch = batch_of()
    features = model.get_image_features(batch["pixel_values"], GRIDS).pooler_output
    patches = batch["pixel_values"].split([hp * wp for hp, wp in GRIDS])
    for feature, own, grid in zip(features, patches, GRIDS, strict=True):
        hidden = model.vision_encoder(own, grids=[grid]).packed_last_hidden_state
        assert relative_error(feature, model.MP(hidden[None], *grid)[0]) < 1e-5


def test_a_batch_is_as_its_samples_are_alone(model):
    batch = batch_of()
    logits = model(**batch).logits
    for sample, text in enumerate(TEXTS):
        own = model(**alone(batch, sample)).logits[0]
        assert relative_error(logits[sample, -len(text) :], own) < 1e-5


def test_an_image_changes_its_own_sample_only(model):
    batch = batch_of()
    other = dict(batch, pixel_values=batch["pixel_values"].clone())
    other["pixel_values"][24:28] += 1  # the second image
    before, after = model(**batch).logits, model(**other).logits
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1:], after[1:])


def test_text_alone_never_meets_the_encoder(model):
    batch = batch_of([TEXTS[1]], [])
    bare = {key: batch[key] for key in ("input_ids", "attention_mask")}
    expected = model.decoder(**bare).logits
    assert torch.equal(model(**bare).logits, expected)
    empty = {"pixel_values": torch.zeros(0, 3 * PATCH**2), "image_grid_hw": torch.zeros(0, 2)}
    assert torch.equal(model(**bare, **empty).logits, expected)
    assert model(**bare).image_hidden_states is model(**bare).image_outputs is None


def test_the_loss_is_that_of_the_language_model(model):
    batch = batch_of()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    out = model(**batch, labels=labels)
    flat = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    count = (labels[:, 1:] != -100).sum()
    assert torch.isclose(out.loss, flat / count)
    assert torch.isclose(model(**batch, labels=labels, num_items_in_batch=7).loss, flat / 7)


def test_the_last_logits_can_be_had_alone(model):
    batch = batch_of()
    last = model(**batch, logits_to_keep=2).logits
    assert relative_error(last, model(**batch).logits[:, -2:]) < 1e-6


def test_extras_come_on_request(model):
    batch = batch_of()
    out = model(**batch, output_hidden_states=True, use_cache=True)
    assert len(out.hidden_states) == 3 and out.past_key_values.get_seq_length() == 10
    logits, *_ = model(**batch, return_dict=False)
    assert torch.equal(logits, out.logits)


@pytest.mark.parametrize("text", ["gpt2", "gemma2"])
def test_other_language_models_fit(text):
    if text == "gpt2":
        text = GPT2Config(vocab_size=261, n_embd=48, n_layer=1, n_head=2, n_positions=64)
    else:
        text = Gemma2Config(
            vocab_size=261,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    model, batch = model_of(config_of(text=text)), batch_of()
    assert model(**batch).logits.shape == (3, 10, 261)
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape[0] == 3


def test_embeddings_can_be_given_instead(model):
    batch = batch_of()
    seen = spy_on_embeddings(model)
    expected = model(**batch).logits
    out = model(inputs_embeds=seen[0], attention_mask=batch["attention_mask"])
    assert torch.equal(out.logits, expected)


# What is refused


@pytest.mark.parametrize(
    ("texts", "grids", "message"),
    [
        ([[5, IMAGE, IMAGE]], [(4, 4)], "sample 0: got 2 image placeholders, expected 4.*4x4"),
        ([[IMAGE] * 5], [(4, 4)], "sample 0: got 5 image placeholders, expected 4"),
        ([[IMAGE] * 5], [(4, 4), (4, 4)], "sample 0: got 5 .*expected 4 or 8.*image 1.*4x4"),
        ([[IMAGE], [5]], [(2, 2), (2, 4)], "sample 1: .*end.*expected 2 more, got 0.*image 1.*2x4"),
        ([[5], [IMAGE]], [], "sample 1: got 1 image placeholders, expected 0.*no image is left"),
        ([[IMAGE] * 2], [(4, 3)], "image 0: patch grid 4x3 is not divisible.*factor 2"),
        ([[IMAGE]], [(2, 0)], r"image 0: expected two positive ints \(hp, wp\), got \[2, 0\]"),
        ([[5, 261]], [], "sample 0, position 1: token id 261 is outside the vocabulary of 261"),
        ([[5], [-3]], [], "sample 1, position 0: token id -3 is outside"),
        (
            [[IMAGE] * 2, [IMAGE] * 513],
            [(2, 4), (2, 1024), (2, 2)],
            r"sample 1: 513 tokens, 513 of them from images 1 to 2 \(patch grids 2x1024, 2x2\)"
            ".*context holds 512",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(model, texts, grids, message):
    batch = batch_of(texts, grids)
    ran = []
    handles = [
        part.register_forward_pre_hook(lambda *_: ran.append(1))
        for part in (model.vision_encoder, model.MP, model.decoder)
    ]
    with pytest.raises(ValueError, match=message):
        model(**batch)
    with pytest.raises(ValueError, match=message):
        model.generate(**batch, max_new_tokens=2)
    for handle in handles:
        handle.remove()
    assert not ran


def test_contradicting_arguments_are_refused(model):
    batch = batch_of()
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(attention_mask=batch["attention_mask"])
    with pytest.raises(ValueError, match="has 44 patches and image_grid_hw 0 images"):
        model(**(batch | {"image_grid_hw": None}))
    with pytest.raises(ValueError, match="has 0 patches and image_grid_hw 3 images"):
        model(**(batch | {"pixel_values": None}))
    with pytest.raises(ValueError, match="the placeholders end before the images do"):
        embeds = torch.zeros(3, 10, 48)
        model(**(batch | {"input_ids": None}), inputs_embeds=embeds)
    with pytest.raises(ValueError, match="image_token_id is None"):
        model_of(image_token_id=None)(**batch)
    with pytest.raises(ValueError, match="pixel_values"):
        model(**(batch | {"pixel_values": batch["pixel_values"][:-1]}))


# Generation


def test_batched_generation_gives_the_tokens_of_each_sample_alone(model):
    batch = batch_of()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    together = model.generate(**batch, **options)[:, -8:]
    for sample in range(3):
        assert torch.equal(
            model.generate(**alone(batch, sample), **options)[0, -8:], together[sample]
        )
    without_cache = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(without_cache[:, -8:], together)
    pairs = batch | {"image_grid_hw": GRIDS}
    assert torch.equal(model.generate(**pairs, **options)[:, -8:], together)


def test_beams_are_those_of_each_sample_alone(model):
    batch = batch_of()
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    options |= {"eos_token_id": None}
    together = model.generate(**batch, **options)[:, -6:].view(3, 2, 6)
    for sample in range(3):
        own = model.generate(**alone(batch, sample), **options)[:, -6:]
        assert torch.equal(own, together[sample])


def test_several_sequences_are_sampled_for_each_sample(model):
    batch = batch_of()
    options = {"max_new_tokens": 5, "do_sample": True, "eos_token_id": None}
    torch.manual_seed(0)
    out = model.generate(**batch, **options, num_return_sequences=3)
    assert out.shape == (9, 15)
    expected = batch["input_ids"].repeat_interleave(3, dim=0)
    assert torch.equal(out[:, :10], expected)
    torch.manual_seed(0)
    again = model.generate(**batch, **options, num_return_sequences=3)
    assert torch.equal(out, again)


def test_copies_of_a_sample_get_copies_of_its_images(model):
    batch = batch_of()
    ids, inputs = model._expand_inputs_for_generation(2, **batch)
    assert torch.equal(ids, batch["input_ids"].repeat_interleave(2, dim=0))
    a, b, c = batch["pixel_values"].split([24, 4, 16])
    assert torch.equal(inputs["pixel_values"], torch.cat([a, b, a, b, c, c]))
    assert inputs["image_grid_hw"] == [GRIDS[i] for i in (0, 1, 0, 1, 2, 2)]
    assert torch.equal(inputs["attention_mask"], batch["attention_mask"].repeat_interleave(2, 0))


def test_images_may_come_later_in_a_conversation(model):
    batch = batch_of([TEXTS[0]], GRIDS[:2])
    whole = model(**batch).logits
    first = {"input_ids": batch["input_ids"][:, :8], "pixel_values": batch["pixel_values"][:24]}
    cache = model(**first, image_grid_hw=GRIDS[:1], use_cache=True).past_key_values
    second = {"input_ids": batch["input_ids"][:, 8:], "pixel_values": batch["pixel_values"][24:]}
    rest = model(**second, image_grid_hw=GRIDS[1:2], past_key_values=cache).logits
    assert relative_error(rest, whole[:, 8:]) < 1e-5


# Training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_part(checkpointing):
    model, batch = model_of().train(), batch_of()
    if checkpointing:
        model.gradient_checkpointing_enable()
        assert all(layer.gradient_checkpointing for layer in model.vision_encoder.layer)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    wanted = dict(model.named_parameters())
    frozen = wanted.pop("vision_encoder.embeddings.mask_token")
    assert not frozen.requires_grad
    assert all(p.grad is not None and p.grad.norm() > 0 for p in wanted.values())
    if checkpointing:
        plain = model_of().train()
        plain(**batch, labels=batch["input_ids"]).loss.backward()
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                assert relative_error(wanted[name].grad, parameter.grad) < 1e-5, name


def test_a_frozen_encoder_trains_the_rest():
    model, batch = model_of().train(), batch_of()
    model.vision_encoder.freeze()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is None for p in model.vision_encoder.parameters())
    assert model.MP.proj.weight.grad.norm() > 0


@pytest.fixture
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("vision", [vision_config_of, siglip_config_of])
def test_a_rank_without_images_still_has_gradients_for_all(one_process, vision):
    config = config_of(vision(), max_img_size=32)
    model = torch.nn.parallel.DistributedDataParallel(model_of(config).train())
    text = batch_of([TEXTS[1]], [])
    grids = [(4, 4)]
    with_image = batch_of([[5, *[IMAGE] * 4, 6]], grids)
    nothing = {key: value[:0] for key, value in text.items()}
    for batch in (text, with_image, nothing, text):  # DDP waits for every parameter in each round
        model.zero_grad()
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained)
        if batch is text:
            assert not any(
                p.grad.any() for p in model.module.vision_encoder.parameters() if p.grad is not None
            )
            expected = model.module.decoder(**text_only(text), labels=text["input_ids"]).loss
            assert torch.equal(loss, expected)


def test_the_trainer_trains_and_evaluates(tmp_path):
    processor = processor_of()
    prompt = "<|image|>what?"
    data = []
    for seed, (width, height) in enumerate([(20, 40), (64, 16), (30, 30)]):
        row = processor(images=picture(width, height, seed), text=prompt + "abc"[: seed + 1])
        labels = row["input_ids"].clone()
        labels[:, : -seed - 1] = -100
        data.append(row.data | {"labels": labels})
    text = processor(text="only text")
    data.append(text.data | {"labels": text["input_ids"]})
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    model = model_of()
    trainer = Trainer(
        model, arguments, VQACollator(processor), train_dataset=data, eval_dataset=data
    )
    before = trainer.predict(data)
    assert before.predictions.shape[0] == 4
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before.metrics["test_loss"]


def text_only(batch):
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def test_a_batch_without_samples_has_a_loss_of_zero(model):
    batch = {key: value[:0] for key, value in batch_of().items()}
    out = model(**batch, labels=batch["input_ids"])
    assert out.loss.item() == 0 and out.logits.shape == (0, 10, 261)
    assert model(**batch).loss is None


# Saving and loading


def trained_of(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vision", [vision_config_of, siglip_config_of])
def test_saving_and_loading_is_exact(tmp_path, dtype, tied, vision):
    config = config_of(vision(), text_config_of(tie_word_embeddings=tied))
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    randomize(model).eval().save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is VisionLanguageModel and loaded.dtype == dtype
    assert type(AutoModel.from_pretrained(tmp_path)) is VisionLanguageModel
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert trained_of(loaded) == trained_of(model)  # DDP waits for all of them
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    batch = batch_of([[5, *[IMAGE] * 4, 6]], [(4, 4)])
    assert torch.equal(model(**batch).logits, loaded(**batch).logits)


def test_the_encoder_is_saved_with_transformers_keys(tmp_path, model):
    from safetensors import safe_open

    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "vision_encoder.layer.0.attention.q_proj.weight" in keys
    assert "MP.proj.weight" in keys and "decoder.model.embed_tokens.weight" in keys


def test_features_take_the_dtype_of_the_embeddings():
    model, batch = model_of(), batch_of()
    model.decoder.bfloat16()
    out = model(**batch)
    assert out.image_hidden_states.dtype == out.logits.dtype == torch.bfloat16


def test_the_vocabulary_can_grow(tmp_path):
    model, batch = model_of(), batch_of()
    before = model(**batch).logits
    model.resize_token_embeddings(300)
    assert model.config.text_config.vocab_size == model.decoder.config.vocab_size == 300
    assert model.vocab_size == 300
    out = model(**batch, labels=batch["input_ids"])
    assert torch.equal(out.logits[..., :261], before) and out.logits.shape[-1] == 300
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = VisionLanguageModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, out.logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_of_the_language_model_can_be_chosen(tmp_path, model, attention):
    model.save_pretrained(tmp_path)
    loaded = VisionLanguageModel.from_pretrained(tmp_path, attn_implementation=attention)
    assert loaded.decoder.config._attn_implementation == attention
    batch = batch_of()
    mask = batch["attention_mask"].bool()
    out = loaded(**batch, output_attentions=attention == "eager")
    assert relative_error(out.logits[mask], model(**batch).logits[mask]) < 1e-5
    assert (out.attentions is not None) == (attention == "eager")


def test_a_copy_is_equal_and_apart(model):
    other, batch = copy.deepcopy(model), batch_of()
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    randomize(other.MP, 5)
    assert not torch.equal(other(**batch).logits, model(**batch).logits)


def test_rope_can_be_left_out(model):
    plain, batch = model_of(config_of(vision_config_of(use_rope=False))), batch_of()
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(plain(**batch).logits, model(**batch).logits)
    # Without positions, an image whose patches are all alike looks alike in every token.
    batch["pixel_values"] = torch.ones_like(batch["pixel_values"])
    features = plain.get_image_features(batch["pixel_values"], GRIDS).pooler_output[0]
    assert relative_error(features, features[:1].expand_as(features)) < 1e-5
    turned = model.get_image_features(batch["pixel_values"], GRIDS).pooler_output[0]
    assert relative_error(turned, turned[:1].expand_as(turned)) > 1e-3


# SigLIP


def test_siglip_sees_squares_in_nanovlms_order(rng):
    model = model_of(config_of(siglip_config_of()))
    images = torch.randn(2, 3, 32, 32, generator=rng)
    rows = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [2, 3, 4, 4, p, p]
    rows = rows.permute(0, 2, 3, 1, 4, 5).reshape(32, -1)
    features = model.get_image_features(rows, [(4, 4)] * 2).pooler_output
    hidden = model.vision_encoder(images).last_hidden_state
    assert relative_error(torch.stack(features), model.MP(hidden)) < 1e-6
    with pytest.raises(ValueError, match=r"image 1: patch grid 4x6.*4x4 only.*32x32 pixels"):
        model.get_image_features(torch.zeros(40, 192), [(4, 4), (4, 6)])


# Joining parts


def parts():
    vision = randomize(DINOv3ViTModel(vision_config_of()), 1).eval()
    language = randomize(AutoModelForCausalLM.from_config(text_config_of(vocab_size=260)), 2).eval()
    return vision, language


@pytest.mark.parametrize("given", ["names", "models"])
def test_pretrained_parts_are_joined(tmp_path, given):
    vision, language = parts()
    tokenizer = tokenizer_of()
    expected = copy.deepcopy(language)
    sources = (vision, language, tokenizer)
    if given == "names":
        for name, part in zip("vlt", sources, strict=True):
            part.save_pretrained(tmp_path / name)
        sources = tuple(str(tmp_path / name) for name in "vlt")
    model = VisionLanguageModel.from_backbones(
        *sources, mp_pixel_shuffle_factor=FACTOR, max_img_size=64
    ).eval()
    assert type(model.vision_encoder) is DINOv3Encoder
    assert model.config.image_token_id == tokenizer.image_token_id == 260
    assert model.config.text_config.vocab_size == 261
    assert (model.config.lm_tokenizer is not None) == (given == "names")
    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert torch.equal(model(**text).logits[..., :260], expected(**text).logits)
    image = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    encoded = model.vision_encoder(image).last_hidden_state
    assert relative_error(encoded, vision(image).last_hidden_state) < 1e-5
    assert 0.018 < model.MP.proj.weight.std().item() < 0.022
    assert not any(p.is_meta for p in model.parameters())
    batch = batch_of()
    assert torch.isfinite(model(**batch).logits).all()
    model.save_pretrained(tmp_path / "joined")
    loaded = VisionLanguageModel.from_pretrained(tmp_path / "joined")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_siglip_is_joined_without_its_pooling_head():
    vision = randomize(SiglipVisionModel(siglip_config_of()), 1).eval()
    _, language = parts()
    model = VisionLanguageModel.from_backbones(
        vision, language, tokenizer_of(), mp_pixel_shuffle_factor=FACTOR, dtype=torch.bfloat16
    )
    assert not any("head" in name for name, _ in model.vision_encoder.named_parameters())
    assert any("head" in name for name, _ in vision.named_parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.decoder.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"torch_dtype": torch.bfloat16},
        {"torch_dtype": "bfloat16"},
        {"dtype": torch.bfloat16, "torch_dtype": "bfloat16"},
    ],
)
def test_parts_are_joined_in_a_dtype_by_any_name_of_it(options):
    model = VisionLanguageModel.from_backbones(*parts(), tokenizer_of(), **options)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_siglips_vision_tower_is_taken_out_of_the_checkpoint(tmp_path):
    text = SiglipTextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    towers = SiglipConfig(text_config=text.to_dict(), vision_config=siglip_config_of().to_dict())
    both = randomize(SiglipModel(towers), 1)
    both.save_pretrained(tmp_path)
    model = VisionLanguageModel.from_backbones(
        str(tmp_path), parts()[1], tokenizer_of(), mp_pixel_shuffle_factor=FACTOR
    )
    theirs = both.vision_model.state_dict()
    ours = model.vision_encoder.state_dict()
    assert ours and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert model.config.vit_model_type == str(tmp_path)


def test_wrong_parts_are_refused():
    vision, language = parts()
    with pytest.raises(TypeError, match=r"vision: expected a name.*LlamaForCausalLM"):
        VisionLanguageModel.from_backbones(language, language, tokenizer_of())
    with pytest.raises(TypeError, match=r"language: expected a name.*DINOv3ViTModel"):
        VisionLanguageModel.from_backbones(vision, vision, tokenizer_of())
    with pytest.raises(ValueError, match="tokenizer: it has no image_token"):
        VisionLanguageModel.from_backbones(vision, language, tokenizer_of(image_token=None))
    with pytest.raises(ValueError, match=r"max_image_size.*max_img_size"):
        VisionLanguageModel.from_backbones(vision, language, tokenizer_of(), max_image_size=1)


@pytest.mark.parametrize(
    ("cls", "sizes"),
    [
        (T5ForConditionalGeneration, {"d_ff": 32, "num_layers": 1, "num_heads": 2}),
        (BartForConditionalGeneration, {"encoder_layers": 1, "decoder_layers": 1}),
    ],
)
def test_a_loaded_model_with_an_encoder_is_no_language_model(cls, sizes):
    language = cls(cls.config_class(vocab_size=260, d_model=32, **sizes))
    with pytest.raises(TypeError, match=rf"^language: expected .* causal .*, got {cls.__name__}"):
        VisionLanguageModel.from_backbones(parts()[0], language, tokenizer_of())
    assert language.get_input_embeddings().num_embeddings == language.config.vocab_size == 260


@pytest.mark.parametrize(
    "options", [{"mp_pixel_shuffle_factor": 0}, {"max_img_size": -1}, {"image_mean": "x"}]
)
def test_parts_that_are_refused_stay_as_they_are(options):
    vision, language = parts()
    before = copy.deepcopy(language.config.to_dict())
    with pytest.raises(ValueError, match=next(iter(options))):
        VisionLanguageModel.from_backbones(vision, language, tokenizer_of(), **options)
    assert language.get_input_embeddings().num_embeddings == 260
    assert language.config.to_dict() == before


# End to end


def test_the_pipeline_answers_about_images(tmp_path, model):
    model.save_pretrained(tmp_path)
    processor = processor_of()
    processor.save_pretrained(tmp_path)
    picture(40, 30).save(tmp_path / "photo.png")
    content = [
        {"type": "image", "image": picture(20, 50, 1)},
        {"type": "image", "path": str(tmp_path / "photo.png")},
        {"type": "text", "text": "which is wider?"},
    ]
    chat = [{"role": "user", "content": content}]
    ask = pipeline("image-text-to-text", model=str(tmp_path))
    answer = ask(text=chat, max_new_tokens=6, return_full_text=False)[0]["generated_text"]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert answer == processor.decode(new, skip_special_tokens=True)
    plain = ask(images=picture(20, 50, 1), text="what? <|image|>", max_new_tokens=2)
    assert isinstance(plain[0]["generated_text"], str)
    ask = pipeline("any-to-any", model=str(tmp_path))
    assert ask(chat, max_new_tokens=6, return_full_text=False)[0]["generated_text"] == answer


def test_a_config_made_by_hand_makes_the_model():
    config = VLMConfig(vision_config=vision_config_of(), text_config=text_config_of())
    assert type(AutoModelForImageTextToText.from_config(config)) is VisionLanguageModel
