"""The options that several commands have, so that they are called and explained alike."""

from __future__ import annotations

from typing import Annotated

import typer

from . import console

Debug = Annotated[
    bool,
    typer.Option(
        "--debug", help="Show the traceback of an error.", callback=console.remember_debug
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: the GPU if there is one.")
]
StoredDtype = Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")]
