"""Adapters from the command: trained, resumed, in 4 bits, merged."""

import json
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from hrvlm import VisionLanguageModel
from hrvlm.cli import app
from hrvlm.training import run as train_module
from hrvlm.training.adapters import lora_options, merge
from hrvlm.training.config import TrainingConfig
from tests.tiny import config_of, picture, processor_of, text_config_of, vision_config_of
from tests.training import runs

pytestmark = pytest.mark.usefixtures("one_thread")

peft = pytest.importorskip("peft")

LORA = {
    "targets": {"vision": ["qkv"], "projector": "whole", "language": "all"},
    "rank": {"vision": 2, "language": 4},
    "alpha": 8,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Rows of 64, the smallest block of bitsandbytes' 4 bits on a CPU."""
    vision = vision_config_of(hidden_size=64, intermediate_size=128)
    config = config_of(vision, text_config_of(hidden_size=64, intermediate_size=128))
    return runs.save_model(tmp_path_factory.mktemp("base"), config)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return {"kind": "jsonl", "path": str(runs.save_rows(tmp_path_factory.mktemp("rows")))}


def with_lora(config, lora):
    return TrainingConfig.from_dict(dict(config.sections) | {"lora": lora})


def logits_of(model):
    inputs = processor_of()(images=[picture(60, 40)], text="<|image|>say")
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("dora", [False, True])
def test_a_killed_run_goes_on_and_its_adapters_are_merged(dora, base, rows, tmp_path):
    lora = LORA | {"dora": dora}
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    options = {"max_steps": 5, "gradient_checkpointing": True, "learning_rate_vision": 1e-2}
    config = with_lora(runs.config_of(tmp_path / "whole", base, rows, **options), lora)
    whole = train_module.train(config)
    cut = with_lora(runs.config_of(tmp_path / "cut", base, rows, **options), lora)
    assert runs.train_until_killed(cut, 3) == -signal.SIGKILL
    resumed = train_module.train(cut, resume=True)
    weights = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    again = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    log = json.loads((tmp_path / "cut" / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    assert resumed.metrics["train_loss"] == pytest.approx(sum(losses[s] for s in (3, 4, 5)) / 3)
    assert whole.metrics["train_loss"] == pytest.approx(sum(losses.values()) / 5)

    assert not list((tmp_path / "whole").glob("model*.safetensors"))
    parts = {"vision_encoder", "MP", "decoder"}
    assert {part for part in parts if any(part in name for name in weights)} == parts
    ranks = {name: w.shape[0] for name, w in weights.items() if "lora_A" in name}
    assert {r for n, r in ranks.items() if "qkv" in n} == {2}
    assert {r for n, r in ranks.items() if "decoder" in n} == {4}
    assert any("magnitude" in name for name in weights) == dora
    assert before == {path.name: path.read_bytes() for path in base.iterdir()}

    # Merging is to add what the adapters add.
    plain = VisionLanguageModel.from_pretrained(base)
    untouched = logits_of(plain)
    adapted = logits_of(peft.PeftModel.from_pretrained(plain, tmp_path / "whole"))
    words = ["merge", str(tmp_path / "whole"), str(tmp_path / "merged"), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["base"] == str(base)
    merged = logits_of(VisionLanguageModel.from_pretrained(tmp_path / "merged"))
    assert (merged - untouched).abs().max() > 1e-2
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)
    row = ["generate", "--image", str(rows_folder(rows) / "1_0.png"), "--prompt", "q", "--json"]
    asked = CliRunner().invoke(app, [*row, "--model", str(tmp_path / "merged")])
    assert asked.exit_code == 0, asked.output
    refused = CliRunner().invoke(app, [*row, "--model", str(tmp_path / "whole")])
    assert refused.exit_code == 2 and "hrvlm merge" in refused.stderr


def rows_folder(rows):
    return train_module.Path(rows["path"]).parent


def test_a_base_in_4_bits(base, rows, tmp_path):
    pytest.importorskip("bitsandbytes")
    lora = {"targets": {"vision": "all", "language": ["q_proj", "v_proj"]}, "four_bit": True}
    options = {"learning_rate": 5e-3, "max_steps": 6, "gradient_checkpointing": True}
    config = with_lora(runs.config_of(tmp_path / "run", base, rows, **options), lora)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(dict(config.sections)))
    done = CliRunner().invoke(app, ["train", str(path), "--json"])
    assert done.exit_code == 0, done.output
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)
    assert all(w.abs().max() > 0 for name, w in weights.items() if "lora_B" in name)
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]
    result = merge(tmp_path / "run", tmp_path / "merged")
    assert result.layers == len(weights) // 2
    merged = VisionLanguageModel.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32 and not getattr(merged, "is_quantized", False)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rnak": 4}, r"lora\.rnak.*rank"),
        ({"rank": 0}, r"lora\.rank of vision=0: expected a whole number of at least 1"),
        ({"rank": {"vision": 1.5}}, r"lora\.rank of vision=1\.5"),
        ({"alpha": -1}, r"lora\.alpha of vision=-1: expected a positive number"),
        ({"alpha": float("inf")}, r"lora\.alpha of vision=inf"),
        ({"alpha": True}, r"lora\.alpha of vision=True"),
        ({"dropout": 1}, r"lora\.dropout=1"),
        ({"dora": "yes"}, r"lora\.dora='yes': expected True or False"),
        ({"targets": {}}, r"lora\.targets: expected some of"),
        ({"targets": {"decoder": "all"}}, r"lora\.targets\.decoder"),
        ({"targets": {"vision": "whole"}}, r"lora\.targets\.vision='whole': expected 'all' or"),
        ({"targets": {"vision": []}}, r"lora\.targets\.vision=\[\]"),
    ],
)
def test_what_is_wrong_is_said(lora, message):
    with pytest.raises(ValueError, match=message):
        lora_options(lora)


