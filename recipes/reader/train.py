"""From a recipe (YAML) to a trained reader, on one device.

    python -m recipes.reader.train                  (by recipe.yaml, which trained the one of hrvlm;
    python -m recipes.reader.train --resume          after a kill: from the last checkpoint)
    python -m recipes.reader.train other.yaml -o training.max_steps=100 -o seed=1

The model for use is in ``<training.output_dir>/reader``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from hrvlm import VisionLanguageModel, VLMProcessor
from hrvlm.drawn_text.drawing import RenderOptions
from hrvlm.reader.model import new_reader, reader_path
from hrvlm.reader.score import score
from hrvlm.training.config import read_yaml
from hrvlm.training.optimizers import CombinedOptimizer, is_hidden_matrix
from hrvlm.training.run import checkpoint_to_resume
from hrvlm.training.trainer import VLMTrainer, VLMTrainingArguments
from recipes.reader.losses import (
    ReadingCollator,
    ReadingData,
    ReadingOptions,
    Stage,
    characters_loss,
    listening,
    new_head,
    pointer_loss,
)

RECIPE = Path(__file__).with_name("recipe.yaml")
SECTIONS = ("seed", "model", "reading", "optimizer", "training")


class ReadingTrainer(VLMTrainer):
    """A VLMTrainer with the losses of losses.py, which evaluates by reading.

    The model gets a ``reading_head`` for the time of training; :func:`without_head` takes it off.

    Args:
        model: The model.
        args: Of the run.
        reading: The losses and their schedule.
        processor: The model's.
        optimizer: Rates and weight decay, as :func:`make_optimizer` takes them.
        samples: Held-out samples of an evaluation.
        **kwargs: Of Trainer.
    """

    def __init__(
        self,
        model: Any,
        args: VLMTrainingArguments,
        reading: ReadingOptions,
        *,
        processor: Any,
        optimizer: Mapping[str, float],
        samples: int = 64,
        **kwargs: Any,
    ):
        self.reading, self.processor, self.samples = reading, processor, samples
        self._sums: dict[str, float] = {}
        self._count = 0
        if not hasattr(model, "reading_head"):
            model.reading_head = new_head(model, reading.slots)
        super().__init__(model, args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the losses are means of each batch
        self.optimizer = _made("optimizer", make_optimizer, {"model": model, **optimizer})

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The sum at the top of losses.py; only `characters` in the encoder's own stages."""
        inputs = dict(inputs)
        characters, pointer = inputs.pop("characters"), inputs.pop("pointer")
        if self.reading.stage_at(self.state.global_step).encoder_only:
            output = model.vision_encoder(inputs["pixel_values"], grids=inputs["image_grid_hw"])
            return self._by_characters(model, output.packed_patches, characters)
        layer = model.decoder.model.layers[self.reading.pointer_layer]
        with listening(model.vision_encoder, layer.self_attn) as heard:
            text, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        by_characters = self._by_characters(model, heard["encoder"].packed_patches, characters)
        is_image = inputs["input_ids"] == model.config.image_token_id
        by_pointer = pointer_loss(layer.self_attn, heard["attention"], pointer, is_image)
        self._record(text=text, pointer=by_pointer)
        loss = (
            text
            + self.reading.characters_weight * by_characters
            + self.reading.pointer_weight * by_pointer
        )
        return (loss, outputs) if return_outputs else loss

    def _by_characters(self, model: Any, patches: Tensor, targets: Tensor) -> Tensor:
        weight = self.reading.blank_weight
        loss, right = characters_loss(model.reading_head, patches, targets, weight)
        self._record(characters_right=right, characters=loss)
        return loss

    def _record(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())
            self._count += name == "characters"

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the parts of the loss since the last log."""
        if self._count and "loss" in logs:
            logs = logs | {k: round(v / self._count, 4) for k, v in self._sums.items()}
            self._sums, self._count = {}, 0
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """``eval_cer_line`` on held-out single lines; nothing while the encoder is alone."""
        if self.reading.stage_at(self.state.global_step - 1).encoder_only:
            return {}
        result = score(self.model, self.processor, "line", self.samples)
        metrics = {"eval_cer_line": round(result.error_rate, 4)}
        self.log(metrics)
        return metrics


def read_recipe(path: str | PathLike[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The sections of a recipe.

    Args:
        path: The file.
        overrides: Changes as ``training.max_steps=10``; the value is YAML.

    Raises:
        ValueError: the file is not a mapping, or a section is unknown or missing.
    """
    recipe = read_yaml(path, overrides)
    if wrong := sorted(set(recipe) ^ set(SECTIONS)):
        raise ValueError(f"{path}: sections {wrong}: a recipe has exactly {[*SECTIONS]}")
    return recipe


