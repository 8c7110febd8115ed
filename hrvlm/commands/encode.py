"""``hrvlm encode``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command import command
from .console import note, note_left_out, progress
from .options import (
    Backend,
    BatchInvariant,
    Device,
    DType,
    EncoderModel,
    Fetch,
    Images,
    MaxImgSize,
    MaxTokensPerPass,
    SkipBad,
    Upscale,
)
from .tables import ORDER, STRETCH, counted, duration, grid, print_line, print_table

if TYPE_CHECKING:
    from ..inference.encode import EncodeResult


def show(result: EncodeResult) -> None:
    """Sizes, grids and times of ``hrvlm encode``."""
    if not result.images:
        return  # all was there, or nothing could be read: that is said on stderr
    print_table(
        ["image", "size", "resized", "stretch", "patch grid", "patches", "time", "share"],
        [
            (
                image.name,
                grid(image.size),
                grid((image.geometry.height, image.geometry.width)),
                f"{image.stretch:.2f}x",
                grid(image.geometry.patch_grid),
                image.geometry.num_patches,
                duration(image.seconds),
                f"{image.share:.0%}",
            )
            for image in result.images
        ],
    )
    patches = sum(image.geometry.num_patches for image in result.images)
    passes, seconds = len(result.pass_seconds), sum(result.pass_seconds)
    print_line(f"{ORDER}; {STRETCH}")
    print_line(
        f"{counted(len(result.images), 'image')}, {counted(patches, 'patch', 'patches')} in "
        f"{counted(passes, 'packed pass', 'packed passes')}: "
        f"{duration(seconds)} (an image's time is its share of the pass's {result.shared})"
    )
    attention = f"attention by {result.attention_backend} (backend {result.backend})"
    print_line(f"{result.model}, {result.dtype} on {result.device}, {attention}")
    written = [image.features for image in result.images if image.features]
    if written:
        print_line(f"written to {written[0].parent}")


def _check(result: EncodeResult) -> None:
    if not result.images and not result.there:
        raise ValueError("no image could be read")


@command(show=show, check=_check)
def encode(
    images: Images,
    model: EncoderModel = None,
    out: Annotated[Path | None, typer.Option(help="Directory for features and pictures.")] = None,
    max_img_size: MaxImgSize = 1024,
    upscale: Upscale = False,
    backend: Backend = "auto",
    device: Device = None,
    dtype: DType = None,
    batch_invariant: BatchInvariant = False,
    max_tokens_per_pass: MaxTokensPerPass = 32768,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Draw a picture per image.")
    ] = True,
    joint_pca: Annotated[
        bool, typer.Option("--joint-pca", help="Give all pictures one projection to colours.")
    ] = False,
    skip_bad: SkipBad = False,
    pooled: Annotated[
        bool, typer.Option("--pooled", help="Write CLS and the mean of the patches, no patches.")
    ] = False,
    one_file: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="One file for all images: {hrvlm.inference.encode_formats.FORMATS}; default: a "
            "safetensors file for each.",
        ),
    ] = None,
    fetch: Fetch = False,
) -> EncodeResult:
    """Encode images of any shapes in one packed pass.

    An image's sides become multiples of the patch size. Folders are read at any depth.
    With --out: features (safetensors) and a picture of the input, its patch features (PCA to RGB)
    and the CLS token's attention, per image. What is there already, made of the same file in the
    same way, stays, and so does what is of other images.
    """
    from ..inference.encode import EncodeOptions
    from ..inference.encode import encode as run
    from ..inference.encode_formats import FORMATS
    from ..inference.inputs import gathered
    from ..inference.towers import load_encoder_or_tower

    if one_file is not None and one_file not in FORMATS:
        raise ValueError(f"--format {one_file!r}: expected one of {', '.join(FORMATS)}")
    for folder in (Path(image) for image in images if out is not None):
        if out is not None and folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            where = "is" if out.resolve() == folder.resolve() else "lies in"
            raise ValueError(
                f"--out {out} {where} one of the inputs: its pictures would become images"
            )
    with gathered(images, fetch=fetch, skip_bad=skip_bad) as inputs:
        loaded = load_encoder_or_tower(
            model, backend=backend, device=device, dtype=dtype, batch_invariant=batch_invariant
        )
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
            pooled=pooled,
            one_file=one_file,
            names=inputs.names,
        )
        with progress("encoding", len(inputs.paths)) as advance:
            result = run(inputs.paths, loaded, options, on_images=advance)
    result.bad += [(inputs.name(path), error) for path, error in inputs.bad]
    result.skipped += map(str, inputs.skipped)
    note_left_out(result.skipped, result.bad)
    if result.there:
        note(f"{counted(len(result.there), 'image')} done by an earlier run, and left as they are")
    return result
