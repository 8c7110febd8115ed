import json
import math
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import DINOv3ViTModel, LlamaForCausalLM, TrainerCallback
from typer.testing import CliRunner

from hrvlm.cli import app
from hrvlm.training import run as train_module
from hrvlm.training.collators import VQACollator
from hrvlm.training.config import TrainingConfig, read_yaml
from hrvlm.training.run import last_checkpoint, make_trainer, train, training_arguments
from hrvlm.training.samples import SampleMaker
from hrvlm.training.trainer import VLMTrainer, VLMTrainingArguments, freeze_parts, parameter_groups
from hrvlm.vlm.config import VLMConfig
from tests.tiny import (
    BYTES,
    SPECIAL,
    config_of,
    model_of,
    picture,
    processor_of,
    siglip_config_of,
    text_config_of,
    tokenizer_of,
    vision_config_of,
)
from tests.training import runs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return runs.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """Draws random numbers in every forward of encoder and language model."""
    config = config_of(vision_config_of(drop_path_rate=0.3), text_config_of(attention_dropout=0.3))
    return runs.save_model(tmp_path_factory.mktemp("random"), config)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return {"kind": "jsonl", "path": str(runs.save_rows(tmp_path_factory.mktemp("rows")))}


def losses(directory):
    state = json.loads((directory / "trainer_state.json").read_text())
    return {log["step"]: log["loss"] for log in state["log_history"] if "loss" in log}


def same_weights(a, b):
    a, b = (load_file(directory / "model.safetensors") for directory in (a, b))
    return sorted(a) == sorted(b) and all(torch.equal(a[name], b[name]) for name in a)


