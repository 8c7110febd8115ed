"""The losses that teach reading: targets at the right places, training that resumes exactly."""

import pytest
import torch
import yaml
from transformers import TrainingArguments

from hrvlm.drawn_text.drawing import RenderOptions, render
from hrvlm.drawn_text.words import CHARACTERS
from hrvlm.reader.model import byte_tokenizer, new_reader
from hrvlm.reader.score import score
from hrvlm.training.optimizers import CombinedOptimizer
from recipes.reader.losses import BLANK, ReadingCollator, ReadingData, ReadingOptions, Stage
from recipes.reader.train import (
    RECIPE,
    SECTIONS,
    make_optimizer,
    make_trainer,
    read_recipe,
    reading_options,
    train_reader,
    without_head,
)

VISION = {
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_register_tokens": 1,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
OPTIONS = {"mp_pixel_shuffle_factor": 2, "max_img_size": 512, "allow_upscale": False}


def recipe_of(directory, **training):
    fields = {
        "output_dir": str(directory),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "disable_tqdm": True,
        "report_to": "none",
        "lr_scheduler_type": "constant",
    }
    stages = [
        {"steps": 2, "encoder_only": True, "draw": {"layouts": {"page": 1.0}, "scale": 0.5}},
        {"steps": 4, "draw": {"font_sizes": [14, 16], "max_characters": 6}},
    ]
    return {
        "seed": 0,
        "model": {"vision_config": VISION, "text_config": TEXT, **OPTIONS},
        "reading": {"stages": stages},
        "optimizer": {"muon_lr": 0.02, "adamw_lr": 1e-3, "weight_decay": 0.01},
        "training": fields | training,
    }


def test_tokenizer_spells():
    tokenizer = byte_tokenizer()
    text = "".join(CHARACTERS) + "é"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(CHARACTERS) + 2 and tokenizer.decode(ids) == text


def test_features_are_what_the_processor_makes():
    """Same ids and pixels as the chat template and the processor give for the whole chat."""
    _, processor = new_reader(VISION, TEXT, **OPTIONS)
    data = ReadingData(processor, ReadingOptions([Stage(1)]), seed=3, batch_size=2, steps=2)
    sample = render(3, 1)
    features = data.features(sample, "Read.")
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read."}]},
        {"role": "assistant", "content": [{"type": "text", "text": sample.text}]},
    ]
    whole = processor(images=[sample.image], text=processor.apply_chat_template(chat))
    assert torch.equal(features["input_ids"], whole["input_ids"][0])
    assert torch.equal(features["pixel_values"], whole["pixel_values"])
    answer = features["labels"] >= 0
    assert processor.tokenizer.decode(features["labels"][answer]) == sample.text + "<|end|>"


