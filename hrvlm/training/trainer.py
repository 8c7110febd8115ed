"""transformers' Trainer for a VisionLanguageModel: a learning rate for each part, parts frozen.

    trainer = VLMTrainer(model, args=VLMTrainingArguments("runs/x", learning_rate_vision=1e-5), ...)

The loop, the devices, precision, accumulation and checkpoints are Trainer's and accelerate's. A
subclass adds terms to the loss by overriding ``compute_loss``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints.differences import KeyDifferences
from ..checkpoints.mapping import without_converted_keys
from ..files import all_or_nothing, folder_for_results
from .optimizers import CombinedOptimizer, is_hidden_matrix
from .parts import MODULES, PARTS
from .stream import SampleStream

OPTIMIZERS = ("adamw", "muon")
_STATE_FILE = "trainer_state.json"
_PART_OF = {module: part for part, module in MODULES.items()}


@dataclass
class VLMTrainingArguments(TrainingArguments):
    """TrainingArguments with a learning rate for each part, and with defaults that fit the model.

    Attributes:
        learning_rate_vision: Of the encoder; default: `learning_rate`.
        learning_rate_projector: Of the projector; default: `learning_rate`.
        learning_rate_language: Of the language model; default: `learning_rate`.
        optimizer: "adamw" (whichever ``optim`` names), or "muon": Muon for the matrices inside
            encoder and decoder blocks, ``optim`` for the rest. Muon's updates are scaled to the
            size of AdamW's (``match_rms_adamw``), so that both take the same learning rates.
        freeze: Parts that are not trained, of `PARTS`.

    Raises:
        ValueError: an unknown optimizer or part, all parts are frozen, or batches would be cut.
    """

    learning_rate_vision: float | None = None
    learning_rate_projector: float | None = None
    learning_rate_language: float | None = None
    optimizer: str = "adamw"
    freeze: list[str] = field(default_factory=list)

    # Trainer would drop `pixel_values` of a wrapped model, and hide a NaN behind the mean of the
    # losses before it.
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    # The model itself sees to it that every parameter has a gradient.
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self) -> None:
        """Check what TrainingArguments does not know."""
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r}: expected one of {[*OPTIMIZERS]}")
        if isinstance(self.freeze, str):
            raise ValueError(f"freeze={self.freeze!r}: expected a list of {[*PARTS]}")
        if unknown := sorted(set(self.freeze) - set(PARTS)):
            raise ValueError(f"freeze={self.freeze}: unknown {unknown}, expected of {[*PARTS]}")
        if set(self.freeze) == set(PARTS):
            raise ValueError("freeze: all parts are frozen, nothing is left to train")
        for name in (f"learning_rate_{part}" for part in PARTS):
            rate: Any = getattr(self, name)
            number = isinstance(rate, int | float) and not isinstance(rate, bool)
            if rate is not None and not (number and rate >= 0):
                raise ValueError(f"{name}={rate!r}: expected a number from 0 on")
        super().__post_init__()
        # Left open, one process would cut the batches of an iterable for all: packed images have no
        # batch axis to cut.
        options: Any = self.accelerator_config
        if options.split_batches or options.dispatch_batches:
            raise ValueError("accelerator_config: split_batches and dispatch_batches cut images")
        options.dispatch_batches = False

    @property
    def device(self) -> torch.device:
        """Where this process trains; several on the CPU are not counted.

        To TrainingArguments the second is on ``cpu:1``, where torch.load can't put a checkpoint.
        """
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


class VLMTrainer(Trainer):
    """Trainer for a :class:`~hrvlm.vlm.vision_language_model.VisionLanguageModel`.

    Args:
        model: The model; its parts named in ``args.freeze`` are frozen.
        args: :class:`VLMTrainingArguments`.
        **kwargs: Of Trainer. A `train_dataset` that is a
            :class:`~hrvlm.training.stream.SampleStream` divides itself among the processes.

    Attributes:
        has_learned: Whether a step of any process had an answer to learn; None before the first.

    Raises:
        ValueError: several GPUs in one process, or FSDP where there is none.
    """

    args: VLMTrainingArguments

    def __init__(self, model: Any, args: VLMTrainingArguments, **kwargs: Any):
        freeze_parts(model, args.freeze)
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: packed images can't be cut by DataParallel; "
                "start one process for each with torchrun or accelerate launch"
            )
        super().__init__(model=model, args=args, **kwargs)
        if args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(f"fsdp={args.fsdp!r}: accelerate does not shard on {args.device}")
        self.has_learned: bool | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Parameter groups by part, with weight decay and without; see `parameter_groups`.

        Raises:
            ValueError: Muon with FSDP, or an ``optim`` that groups the parameters by itself.
        """
        if self.optimizer is None:
            if self.args.optimizer == "muon" and self.is_fsdp_enabled:
                raise ValueError(
                    "optimizer='muon': not with FSDP, which shards the matrices that it needs whole"
                )
            model = self.model if model is None else model
            groups = parameter_groups(model, self.args)
            make, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            if wrong := {"params", "model", "optimizer_dict"} & set(options):
                raise ValueError(
                    f"optim={self.args.optim!r} chooses its {wrong.pop()} by itself: it does not "
                    "go with learning rates by part"
                )
            optimizer = make([g for g in groups if not g["muon"]], **options)
            if hidden := [g for g in groups if g["muon"]]:
                muon = torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw")
                optimizer = CombinedOptimizer(muon, optimizer)
            self.optimizer = optimizer
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's, but for a stream, which has its own way to be divided among processes."""
        data = self.train_dataset
        if not isinstance(data, SampleStream):
            return super().get_train_dataloader()
        args = self.args
        data.divide(args.process_index, args.world_size)
        loader = DataLoader(
            data,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return prepare_data_loader(
            loader,
            device=args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise where Trainer only warns: what a checkpoint lacks would stay as it was."""
        missing, unexpected = without_converted_keys(
            load_result.missing_keys, load_result.unexpected_keys
        )
        tied = getattr(self.model, "all_tied_weights_keys", {})
        differences = KeyDifferences(
            tuple(key for key in missing if key not in tied), tuple(unexpected), ()
        )
        if differences:
            raise ValueError(f"the checkpoint does not fit the model:\n{differences}")

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Model, processor and arguments: all of them, or none."""
        if not self.args.should_save:  # later releases call it in every process; one writes
            return super()._save(output_dir, state_dict)
        target = Path(str(self.args.output_dir if output_dir is None else output_dir))
        with all_or_nothing(target) as folder:
            super()._save(str(folder), state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's; a checkpoint that can't be written to its end is removed."""
        output_dir = Path(self._get_output_dir(trial=trial))
        folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with folder_for_results(output_dir):
            try:
                super()._save_checkpoint(model, trial)
            except Exception:
                if self.is_world_process_zero() and not is_whole(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                raise

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Trainer's: the model's own loss, per answer token of the whole step."""
        if torch.is_grad_enabled() and not self.has_learned:
            self.has_learned = num_items_in_batch is None or bool(num_items_in_batch)
        # With a cache, the language model would take packed sequences for one.
        inputs = {**inputs, "use_cache": False}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if torch.is_grad_enabled() and not loss.requires_grad:
            # Nothing that is trained took part: text only, and the language model is frozen.
            loss = loss + sum(0 * p.sum() for p in model.parameters() if p.requires_grad)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the learning rates of the parts, where they differ."""
        if "learning_rate" in logs and self.optimizer is not None:
            groups = self.optimizer.param_groups
            highest = {g["part"]: g["initial_lr"] for g in groups if "part" in g}
            if len(set(highest.values())) > 1:
                now = logs["learning_rate"] / groups[0]["initial_lr"]
                logs |= {f"learning_rate_{part}": rate * now for part, rate in highest.items()}
        super().log(logs, *args, **kwargs)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: Trainer's state comes last."""
    try:
        json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name; "other" for modules added to the model."""
    return next((_PART_OF[word] for word in name.split(".") if word in _PART_OF), "other")


def parameter_groups(model: nn.Module, args: VLMTrainingArguments) -> list[dict[str, Any]]:
    """Parameters to train, by part, with weight decay or without, for Muon or not.

    Vectors (norms, biases, layer scales), learned tokens and position embeddings do not decay.

    Returns:
        ``params``, ``lr``, ``weight_decay``, and for us ``part`` and ``muon``; no group is empty.
    """
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            muon = args.optimizer == "muon" and is_hidden_matrix(name, parameter)
            key = (part_of(name), muon, _decays(name, parameter))
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ValueError("model: no parameter requires a gradient, so there is nothing to train")
    return [
        {
            "params": parameters,
            "lr": _learning_rate(args, part),
            "weight_decay": args.weight_decay if decay else 0.0,
            "part": part,
            "muon": muon,
        }
        for (part, muon, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def freeze_parts(model: Any, parts: Iterable[str]) -> None:
    """Stop the training of parts: no gradients, and eval mode whenever they run.

    DINOv3Encoder has its own ``freeze``, which keeps no graph.
    """
    for part, name in MODULES.items():
        if part not in parts:
            continue
        module = getattr(model, name)
        if hasattr(module, "freeze"):
            module.freeze()
        else:
            module.requires_grad_(False)
            module.register_forward_pre_hook(_to_eval)


def _to_eval(module: nn.Module, args: Any) -> None:
    if module.training:
        module.eval()


def _learning_rate(args: VLMTrainingArguments, part: str) -> float:
    rate = getattr(args, f"learning_rate_{part}", None)
    return float(args.learning_rate if rate is None else rate)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    learned_token = name.endswith(("_token", "_tokens")) or "position_embedding" in name
    return parameter.ndim >= 2 and not learned_token
