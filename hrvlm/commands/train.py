"""``hrvlm train``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command import command
from .console import note
from .tables import counted, print_line, print_table

if TYPE_CHECKING:
    from ..reader.demo import DemoResult


def show(result: DemoResult | dict[str, Any]) -> None:
    """Metrics of ``hrvlm train``, and where the model is."""
    if not isinstance(result, dict):
        return _show_demo(result)
    rows = [(name, f"{value:.4g}") for name, value in result["metrics"].items()]
    print_table(["metric", ""], rows)
    if skipped := result.get("skipped"):
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        note(f"rows left out: {reasons} (see {result['output_dir']}/data_report.json)")
    print_line(f"{counted(result['steps'], 'step')}; the model is in {result['output_dir']}")


def _show_demo(result: DemoResult) -> None:
    """What ``hrvlm train --demo`` did."""
    print_line(
        f"{result.font}, new to the reader: {result.error_before:.1%} of the characters wrong "
        f"before, {result.error_after:.1%} after {result.steps} steps on {result.images} images "
        f"({result.held_out} other lines read)\nmodel: {result.model}\nloss: {result.loss_curve}"
    )


@command(show=show)
def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file: model, data, training.")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--override", "-o", help="A change, as training.max_steps=10; repeatable."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")
    ] = False,
    demo: Annotated[
        bool, typer.Option("--demo", help="Teach the reader of hrvlm a new font; no CONFIG.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Directory for what --demo makes.")] = Path(
        "train-demo"
    ),
) -> DemoResult | dict[str, Any] | None:
    """Train or fine-tune a vision-language model.

    On several devices: `torchrun --nproc-per-node N --no-python hrvlm train ...`, or with
    `accelerate launch --no_python`.
    """
    if demo == (config is not None):
        raise ValueError("CONFIG or --demo is needed, and not both")
    if find_spec("accelerate") is None:
        raise ValueError("training needs more packages: pip install 'hrvlm[train]'")
    if config is None:
        from ..reader.demo import train_demo

        return train_demo(out)
    from ..training.config import TrainingConfig
    from ..training.run import train as run

    result = run(TrainingConfig.from_yaml(config, override or ()), resume=resume)
    return result.to_json() if result.is_main else None  # one of several processes reports
