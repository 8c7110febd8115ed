"""From a recipe (YAML) to a trained reader: what ``hrvlm train recipes/reader.yaml`` runs."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import TrainingArguments, set_seed

from .optimizers import CombinedOptimizer
from .processors import VLMProcessor
from .reader_model import new_reader
from .reading import (
    ReadingCollator,
    ReadingData,
    ReadingOptions,
    ReadingTrainer,
    Stage,
    without_head,
)
from .reading_score import score
from .shipped_reader import reader_path
from .synthetic import RenderOptions
from .train import last_checkpoint
from .vision_language_model import VisionLanguageModel

SECTIONS = ("seed", "model", "reading", "optimizer", "training")


class RecipeTrainer(ReadingTrainer):
    """ReadingTrainer that evaluates by reading: character error rates on held-out samples."""

    def __init__(self, *args: Any, processor: Any, samples: int = 64, **kwargs: Any):
        self.processor, self.samples = processor, samples
        super().__init__(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """``eval_cer_line`` on held-out single lines; nothing while the encoder is alone."""
        if self.reading.stage_at(self.state.global_step - 1).encoder_only:
            return {}
        result = score(self.model, self.processor, "line", self.samples)
        metrics = {"eval_cer_line": round(result.error_rate, 4)}
        self.log(metrics)
        return metrics


def read_recipe(path: str | PathLike[str]) -> dict[str, Any]:
    """The sections of a recipe.

    Raises:
        ValueError: the file is not a mapping, or a section is unknown or missing.
    """
    recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: expected a mapping of sections, got {recipe!r}")
    if wrong := sorted(set(recipe) ^ set(SECTIONS)):
        raise ValueError(f"{path}: sections {wrong}: expected exactly {list(SECTIONS)}")
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
        ValueError: the output directory holds a run and `resume` is not given.
    """
    output_dir = Path(recipe["training"]["output_dir"])
    checkpoint = last_checkpoint(output_dir)
    if checkpoint is not None and not resume:
        raise ValueError(
            f"{output_dir} holds a run ({checkpoint.name}): --resume goes on with it; or give "
            "another training.output_dir"
        )
    trainer = make_trainer(recipe)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    metrics = trainer.evaluate()
    if save:
        target = Path(str(trainer.args.output_dir)) / "reader"
        save_reader(trainer.model, trainer.processor, target)
    return metrics


def make_trainer(recipe: Mapping[str, Any]) -> RecipeTrainer:
    """Model, data and optimizer of a recipe, ready to train."""
    set_seed(recipe["seed"])
    model, processor = make_model(recipe["model"])
    reading = reading_options(recipe["reading"])
    arguments = TrainingArguments(
        **{
            "report_to": "none",
            "remove_unused_columns": False,
            "seed": recipe["seed"],
            "use_cpu": not torch.cuda.is_available(),
        }
        | recipe["training"]
    )
    batch_size = arguments.train_batch_size * arguments.gradient_accumulation_steps
    data = ReadingData(processor, reading, recipe["seed"], batch_size, arguments.max_steps)
    trainer = RecipeTrainer(
        model,
        reading,
        processor=processor,
        args=arguments,
        train_dataset=data,
        data_collator=ReadingCollator(processor),
        eval_dataset=data,
    )
    trainer.optimizer = make_optimizer(model, **recipe["optimizer"])
    return trainer


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


def save_reader(model: Any, processor: Any, target: Path) -> None:
    """Write a model for use: no training-time head, bfloat16, with its processor."""
    without_head(model).to(torch.bfloat16).save_pretrained(target)
    processor.save_pretrained(target)


def reading_options(section: Mapping[str, Any]) -> ReadingOptions:
    """The recipe's section `reading` as options."""
    stages = [
        Stage(**{**stage, "draw": RenderOptions(**stage["draw"])}) for stage in section["stages"]
    ]
    return ReadingOptions(**{**section, "stages": stages})


def make_optimizer(
    model: nn.Module, muon_lr: float, adamw_lr: float, weight_decay: float
) -> CombinedOptimizer:
    """Muon for the matrices inside encoder blocks and decoder layers, AdamW for the rest."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = name.startswith(("vision_encoder.layer.", "decoder.model.layers."))
        (hidden if inside and parameter.ndim == 2 else rest).append(parameter)
    return CombinedOptimizer(
        torch.optim.Muon(hidden, lr=muon_lr, weight_decay=weight_decay),
        torch.optim.AdamW(rest, lr=adamw_lr, betas=(0.9, 0.97), weight_decay=weight_decay),
    )
