"""``hrvlm encode``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command import command
from .console import note, progress
from .options import BatchInvariant, Device, DType, MaxImgSize, Upscale
from .tables import ORDER, STRETCH, counted, duration, grid, print_line, print_table

if TYPE_CHECKING:
    from ..inference.encode import EncodeResult


def show(result: EncodeResult) -> None:
    """Sizes, grids and times of ``hrvlm encode``."""
    print_table(
        ["image", "size", "resized", "stretch", "patch grid", "patches", "time", "share"],
        [
            (
                image.path,
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
        f"{duration(seconds)} (an image's time is its share of the pass's FLOPs)"
    )
    attention = f"attention by {result.attention_backend} (backend {result.backend})"
    print_line(f"{result.model}, {result.dtype} on {result.device}, {attention}")
    written = [image.features for image in result.images if image.features]
    if written:
        print_line(f"written to {written[0].parent}")


def _check(result: EncodeResult) -> None:
    if not result.images:
        raise ValueError("no image could be read")


@command(show=show, check=_check)
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
    backend: Annotated[str, typer.Option(help="{hrvlm_kernels.backends.BACKENDS}.")] = "auto",
    device: Device = None,
    dtype: DType = None,
    batch_invariant: BatchInvariant = False,
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
) -> EncodeResult:
    """Encode images of any shapes in one packed pass.

    An image's sides become multiples of the patch size.
    With --out: features (safetensors) and a picture of the input, its patch features (PCA to RGB)
    and the CLS token's attention, per image.
    """
    from ..inference.encode import EncodeOptions
    from ..inference.encode import encode as run
    from ..inference.loading import load_encoder
    from ..inference.passes import find_images

    paths = find_images(images)
    if out is not None and any(p.is_dir() and p.resolve() == out.resolve() for p in images):
        raise ValueError(f"--out {out} is one of the inputs: its pictures would become images")
    loaded = load_encoder(
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
    )
    with progress("encoding", len(paths)) as advance:
        result = run(paths, loaded, options, on_images=advance)
    for path, reason in result.bad:
        note(f"skipped {path}: {reason}")
    return result
