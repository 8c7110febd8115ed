"""Tiny runs of `hrvlm train` for the tests: a model, data, a configuration."""

import json
import os
import signal
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from hrvlm.training import run as train_module
from hrvlm.training.config import TrainingConfig
from tests.tiny import model_of, picture, processor_of


def save_model(directory: Path, config=None) -> Path:
    model_of(config).save_pretrained(directory)
    processor_of().save_pretrained(directory)
    return directory


def save_rows(directory: Path, count: int = 12) -> Path:
    """Rows with none, one or two images, and one or two turns."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        images = [f"{i}_{k}.png" for k in range(i % 3)]
        for k, name in enumerate(images):
            picture(16 + 16 * (i % 2), 16 * (1 + k), seed=2 * i + k).save(directory / name)
        texts = [{"user": f"q{t}", "assistant": f"{i} is {'x' * i}"} for t in range(1 + i % 2)]
        lines.append(json.dumps({"images": images, "texts": texts}))
    path = directory / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def config_of(directory: Path, model: Path, train, **training) -> TrainingConfig:
    """A run on the CPU; `train` is a source, or the section `data`."""
    options = {
        "output_dir": str(directory),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    data = train if "train" in train else {"train": train}
    return TrainingConfig.from_dict(
        {"model": {"path": str(model)}, "data": data, "training": options | training}
    )


class KillAt(TrainerCallback):
    """Kills its process after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def start_method() -> str:
    """How to start a process that trains: a fork, where a fork of this process can.

    It is a second's work, spawning ten. In a process whose autograd has started threads (which
    tests before do that under torch 2.14) it can't.
    """
    child = os.fork()
    if child == 0:
        try:
            torch.ones(1, requires_grad=True).sum().backward()
        except RuntimeError:
            os._exit(1)
        os._exit(0)
    return "fork" if os.waitpid(child, 0)[1] == 0 else "spawn"


def _train_and_die(config: TrainingConfig, step: int) -> None:
    make = train_module.make_trainer

    def make_and_kill(*args):
        trainer = make(*args)
        trainer.add_callback(KillAt(step))
        return trainer

    torch.set_num_threads(1)
    train_module.make_trainer = make_and_kill
    train_module.train(config)


def train_until_killed(config: TrainingConfig, step: int) -> int:
    """Train in a process that is killed after a step; returns its exit code."""
    context = torch.multiprocessing.get_context(start_method())
    process = context.Process(target=_train_and_die, args=(config, step))
    process.start()
    process.join()
    return process.exitcode


def save_halves(directory: Path) -> Path:
    """8 rows of which the first and second, fifth and sixth have images, the others only text.

    In order, with 2 rows a batch, one of two processes gets only images, the other only text.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(8):
        images = [f"{i}.png"] if i % 4 < 2 else []
        for name in images:
            picture(16 + 16 * (i % 2), 48, seed=i).save(directory / name)
        texts = [{"user": "?", "assistant": f"{i} is {'x' * i}"}]
        lines.append(json.dumps({"images": images, "texts": texts}))
    path = directory / "halves.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def train_as(process: int, processes: int, port: int, config: TrainingConfig, resume: bool) -> None:
    """Be one of several processes that train together on the CPU."""
    os.environ |= {
        "RANK": str(process),
        "LOCAL_RANK": str(process),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # the forked parent's
    if config.training.get("fsdp"):
        train_module.training_arguments = _of_accelerator(train_module.training_arguments)
    train_module.train(config, resume=resume)
    torch.distributed.destroy_process_group()


def _of_accelerator(make):
    """accelerate knows FSDP on accelerators only: these processes pass for such."""

    def made(config):
        args = make(config)
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
        return args

    return made