def test_what_does_not_go_with_adapters_is_said(base, rows, tmp_path):
    made = runs.config_of(tmp_path / "run", base, rows, freeze=["vision"])
    with pytest.raises(ValueError, match=r"training\.freeze: with lora"):
        with_lora(made, {})
    made = runs.config_of(tmp_path / "run", base, rows, optimizer="muon")
    with pytest.raises(ValueError, match="lora needs adamw"):
        with_lora(made, {})
    parts = {"vision": "a", "language": "b", "tokenizer": "c"}
    sections = dict(runs.config_of(tmp_path, base, rows).sections) | {"model": parts, "lora": {}}
    with pytest.raises(ValueError, match=r"lora needs model\.path"):
        TrainingConfig.from_dict(sections)
    targets = {"targets": {"language": ["q_poj"]}}
    config = with_lora(runs.config_of(tmp_path / "run", base, rows), targets)
    with pytest.raises(ValueError, match=r"targets\.language: no linear layer 'q_poj'.*'q_proj'"):
        train_module.train(config)
    with pytest.raises(ValueError, match="no adapters in it"):
        merge(base, tmp_path / "merged")


def test_merge_names_a_base_that_is_not_there(base, rows, tmp_path):
    config = with_lora(
        runs.config_of(tmp_path / "run", base, rows, max_steps=1), {"targets": {"language": "all"}}
    )
    train_module.train(config)
    stored = tmp_path / "run" / "adapter_config.json"
    stored.write_text(stored.read_text().replace(str(base), str(base / "gone")))
    with pytest.raises(ValueError, match=r"gone.*--base"):
        merge(tmp_path / "run", tmp_path / "merged")
    assert merge(tmp_path / "run", tmp_path / "merged", str(base)).layers == 2 * 7
    with pytest.raises(ValueError, match="holds a model"):
        merge(tmp_path / "run", tmp_path / "merged", str(base))
