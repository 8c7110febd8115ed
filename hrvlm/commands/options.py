"""The options that several commands have, so that they are called and explained alike."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Directory or hub id of a VisionLanguageModel.")]
EncoderModel = Annotated[
    str | None,
    typer.Option(
        help="Hub id, directory or weight file of an encoder; without it: random weights."
    ),
]
Images = Annotated[
    list[str],
    typer.Argument(help="Image files, folders of them, - for standard input, addresses."),
]
Backend = Annotated[str, typer.Option(help="{hrvlm_kernels.backends.BACKENDS}.")]
MaxTokensPerPass = Annotated[int, typer.Option(help="Patches that are packed into one pass.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Report unreadable images and go on.")]
Fetch = Annotated[bool, typer.Option("--fetch", help="Fetch images from addresses.")]
MaxImgSize = Annotated[int, typer.Option(help="Limit of the longer side in pixels.")]
Upscale = Annotated[
    bool, typer.Option("--upscale", help="Enlarge smaller images to --max-img-size.")
]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="Features have the same bits whatever an image is packed with: one image at a time.",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: the GPU if there is one.")
]
DType = Annotated[
    str | None,
    typer.Option(help="{hrvlm.machine.MODEL_DTYPES}; default: bfloat16 on a GPU, else float32."),
]
StoredDType = Annotated[
    str,
    typer.Option("--dtype", help="auto (as stored), {hrvlm.machine.MODEL_DTYPES}."),
]