def train_reader(
    recipe: Mapping[str, Any], *, resume: bool = False, save: bool = True
) -> dict[str, float]:
    """Train by a recipe; the model for use is in ``<output_dir>/reader``.

    Args:
        recipe: As `read_recipe` returns it.
        resume: Go on from the last checkpoint in the output directory, if there is one.
        save: Write the model for use when the run is done.

    Returns:
        The last metrics.

    Raises:
        ValueError: the output directory is missing, or holds a run and `resume` is not given.
    """
    output_dir = recipe["training"].get("output_dir")
    if output_dir is None:
        raise ValueError("training.output_dir is missing: where checkpoints and the reader go")
    checkpoint = checkpoint_to_resume(Path(output_dir), resume)
    trainer = make_trainer(recipe)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    metrics = trainer.evaluate()
    if save:
        target = Path(str(trainer.args.output_dir)) / "reader"
        save_reader(trainer.model, trainer.processor, target)
    return metrics


def make_trainer(recipe: Mapping[str, Any]) -> ReadingTrainer:
    """Model, data and optimizer of a recipe, ready to train.

    Raises:
        ValueError: several processes, several GPUs in one, or a name that is unknown or missing.
    """
    set_seed(recipe["seed"])
    model, processor = make_model(recipe["model"])
    reading = reading_options(recipe["reading"])
    arguments = _made(
        "training",
        VLMTrainingArguments,
        {
            "report_to": "none",
            # In order: the data is random by itself, and a resumed run skips without drawing.
            "train_sampling_strategy": "sequential",
            "seed": recipe["seed"],
            "use_cpu": not torch.cuda.is_available(),
        }
        | recipe["training"],
    )
    if (devices := arguments.world_size * max(1, arguments.n_gpu)) > 1:
        raise ValueError(
            f"{devices} devices: a reader is trained on one, by one process without torchrun; "
            "CUDA_VISIBLE_DEVICES=0 hides the other GPUs"
        )
    batch_size = arguments.train_batch_size * arguments.gradient_accumulation_steps
    data = ReadingData(processor, reading, recipe["seed"], batch_size, arguments.max_steps)
    return ReadingTrainer(
        model,
        arguments,
        reading,
        processor=processor,
        optimizer=recipe["optimizer"],
        train_dataset=data,
        data_collator=ReadingCollator(processor),
        eval_dataset=data,
    )


def make_model(section: Mapping[str, Any]) -> tuple[Any, Any]:
    """A new reader, or with ``path`` a trained one (that of the package where it is "shipped").

    With a path, ``max_img_size`` limits the longer side of an image in pixels.
    """
    if "path" not in section:
        return new_reader(**section)
    path = reader_path() if section["path"] == "shipped" else section["path"]
    model = VisionLanguageModel.from_pretrained(path, dtype=torch.float32)
    processor = VLMProcessor.from_pretrained(path)
    if "max_img_size" in section:
        processor.image_processor.max_img_size = section["max_img_size"]
    return model, processor


def without_head(model: Any) -> Any:
    """Take the training-time head off a model."""
    if hasattr(model, "reading_head"):
        del model.reading_head
    return model


def save_reader(model: Any, processor: Any, target: Path) -> None:
    """Write a model for use: no training-time head, bfloat16, with its processor."""
    without_head(model).to(torch.bfloat16).save_pretrained(target)
    processor.save_pretrained(target)


def reading_options(section: Mapping[str, Any]) -> ReadingOptions:
    """The recipe's section `reading` as options.

    Raises:
        ValueError: there are no stages, or a name is unknown.
    """
    stages = []
    for i, stage in enumerate(section.get("stages") or ()):
        where = f"reading.stages[{i}]"
        draw = _made(f"{where}.draw", RenderOptions, stage.get("draw", {}))
        stages.append(_made(where, Stage, {**stage, "draw": draw}))
    if not stages:
        raise ValueError("reading.stages: expected at least one")
    return _made("reading", ReadingOptions, {**section, "stages": stages})


def _made(name: str, make: Callable[..., Any], section: Mapping[str, Any]) -> Any:
    try:
        return make(**section)
    except TypeError as error:  # a name that it does not know, or one that is missing
        raise ValueError(f"{name}: {error}") from error


def make_optimizer(
    model: nn.Module, muon_lr: float, adamw_lr: float, weight_decay: float
) -> CombinedOptimizer:
    """Muon with its own rate for the hidden matrices, AdamW for the rest; all of it decays."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (hidden if is_hidden_matrix(name, parameter) else rest).append(parameter)
    return CombinedOptimizer(
        torch.optim.Muon(hidden, lr=muon_lr, weight_decay=weight_decay),
        torch.optim.AdamW(rest, lr=adamw_lr, betas=(0.9, 0.97), weight_decay=weight_decay),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; prints the last metrics."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.reader.train", description=__doc__.splitlines()[0]
    )
    parser.add_argument("recipe", nargs="?", type=Path, default=RECIPE)
    parser.add_argument("--override", "-o", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint, if any")
    args = parser.parse_args(arguments)
    print(json.dumps(train_reader(read_recipe(args.recipe, args.override), resume=args.resume)))


if __name__ == "__main__":
    main()
