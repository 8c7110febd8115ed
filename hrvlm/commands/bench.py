"""``hrvlm bench``; `cli.py` adds it to ``hrvlm``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import tables
from .console import json_only, note, print_json
from .options import Debug, Device, Json


def bench(
    model: Annotated[
        str | None,
        typer.Option(help="vits16, vits16plus, vitb16, vitl16, vith16plus or vit7b16."),
    ] = None,
    size: Annotated[
        list[int] | None, typer.Option(help="Side of square images in pixels; repeat for several.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="About how many make a batch.")] = None,
    mixed: Annotated[
        int | None, typer.Option(help="Images of mixed sizes; 0 leaves them out.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also time torch.compile of transformers' model.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="For the rounds of each comparison.")] = 3.0,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; default: bfloat16 on a GPU.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time the encoder against transformers on this machine.

    224, 768 and 1024 px and mixed sizes with ViT-B; on the CPU a small model and small sizes.
    """
    with json_only(as_json):
        from dataclasses import replace

        from ..machine import MODEL_DTYPES, pick_device, torch_dtype
        from ..measuring.encoder import ON_CPU, BenchOptions
        from ..measuring.encoder import bench as run

        weights = None if dtype is None else torch_dtype(dtype, MODEL_DTYPES)
        where = pick_device(device)
        given: dict[str, Any] = {
            "model": model,
            "sizes": size and tuple(size),
            "tokens": tokens,
            "mixed": mixed,
        }
        defaults = ON_CPU if where.type == "cpu" else BenchOptions()
        options = replace(
            defaults,
            compiled=compiled,
            seconds=seconds,
            **{name: value for name, value in given.items() if value is not None},
        )
        report = run(
            where,
            options,
            dtype=weights,
            on_case=lambda case: note(f"{case.name}: done"),
        )
    if as_json:
        print_json(report.to_json())
    else:
        tables.show_bench(report)
