"""The ``hrvlm`` command: arguments in, tables or JSON out; the work is in the modules beside it.

Results go to stdout (with ``--json`` nothing but one JSON document), everything else to stderr.
Exit codes: 0 done, 1 a check failed or something broke, 2 the user can put it right.

torch and the rest are imported inside the commands, so that ``hrvlm --help`` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import __version__
from .commands import bench as cli_bench
from .commands import console, tables
from .commands import models as cli_models
from .commands import train as cli_train
from .commands.console import CommandGroup, json_only, note, print_json
from .commands.options import Debug, Device, Json

app = typer.Typer(
    cls=CommandGroup,
    help="High-resolution vision encoders for images as they are: any size, many at once.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MaxImgSize = Annotated[int, typer.Option(help="Limit of the longer side in pixels.")]
Upscale = Annotated[
    bool, typer.Option("--upscale", help="Enlarge smaller images to --max-img-size.")
]


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"hrvlm {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
    debug: Debug = False,
) -> None:
    """High-resolution vision encoders for images as they are: any size, many at once."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def encode(
    images: Annotated[list[Path], typer.Argument(help="Image files, or directories of them.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id, directory or weight file of a DINOv3 encoder; without it: random weights."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for features and pictures.")] = None,
    max_img_size: MaxImgSize = 1024,
    upscale: Upscale = False,
    backend: Annotated[str, typer.Option(help="auto, triton, flash_attn, sdpa or eager.")] = "auto",
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; default: bfloat16 on a GPU.")
    ] = None,
    max_tokens_per_pass: Annotated[
        int, typer.Option(help="Patches that are packed into one pass.")
    ] = 32768,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Draw a picture per image.")
    ] = True,
    joint_pca: Annotated[
        bool, typer.Option("--joint-pca", help="Give all pictures one projection to colours.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Report unreadable images and go on.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Encode images of any shapes in one packed pass.

    An image's sides become multiples of the patch size.
    With --out: features (safetensors) and a picture of the input, its patch features (PCA to RGB)
    and the CLS token's attention, per image.
    """
    with json_only(as_json):
        from .inference.encode import EncodeOptions, find_images
        from .inference.encode import encode as run
        from .inference.loading import load_encoder

        paths = find_images(images)
        if out is not None and any(p.is_dir() and p.resolve() == out.resolve() for p in images):
            raise ValueError(f"--out {out} is one of the inputs: its pictures would become images")
        loaded = load_encoder(model, backend=backend, device=device, dtype=dtype)
        if loaded.random_weights:
            note("note: no --model, so the weights are random: the features mean nothing")
        options = EncodeOptions(
            max_img_size=max_img_size,
            allow_upscale=upscale,
            max_tokens_per_pass=max_tokens_per_pass,
            out=out,
            pictures=pictures,
            joint_pca=joint_pca,
            skip_bad=skip_bad,
        )
        with console.progress("encoding", len(paths)) as advance:
            result = run(paths, loaded, options, on_images=advance)
    for path, reason in result.bad:
        note(f"skipped {path}: {reason}")
    if as_json:
        print_json(result.to_json())
    else:
        tables.show_encoded(result)
    if not result.images:
        raise ValueError("no image could be read")


@app.command()
def plan(
    images: Annotated[
        list[str], typer.Argument(metavar="HEIGHTxWIDTH...", help="Sizes, or image files.")
    ],
    model: Annotated[
        str,
        typer.Option(help="vits16, vits16plus, vitb16, vitl16, vith16plus or vit7b16."),
    ] = "vitb16",
    max_img_size: MaxImgSize = 1024,
    patch_size: Annotated[int | None, typer.Option(help="Default: the model's.")] = None,
    factor: Annotated[
        int,
        typer.Option(
            help="The projector's: factor x factor patches a token; 1: the encoder alone."
        ),
    ] = 4,
    upscale: Upscale = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Grids, tokens, memory and FLOPs of images, without any weights."""
    from .encoder.cost import make_plan, named_architecture

    planned = make_plan(
        images,
        named_architecture(model, patch_size),
        max_img_size=max_img_size,
        factor=factor,
        dtype=dtype,
        allow_upscale=upscale,
    )
    if as_json:
        print_json(planned.to_json())
    else:
        tables.show_plan(planned)


app.command()(cli_train.train)
app.command()(cli_models.generate)
app.command()(cli_models.evaluate)
app.command()(cli_bench.bench)
app.command("bench-generate")(cli_models.bench_generate)
app.command(context_settings=cli_models.PASS_ON)(cli_models.serve)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint file or directory.")],
    directory: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")
    ] = None,
    pixel_statistics: Annotated[
        str | None, typer.Option(help="Mean and std of the pixels: imagenet or sat493m.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn a DINOv3 checkpoint of any origin into a directory.

    Meta, timm and transformers layouts are recognised by their keys; the result is in the layout of
    transformers.
    """
    with json_only(as_json):
        from .checkpoints.convert import convert as run
        from .machine import torch_dtype

        stored = None if dtype is None else torch_dtype(dtype)
        try:
            info = run(
                source,
                directory,
                dtype=stored,
                pixel_statistics=pixel_statistics,
                overwrite=overwrite,
            )
        except FileExistsError as error:
            raise ValueError(f"{directory} holds a model: --overwrite replaces it") from error
        summary = tables.summarize_converted(directory, info)
    if as_json:
        print_json(summary)
    else:
        tables.show_converted(summary)


@app.command()
def verify(
    device: Device = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32, bfloat16, float16; repeat for several. Default: the first 2."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="eager, sdpa, flash_attn, triton; default: all that can run."),
    ] = None,
    op: Annotated[
        list[str] | None,
        typer.Option(
            help="rope_2d, pixel_shuffle_linear, varlen_attention, residual_layer_norm, swiglu, "
            "normalize_patchify, encoder; default: all."
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check every op on every backend against float64.

    Forward and backward, on this machine; exit code 1 if an error is above its limit.
    """
    with json_only(as_json):
        from .machine import MODEL_DTYPES, pick_device
        from .verification.verify import verify as run

        with console.progress("checks") as advance:
            report = run(
                pick_device(device),
                dtypes=dtype or MODEL_DTYPES,
                backends=backend,
                ops=op,
                on_check=lambda _: advance(1),
            )
    if as_json:
        print_json(report.to_json())
    else:
        tables.show_report(report)
    if not report.passed:
        raise typer.Exit(console.FAILURE)


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Versions, hardware, and which backend runs each op and why."""
    with json_only(as_json):
        from .commands.doctor import diagnose

        found = diagnose()
    if as_json:
        print_json(found)
    else:
        tables.show_diagnosis(found)
    if found["problems"]:
        raise typer.Exit(console.FAILURE)
