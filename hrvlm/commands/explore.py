"""``hrvlm explore``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command import command
from .console import note, note_left_out, progress
from .options import (
    Backend,
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
from .tables import counted, grid, print_line, print_table, quantity

if TYPE_CHECKING:
    from ..explore.explore import ExploreResult


def show(result: ExploreResult) -> None:
    """The images, and what the page keeps of their features."""
    print_table(
        ["image", "patch grid", "patches"],
        [
            (name, grid(geometry.patch_grid), geometry.num_patches)
            for name, geometry in result.images
        ],
    )
    reduced = result.page.reduced
    which = "" if result.layer == result.layers else f", layer {result.layer} of {result.layers}"
    print_line(f"{result.model}{which}; patch grids are height x width")
    compared = (
        "all pairs compared"
        if reduced.compared == len(reduced.values)
        else f"{counted(reduced.compared, 'patch', 'patches')} compared with all"
    )
    print_line(
        f"{len(reduced.scales)} of {reduced.width} components keep {reduced.variance_kept:.1%} of "
        f"the variance, a similarity is off by at most {reduced.largest_error:.3f} ({compared})"
    )
    print_line(f"{result.page.path}: {quantity(result.page.bytes, 'B')}, open it in a browser")


@command(show=show)
def explore(
    images: Images,
    out: Annotated[Path, typer.Option(help="The page, an HTML file.")],
    model: EncoderModel = None,
    layer: Annotated[
        int | None, typer.Option(help="Features of this block, 1 the first; default: the last.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    max_img_size: MaxImgSize = 1024,
    upscale: Upscale = False,
    backend: Backend = "auto",
    device: Device = None,
    dtype: DType = None,
    max_tokens_per_pass: MaxTokensPerPass = 32768,
    skip_bad: SkipBad = False,
    fetch: Fetch = False,
) -> ExploreResult:
    """Write a page to look through the features of images.

    One HTML file that needs no network: click a patch, and see how similar all patches of all
    images are to it; principal components, CLS attention, and lines between matching patches.
    """
    from ..explore.explore import ExploreOptions
    from ..explore.explore import explore as run
    from ..inference.inputs import gathered
    from ..inference.loading import load_encoder

    with gathered(images, fetch=fetch, skip_bad=skip_bad) as inputs:
        loaded = load_encoder(model, backend=backend, device=device, dtype=dtype)
        if loaded.random_weights:
            note("note: no --model, so the weights are random: the features mean nothing")
        options = ExploreOptions(
            layer=layer,
            title=title,
            max_img_size=max_img_size,
            allow_upscale=upscale,
            max_tokens_per_pass=max_tokens_per_pass,
            skip_bad=skip_bad,
            names=inputs.names,
        )
        with progress("encoding", len(inputs.paths)) as advance:
            result = run(inputs.paths, loaded, out, options, on_images=advance)
    result.bad += [(inputs.name(path), error) for path, error in inputs.bad]
    note_left_out(inputs.skipped, result.bad)
    return result
