"""From a recipe (YAML) to a trained reader: what ``hrvlm train recipes/reader.yaml`` runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from ..drawn_text.drawing import RenderOptions
from ..files import read_mapping
from ..training.optimizers import CombinedOptimizer
from ..training.run import checkpoint_to_resume
from ..vlm.processors import VLMProcessor
from ..vlm.vision_language_model import VisionLanguageModel
from .losses import (
    ReadingCollator,
    ReadingData,
    ReadingOptions,
    ReadingTrainer,
    Stage,
    without_head,
)
from .model import new_reader
from .score import score
from .shipped import reader_path

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
    recipe = read_mapping(path)
    check_sections(recipe, str(path))
    return recipe


def check_sections(recipe: Mapping[str, Any], name: str) -> None:
    """Raise ValueError where a section of the recipe `name` is unknown or missing."""
    if wrong := sorted(set(recipe) ^ set(SECTIONS)):
        raise ValueError(
            f"{name}: sections {wrong}: a recipe with `reading` has exactly {[*SECTIONS]}"
        )


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


def make_trainer(recipe: Mapping[str, Any]) -> RecipeTrainer:
    """Model, data and optimizer of a recipe, ready to train.

    Raises:
        ValueError: several processes, several GPUs in one, or a name that is unknown or missing.
    """
    set_seed(recipe["seed"])
    model, processor = make_model(recipe["model"])
    reading = reading_options(recipe["reading"])
    arguments = _made(
        "training",
        TrainingArguments,
        {
            "report_to": "none",
            "remove_unused_columns": False,
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
    trainer = RecipeTrainer(
        model,
        reading,
        processor=processor,
        args=arguments,
        train_dataset=data,
        data_collator=ReadingCollator(processor),
        eval_dataset=data,
    )
    optimizer = {"model": model} | recipe["optimizer"]
    trainer.optimizer = _made("optimizer", make_optimizer, optimizer)
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