RESUMED = {
    "epochs": ({}, {"gradient_accumulation_steps": 2, "bf16": True}),
    "muon": ({}, {"optimizer": "muon", "learning_rate_vision": 1e-4}),
    "stream": ({"kind": "synthetic", "max_characters": 4, "font_sizes": [14, 14]}, {}),
    "packing": ({"sequence_packing": 128}, {"dataloader_num_workers": 1, "freeze": ["vision"]}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_goes_on_as_if_it_had_not_been(name, random_model, rows, tmp_path):
    model = random_model
    data, options = RESUMED[name]
    if name == "stream":
        source = data
    elif name == "packing":
        source = {"train": rows} | data
    else:
        source = rows
    options |= {"max_steps": 5, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(runs.config_of(whole, model, source, **options))
    config = runs.config_of(cut, model, source, **options)
    assert runs.train_until_killed(config, 3) == -signal.SIGKILL
    assert last_checkpoint(cut).name == "checkpoint-2"
    with pytest.raises(ValueError, match=r"holds a run \(checkpoint-2\): --resume goes on"):
        train(config)
    result = train(config, resume=True)
    assert result.steps == 5
    assert losses(cut) == losses(whole)
    assert same_weights(cut, whole)
    assert not same_weights(cut, model)


def test_a_checkpoint_that_a_kill_cut_off_is_passed_over(tmp_path):
    for step, state in ((2, "{}"), (10, "{}"), (12, None), (14, '{"epoch":')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    assert last_checkpoint(tmp_path / "none") is None


def test_each_part_has_its_rate_and_only_matrices_decay():
    args = VLMTrainingArguments(
        "none",
        learning_rate=1.0,
        learning_rate_vision=0.1,
        learning_rate_projector=0.2,
        weight_decay=0.3,
        optimizer="muon",
        report_to="none",
        use_cpu=True,
    )
    model = model_of()
    model.extra = torch.nn.Linear(2, 2)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, args):
        for parameter in group["params"]:
            found[names[id(parameter)]] = (group["lr"], group["weight_decay"], group["muon"])
    assert len(found) == len(names) - 1  # the mask token is not trained
    assert found["vision_encoder.layer.0.attention.qkv.weight"] == (0.1, 0.3, True)
    assert found["vision_encoder.layer.0.attention.qkv_bias.q_bias"] == (0.1, 0.0, False)
    assert found["vision_encoder.layer.1.layer_scale1.lambda1"] == (0.1, 0.0, False)
    assert found["vision_encoder.embeddings.register_tokens"] == (0.1, 0.0, False)
    assert found["vision_encoder.embeddings.patch_embeddings.weight"] == (0.1, 0.3, False)
    assert found["MP.proj.weight"] == (0.2, 0.3, False)
    assert found["decoder.model.layers.0.mlp.up_proj.weight"] == (1.0, 0.3, True)
    assert found["decoder.model.embed_tokens.weight"] == (1.0, 0.3, False)
    assert found["decoder.model.norm.weight"] == (1.0, 0.0, False)
    assert found["extra.weight"] == (1.0, 0.3, False)


def test_rates_move_each_part_by_its_own_size(model, rows, tmp_path):
    """SGD: what a step changes is the rate times the gradient, and all have the same schedule."""
    before = load_file(model / "model.safetensors")
    moved = {}
    for rate in (1e-3, 2e-3):
        directory = tmp_path / str(rate)
        options = {"optim": "sgd", "max_steps": 1, "weight_decay": 0.0, "max_grad_norm": 0}
        rates = {"learning_rate_vision": rate, "learning_rate_projector": 0.0}
        train(runs.config_of(directory, model, rows, **options, **rates))
        after = load_file(directory / "model.safetensors")
        moved[rate] = {name: (after[name] - before[name]).norm() for name in before}
    assert moved[1e-3]["MP.proj.weight"] == 0
    for name, norm in moved[2e-3].items():
        expected = 2 if name.startswith("vision_encoder") else 1
        assert norm == pytest.approx(float(expected * moved[1e-3][name]), rel=1e-2, abs=1e-7), name


@pytest.mark.parametrize("parts", [["vision"], ["vision", "language"], ["projector"]])
def test_frozen_parts_do_not_move(parts, model, rows, tmp_path):
    train(runs.config_of(tmp_path, model, rows, freeze=parts, max_steps=1))
    before, after = (load_file(d / "model.safetensors") for d in (model, tmp_path))
    names = {"vision": "vision_encoder.", "projector": "MP.", "language": "decoder."}
    frozen = tuple(names[part] for part in parts)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(name.startswith(frozen) for name in moved)
    for part, prefix in names.items():
        assert part in parts or any(name.startswith(prefix) for name in moved)


@pytest.mark.parametrize("vision", ["dinov3", "siglip"])
def test_frozen_parts_keep_no_graph_and_draw_nothing(vision):
    config = config_of(siglip_config_of(attention_dropout=0.5)) if vision == "siglip" else None
    model = model_of(config)
    model.decoder.config.attention_dropout = 0.5
    freeze_parts(model, ["vision", "language"])
    model.train()
    grids = [(4, 4)]
    features = [
        model.get_image_features(torch.ones(16, 3 * 64), grids).last_hidden_state for _ in "ab"
    ]
    assert features[0].grad_fn is None and torch.equal(*features)
    ids = torch.arange(5, 15)[None]
    assert torch.equal(*(model(input_ids=ids).logits for _ in "ab"))
    assert model.MP.training and not model.decoder.training


def test_a_subclass_adds_a_term_to_the_loss(model, rows, tmp_path):
    class Heavier(VLMTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
            return loss + 0.5 * model.MP.proj.weight.square().sum()

    seen = []
    for trainer_class in (VLMTrainer, Heavier):
        config = runs.config_of(tmp_path, model, rows, max_steps=1, save_strategy="no")
        args = training_arguments(config)
        loaded, processor = train_module.load_model(config.model)
        plain = make_trainer(config, args, loaded, processor)
        trainer = trainer_class(
            loaded, args, train_dataset=plain.train_dataset, data_collator=plain.data_collator
        )
        extra = 0.5 * float(loaded.MP.proj.weight.detach().square().sum())
        trainer.train()
        seen.append(trainer.state.log_history[0]["loss"])
    assert seen[1] == pytest.approx(seen[0] + extra, rel=1e-4)


# AdamW with so large an epsilon steps along the gradient, without making its last bits larger.
ALONG = {"adam_epsilon": 1.0, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def one_process(model, tmp_path_factory):
    """A run with the whole batch, and its rows."""
    folder = tmp_path_factory.mktemp("one_process")
    source = {"kind": "jsonl", "path": str(runs.save_halves(folder)), "shuffle": False}
    options = ALONG | {"per_device_train_batch_size": 4}
    train(runs.config_of(folder / "one", model, source, **options))
    return folder / "one", source


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_of_which_one_has_text_only(
    sharded, checkpointing, model, one_process, tmp_path
):
    """DDP and FSDP2, resumed half way, give the weights of one process with the whole batch."""
    (one, source), two = one_process, tmp_path / "two"
    several = ALONG | {"gradient_checkpointing": checkpointing}
    if sharded:
        several |= {"fsdp": True, "fsdp_config": {"version": 2}}
    for max_steps, resume in ((2, False), (4, True)):
        config = runs.config_of(two, model, source, **several, max_steps=max_steps)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.start_processes(
            runs.train_as, (2, port, config, resume), nprocs=2, start_method=runs.start_method()
        )
    assert (two / "checkpoint-2" / "pytorch_model_fsdp.bin").exists() == sharded
    before, expected, got = (load_file(d / "model.safetensors") for d in (model, one, two))
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-6, atol=1e-7)
    assert not torch.equal(expected["MP.proj.weight"], before["MP.proj.weight"])
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


class KeepGradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        own = {n: p.grad.float().clone() for n, p in model.named_parameters() if p.requires_grad}
        self.steps.append(own)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bf16_at_768_is_stable_and_checkpointing_changes_no_gradient(device, tmp_path, capsys):
    vision, text = vision_config_of(patch_size=16), text_config_of(max_position_embeddings=4096)
    config = config_of(vision, text, mp_pixel_shuffle_factor=4, max_img_size=768)
    model_of(config).save_pretrained(tmp_path / "model")
    processor_of(config=config).save_pretrained(tmp_path / "model")
    lines = []
    for i, (width, height) in enumerate([(768, 512), (400, 768), (768, 96), (64, 64)]):
        picture(width, height, seed=i).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": "?", "answer": str(i)}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source = {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}
    kept, saved = {}, {}

    def count(tensor):
        saved[checkpointing] += tensor.nbytes
        return tensor

    for checkpointing in (False, True):
        run = runs.config_of(
            tmp_path / str(checkpointing),
            tmp_path / "model",
            source,
            bf16=True,
            gradient_checkpointing=checkpointing,
            use_cpu=device == "cpu",
            save_strategy="no",
        )
        args = training_arguments(run)
        trainer = make_trainer(run, args, *train_module.load_model(run.model))
        kept[checkpointing] = KeepGradients()
        trainer.add_callback(kept[checkpointing])
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        saved[checkpointing] = 0
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            trainer.train()
        held = f"{saved[checkpointing] / 2**20:.0f} MiB kept for the backwards of 4 steps"
        if device == "cuda":
            held += f", {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB at the peak"
        with capsys.disabled():
            print(f"\n{device}, checkpointing {checkpointing}: {held}")
        assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    assert saved[True] < 0.6 * saved[False]
    plain, again = kept[False].steps, kept[True].steps
    assert len(plain) == len(again) == 4
    for step, gradients in enumerate(plain):
        for name, gradient in gradients.items():
            assert gradient.isfinite().all(), (step, name)
            off = (again[step][name] - gradient).norm()
            # Nothing but the order of sums on a GPU may differ.
            assert off <= (0.02 if device == "cuda" else 0.0) * gradient.norm(), (step, name)


def test_the_recipe_trains_once_its_paths_are_given(model, rows, tmp_path):
    recipe = Path(__file__).parents[2] / "recipes" / "finetune.yaml"
    changes = [
        f"model.path={model}",
        f"data.train.0.path={rows['path']}",
        f"data.eval.0.path={rows['path']}",
        "data.max_sample_length=400",
        f"training.output_dir={tmp_path}",
        "training.max_steps=2",
        "training.eval_steps=1",
        "training.dataloader_num_workers=0",
    ]
    result = train(TrainingConfig.from_yaml(recipe, changes))
    assert result.steps == 2 and math.isfinite(result.metrics["eval_loss"])
    logs = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in logs if "eval_loss" in log] == [1, 2, 2]


def test_a_model_is_made_of_parts_or_of_sizes(tmp_path):
    LlamaForCausalLM(text_config_of()).save_pretrained(tmp_path / "language")
    DINOv3ViTModel(vision_config_of()).save_pretrained(tmp_path / "vision")
    tokenizer_of(None).save_pretrained(tmp_path / "tokenizer")
    parts = {name: str(tmp_path / name) for name in ("vision", "language", "tokenizer")}
    sizes = {"vit_hidden_dim": 32, "vit_n_heads": 2, "vit_n_blocks": 1, "vit_patch_size": 8}
    sizes |= {"lm_hidden_dim": 48, "lm_n_heads": 4, "lm_n_kv_heads": 2, "lm_n_blocks": 1}
    options = {"max_img_size": 64, "mp_pixel_shuffle_factor": 2}
    for section in (parts | options, sizes | options | {"lm_tokenizer": parts["tokenizer"]}):
        sections = {"model": section, "data": {"train": {"kind": "synthetic"}}}
        config = TrainingConfig.from_dict(sections | {"training": {"output_dir": str(tmp_path)}})
        made, processor = train_module.load_model(config.model)
        assert made.dtype == torch.float32 and made.config.max_img_size == 64
        assert made.config.image_token_id == processor.image_token_id == BYTES + len(SPECIAL)
        assert len(made.get_input_embeddings().weight) > processor.image_token_id
        row = {"image": picture(32, 16), "question": "?", "answer": "yes"}
        sample = SampleMaker(processor)(row, "row 0")
        batch = VQACollator(processor)([sample])
        assert made(**batch).loss.isfinite()


def test_the_command_trains_evaluates_and_reports(model, rows, tmp_path):
    source = read_jsonl(rows["path"])
    source[1]["images"] = ["none.png"]
    source[2]["texts"][0]["assistant"] = "x" * 200
    broken = tmp_path / "broken.jsonl"
    broken.write_text("".join(json.dumps(row) + "\n" for row in source))
    sections = {
        "model": {"path": str(model)},
        "data": {
            "train": {"kind": "jsonl", "path": str(broken), "image_root": str(rows_folder(rows))},
            "eval": {"kind": "jsonl", "path": rows["path"], "limit": 3},
            "max_sample_length": 150,
        },
        "training": {
            "output_dir": str(tmp_path / "run"),
            "num_train_epochs": 1,
            "use_cpu": True,
            "report_to": ["tensorboard"],
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    override = ["-o", "training.per_device_train_batch_size=4", "-o", "training.save_strategy=no"]
    override += ["-o", "training.learning_rate=1e-4"]
    done = CliRunner().invoke(app, ["train", str(path), *override, "--json"])
    assert done.exit_code == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["steps"] == 3 and math.isfinite(shown["metrics"]["eval_loss"])
    assert shown["skipped"] == {"bad image": 1, "too long": 1}
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert {row["row"] for row in report["rows"]} == {f"{broken}, row {i}" for i in (1, 2)}
    kept = yaml.safe_load((tmp_path / "run" / "train.yaml").read_text())
    assert kept["training"]["per_device_train_batch_size"] == 4
    assert list((tmp_path / "run").glob("**/events.out.tfevents*"))
    loaded, processor = train_module.load_model(
        TrainingConfig.from_dict(sections | {"model": {"path": str(tmp_path / "run")}}).model
    )
    assert processor.image_token_id == loaded.config.image_token_id


def rows_folder(rows):
    return Path(rows["path"]).parent


def test_a_batch_of_which_nothing_is_left_changes_nothing(model, tmp_path):
    turns = [{"user": "?", "assistant": "yes"}]
    path = tmp_path / "rows.jsonl"
    lines = [{"images": ["none.png"], "texts": turns}] * 2 + [{"images": [], "texts": turns}] * 2
    path.write_text("\n".join(map(json.dumps, lines)))
    options = {"max_steps": 2, "weight_decay": 0.0}
    source = {"kind": "jsonl", "path": str(path), "shuffle": False}
    train(runs.config_of(tmp_path / "run", model, source, **options, save_steps=1))
    seen = losses(tmp_path / "run")
    assert seen[1] == 0 and 0 < seen[2] < math.inf
    before, after = (
        load_file(d / "model.safetensors") for d in (model, tmp_path / "run" / "checkpoint-1")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_text_alone_has_nothing_to_teach_the_projector(model, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "?", "answer": "yes"}))
    source = {"kind": "jsonl", "path": str(path)}
    frozen = {"freeze": ["vision", "language"], "weight_decay": 0.0, "max_steps": 1}
    train(runs.config_of(tmp_path / "run", model, source, **frozen))
    assert losses(tmp_path / "run")[1] > 0
    assert same_weights(tmp_path / "run", model)


def test_batches_are_never_cut(tmp_path):
    for name in ("split_batches", "dispatch_batches"):
        with pytest.raises(ValueError, match="split_batches and dispatch_batches cut images"):
            VLMTrainingArguments(str(tmp_path), accelerator_config={name: True}, use_cpu=True)
    args = VLMTrainingArguments(str(tmp_path), accelerator_config={}, use_cpu=True)
    assert args.accelerator_config.dispatch_batches is False


def test_flash_attention_takes_one_packed_row_at_a_time(model, rows, tmp_path):
    data = {"train": rows, "sequence_packing": 64}
    config = runs.config_of(tmp_path, model, data, per_device_train_batch_size=2)
    loaded, processor = train_module.load_model(config.model)
    loaded.decoder.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"set training.per_device_train_batch_size=1"):
        make_trainer(config, training_arguments(config), loaded, processor)


def test_the_section_model_lets_the_encoder_run_in_float16(model, rows, tmp_path):
    config = runs.config_of(tmp_path, model, rows, max_steps=1)
    allowed = replace(config, model=replace(config.model, allow_fp16=True))
    batch = {"pixel_values": torch.zeros(4, 192), "image_grid_hw": [(2, 2)]}
    with torch.autocast("cpu", torch.float16):
        train_module.load_model(allowed.model)[0].get_image_features(**batch)
        with pytest.raises(ValueError, match="allow_fp16=True"):
            train_module.load_model(config.model)[0].get_image_features(**batch)
    train(allowed)
    assert VLMConfig.from_pretrained(tmp_path).allow_fp16  # kept with the model


def read_jsonl(path):
    with open(path) as lines:
        return [json.loads(line) for line in lines]


WRONG = {
    "data.train.path=3": r"data.train\[0\].path=3: expected a path",
    "data.train.kind=csv": r"data.train\[0\].kind='csv': expected one of \['finevision', 'jsonl'",
    "data.train.limits=3": r"unknown name data.train\[0\].limits: did you mean 'limit'\?",
    "data.trian=3": r"unknown name data.trian: did you mean 'train'\?",
    "trainning=3": r"unknown name trainning: did you mean 'training'\?",
    "training.learning_rate_vison=3": r"vison: did you mean 'learning_rate_vision'\?",
    "training.optimizer=sgd": r"optimizer='sgd': expected one of \['adamw', 'muon'\]",
    "training.freeze=[eyes]": r"freeze=\['eyes'\]: unknown \['eyes'\]",
    "training.eval_strategy=steps": r"training.eval_strategy='steps' needs data.eval",
    "model.vision=x": r"model.path: the model is all there; leave out \['vision'\]",
    "data.sequence_packing=9999": r"data.sequence_packing=9999: the language model's context holds",
    "data.max_sample_length=-1": r"data.max_sample_length=-1: expected a whole number",
    "data.sequence_packing=99": r"training.max_steps is needed",
    "data.train={kind: finevision, path: setup.py}": r"setup.py: a file; of files",
    "training.freeze=vision": r"freeze='vision': expected a list",
    "training.max_steps=ten": r"training.max_steps='ten': expected a number",
    "training.output_dir=": r"training.output_dir is missing",
    "training.seed=[1": r"'training.seed=\[1': no YAML",
    "training.max_steps": r"'training.max_steps': expected name=value",
}


@pytest.mark.parametrize("override", WRONG)
def test_what_is_wrong_is_said(override, model, rows, tmp_path):
    path = tmp_path / "config.yaml"
    training = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": "none"}
    sections = {"model": {"path": str(model)}, "data": {"train": rows}, "training": training}
    path.write_text(yaml.safe_dump(sections))
    done = CliRunner().invoke(app, ["train", str(path), "-o", override])
    assert done.exit_code == 2
    with pytest.raises(ValueError, match=WRONG[override]):
        train(TrainingConfig.from_dict(read_yaml(path, [override])))


def test_data_of_which_nothing_can_be_used_is_an_error(model, rows, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("".join(json.dumps({"texts": n}) + "\n" for n in range(6)))
    config = TrainingConfig.from_dict(
        {
            "model": {"path": str(model)},
            "data": {"train": {"kind": "jsonl", "path": str(broken)}},
            "training": {"output_dir": str(tmp_path / "run"), "max_steps": 2, "use_cpu": True},
        }
    )
    with pytest.raises(ValueError, match=r"no row could be used \{'bad row': 6\}.*data_report"):
        train(config)
    assert not (tmp_path / "run" / "config.json").exists()
