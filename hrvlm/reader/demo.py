"""``hrvlm train --demo``: the reader that comes with hrvlm learns a font it has not seen.

200 drawn lines of text in a new font, a few passes over them, on any machine in minutes: the error
on other lines in that font before and after, and the loss as a picture.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..charts import Axis, Series, line_chart
from ..drawn_text.drawing import NEW_FONT, RenderOptions
from ..files import write_text
from ..inference.loading import quiet_loading
from .model import reader_path
from .score import score

IMAGES, EPOCHS, BATCH_SIZE = 200, 6, 8
_DRAW: dict[str, Any] = {"fonts": [NEW_FONT], "font_sizes": [16, 30]}


@dataclass(frozen=True)
class DemoResult:
    """What the fine-tuning did.

    Attributes:
        font: The new font.
        images: Trained on.
        steps: Optimizer steps.
        held_out: Lines that both error rates are of.
        error_before: Character error rate of the reader as it comes.
        error_after: Character error rate after training.
        model: Directory of the fine-tuned model.
        loss_curve: SVG file.
    """

    font: str
    images: int
    steps: int
    held_out: int
    error_before: float
    error_after: float
    model: str
    loss_curve: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class _LossCurve(TrainerCallback):
    """Keeps the loss of every logged step."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.points.append((float(state.global_step), float(logs["loss"])))


def train_demo(out: Path, *, held_out: int = 64, epochs: int = EPOCHS) -> DemoResult:
    """Fine-tune the reader.

    Args:
        out: Directory for the model and the loss curve; must be empty or new.
        held_out: Lines to measure the error on.
        epochs: Passes over the images.

    Raises:
        ValueError: `out` is not empty.
    """
    from ..training.config import TrainingConfig
    from ..training.run import load_model, make_trainer, training_arguments

    if out.exists() and any(out.iterdir()):
        raise ValueError(f"out={out}: expected a directory that is empty or not there yet")
    steps = epochs * IMAGES // BATCH_SIZE
    config = TrainingConfig.from_dict(
        {
            "model": {"path": reader_path()},
            "data": {"train": {"kind": "synthetic", "limit": IMAGES, "options": _DRAW}},
            "training": {
                "output_dir": str(out),
                "max_steps": steps,
                "per_device_train_batch_size": BATCH_SIZE,
                "learning_rate": 2e-4,
                "warmup_steps": 10,
                "lr_scheduler_type": "cosine",
                "logging_steps": 5,
                "save_strategy": "no",
                "report_to": "none",
                "use_cpu": not torch.cuda.is_available(),
            },
        }
    )
    with quiet_loading(config.model.path):
        model, processor = load_model(config.model)
    args = training_arguments(config)
    args._n_gpu = min(args.n_gpu, 1)  # one of several GPUs is enough, and Trainer takes them all
    trainer = make_trainer(config, args, model, processor)
    curve = _LossCurve()
    trainer.add_callback(curve)
    draw = RenderOptions(**_DRAW)
    before = score(model, processor, draw, held_out).error_rate
    trainer.train()
    after = score(model, processor, draw, held_out).error_rate
    trainer.save_model()
    picture = out / "loss.svg"
    write_text(picture, _plot(curve.points))
    return DemoResult(
        NEW_FONT, IMAGES, steps, held_out, before, after, str(out), loss_curve=str(picture)
    )


def _plot(points: list[tuple[float, float]]) -> str:
    return line_chart(
        f"Fine-tuning on {IMAGES} images of {NEW_FONT}",
        Axis("step"),
        Axis("loss"),
        [Series("training loss", tuple(points))],
    )