@pytest.mark.parametrize("layout", ["line", "lines", "receipt"])
def test_targets_point_at_the_characters(layout):
    _, processor = new_reader(VISION, TEXT, **OPTIONS)
    draw = RenderOptions(layouts={layout: 1.0}, font_sizes=(14, 20))
    data = ReadingData(processor, ReadingOptions([Stage(1, draw)]), seed=1, batch_size=1, steps=9)
    for index in range(6):
        sample, features = render(1, index, draw), data[index]
        (hp, wp), ids = features["image_grid_hw"][0].tolist(), features["input_ids"]
        first = ids.tolist().index(processor.image_token_id)
        asked = (features["pointer"] >= 0).nonzero().flatten().tolist()
        assert len(asked) == len(sample.text)
        for position, character, (x, y) in zip(asked, sample.text, sample.centres, strict=True):
            assert chr(CHARACTERS.index(character) + 32) == character or character == "\n"
            assert processor.tokenizer.decode(ids[position + 1]) == character
            token = features["pointer"][position].item() - first
            row, column = divmod(token, wp // 2)
            x, y = x * wp * 8 / sample.image.width, y * hp * 8 / sample.image.height
            assert column * 16 <= x < column * 16 + 16 and row * 16 <= y < row * 16 + 16
            patch = int(y) // 8 * wp + int(x) // 8
            held = features["characters"][patch]
            assert CHARACTERS.index(character) in held or BLANK not in held


def test_collated_pointers_follow_the_padding():
    _, processor = new_reader(VISION, TEXT, **OPTIONS)
    data = ReadingData(processor, ReadingOptions([Stage(1)]), seed=1, batch_size=4, steps=1)
    samples = [data[i] for i in range(4)]
    batch = ReadingCollator(processor)(samples)
    assert batch["characters"].shape[0] == batch["pixel_values"].shape[0]
    for row, sample in enumerate(samples):
        asked = batch["pointer"][row] >= 0
        assert int(asked.sum()) == int((sample["pointer"] >= 0).sum()) > 0
        targets = batch["pointer"][row][asked]
        assert (batch["input_ids"][row][targets] == processor.image_token_id).all()


@pytest.mark.slow
def test_a_resumed_run_is_the_whole_run(tmp_path):
    """Both stages, both optimizers: weights bit for bit, and a model that loads and reads."""
    whole = train_and_load(recipe_of(tmp_path / "whole"), resume=True)  # nothing to resume yet
    train_reader(recipe_of(tmp_path / "parts", max_steps=2), save=False)
    with pytest.raises(ValueError, match="holds a run"):
        train_reader(recipe_of(tmp_path / "parts"))
    resumed = train_and_load(recipe_of(tmp_path / "parts"), resume=True)
    assert whole.keys() == resumed.keys() and not any("reading_head" in key for key in whole)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def train_and_load(recipe, resume=False):
    from hrvlm import VisionLanguageModel, VLMProcessor

    train_reader(recipe, resume=resume)
    target = f"{recipe['training']['output_dir']}/reader"
    model = VisionLanguageModel.from_pretrained(target)
    processor = VLMProcessor.from_pretrained(target)
    result = score(model, processor, "line", 2)
    assert result.samples == 2 and result.characters > 0
    return model.state_dict()


def test_the_loss_is_the_sum_of_its_parts(tmp_path):
    trainer = make_trainer(recipe_of(tmp_path, max_steps=3, save_strategy="no"))
    trainer.train()
    first, *_, last = (log for log in trainer.state.log_history if "loss" in log)
    assert "text" not in first and first["loss"] == pytest.approx(first["characters"], abs=1e-4)
    parts = [last[name] for name in ("text", "characters", "pointer")]
    assert all(parts) and last["loss"] == pytest.approx(sum(parts), abs=1e-3)


def test_stages_and_optimizer_parts():
    torch.manual_seed(0)
    model, _ = new_reader(VISION, TEXT, **OPTIONS)
    recipe = recipe_of("unused")
    options = reading_options(recipe["reading"])
    assert options.stage_at(1).encoder_only and not options.stage_at(2).encoder_only
    assert options.stage_at(99) is options.stages[-1]
    optimizer = make_optimizer(model, **recipe["optimizer"])
    assert isinstance(optimizer, CombinedOptimizer)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    assert all(p.ndim == 2 for p in optimizer.optimizers[0].param_groups[0]["params"])


def test_combined_optimizer_state_survives(tmp_path):
    def made():
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(4, 6)), torch.nn.Parameter(torch.randn(5))]
        parts = (torch.optim.Muon(weights[:1], lr=0.1), torch.optim.AdamW(weights[1:], lr=0.1))
        return weights, CombinedOptimizer(*parts)

    def step(weights, optimizer):
        for weight in weights:
            weight.grad = weight.detach().cos()
        optimizer.step()
        optimizer.zero_grad()

    weights, optimizer = made()
    for _ in range(2):
        step(weights, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again, resumed = made()
    for mine, theirs in zip(again, weights, strict=True):
        mine.data.copy_(theirs.data)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    for each in ((weights, optimizer), (again, resumed)):
        each[1].param_groups[0]["lr"] = 0.05
        step(*each)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    with pytest.raises(ValueError, match="expected 2"):
        resumed.load_state_dict({"optimizers": []})


def test_a_reader_is_trained_on_one_device(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="2 devices: a reader is trained on one"):
        make_trainer(recipe_of(tmp_path))


def test_head_is_taken_off():
    model, _ = new_reader(VISION, TEXT, **OPTIONS)
    keys = set(model.state_dict())
    model.reading_head = torch.nn.Linear(2, 2)
    assert set(without_head(model).state_dict()) == keys


def test_recipes(tmp_path):
    recipe = read_recipe(RECIPE)
    assert set(recipe) == set(SECTIONS)
    assert len(reading_options(recipe["reading"]).stages) >= 2
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump({**recipe, "optimiser": {}}))
    with pytest.raises(ValueError, match="optimiser"):
        read_recipe(bad)
    stage = {"steps": 1, "draw": {"font": "Roboto"}}
    for wrong, message in (([], "at least one"), ([stage], r"stages\[0\].draw: .*'font'")):
        with pytest.raises(ValueError, match=message):
            reading_options({"stages": wrong})
