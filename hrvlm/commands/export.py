"""``hrvlm export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command import command
from .tables import counted, print_line, quantity

if TYPE_CHECKING:
    from ..export.files import Exported


def show(exported: Exported) -> None:
    """The result of ``hrvlm export``."""
    for file in exported.files:
        print_line(f"wrote {file}")
    print_line(
        f"{quantity(exported.bytes, 'B')}; a {exported.form} of images of any size; differs from "
        f"the encoder by {exported.error:.1e} on {counted(exported.checked, 'input')}"
    )
    if exported.form == "pack":
        print_line(
            "its attention holds a mask of all tokens by all tokens of a pack (images apart)"
        )


@command(show=show)
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="Checkpoint of DINOv3 or DINOv2: directory, file, hub id."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="File to write; default: encoder.onnx, .pt2, .xml."),
    ] = None,
    format: Annotated[str, typer.Option(help="{hrvlm.export.files.FORMATS}.")] = "onnx",
    form: Annotated[
        str, typer.Option(help="{hrvlm.export.graphs.GRAPHS}: of one size, or of mixed sizes.")
    ] = "batch",
) -> Any:
    """Write the encoder as a file for other runtimes.

    The file is run on several sizes and compared with the encoder before it takes its place.
    """
    from ..export.files import FORMATS
    from ..export.files import export as run
    from ..inference.loading import load_encoder

    if output is None:
        output = Path(f"encoder{FORMATS[format].suffix if format in FORMATS else ''}")
    encoder = load_encoder(model, device="cpu", dtype="float32").encoder
    return run(encoder, output, format=format, form=form)
