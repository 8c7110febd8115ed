"""The command that trains; `cli.py` adds it to ``hrvlm``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from . import tables
from .console import json_only, print_json
from .options import Debug, Json


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
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train or fine-tune a vision-language model.

    On several devices: `torchrun --nproc-per-node N --no-python hrvlm train ...`, or with
    `accelerate launch --no_python`. A file with a section `reading` is a recipe for a reader, which
    is trained on one device.
    """
    if demo == (config is not None):
        raise ValueError("CONFIG or --demo is needed, and not both")
    if find_spec("accelerate") is None:
        raise ValueError("training needs more packages: pip install 'hrvlm[train]'")
    if config is None:
        _demo(out, as_json)
        return
    with json_only(as_json):
        from ..training.config import TrainingConfig, read_yaml

        sections = read_yaml(config, override or ())
        if "reading" in sections:
            from ..reader.recipe import check_sections, train_reader

            check_sections(sections, str(config))
            # A recipe has one process.
            shown, is_main = {"metrics": train_reader(sections, resume=resume)}, True
        else:
            from ..training.run import train as run

            result = run(TrainingConfig.from_dict(sections), resume=resume)
            shown, is_main = result.to_json(), result.is_main
    if not is_main:
        return
    if as_json:
        print_json(shown)
    else:
        tables.show_trained(shown)


def _demo(out: Path, as_json: bool) -> None:
    with json_only(as_json):
        from ..reader.demo import train_demo

        result = train_demo(out)
    if as_json:
        print_json(result.to_json())
    else:
        tables.show_demo(result)
