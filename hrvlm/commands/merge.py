"""``hrvlm merge``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .command import command
from .tables import counted, print_line


def show(result: dict[str, Any]) -> None:
    """The result of ``hrvlm merge``."""
    print_line(
        f"{counted(result['layers'], 'adapter')} added to {result['base']}; the model is in "
        f"{result['directory']}"
    )


@command(show=show)
def merge(
    adapter: Annotated[
        Path, typer.Argument(help="Directory of a run with `lora`, or one of its checkpoints.")
    ],
    directory: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write.")],
    base: Annotated[
        str | None, typer.Option(help="Directory or hub id of the base; default: the run's.")
    ] = None,
) -> dict[str, Any]:
    """Add the adapters of a training run to their base."""
    from ..training.adapters import merge as run

    return asdict(run(adapter, directory, base))
