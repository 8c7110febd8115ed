"""From image files to the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..images.geometry import Geometry
from ..inference.loading import LoadedEncoder
from ..inference.passes import DEFAULT_MAX_TOKENS, LoadedImage, cls_attention, forward, passes
from .page import SHOWN_SIDE, Page, PageImage, write_page


@dataclass(frozen=True)
class ExploreOptions:
    """How the images are encoded, and what is said above them."""

    layer: int | None = None  # features are the output of this block, 1 the first; None: the last
    title: str | None = None
    max_img_size: int = 1024
    allow_upscale: bool = False
    max_tokens_per_pass: int = DEFAULT_MAX_TOKENS
    skip_bad: bool = False  # report unreadable images instead of raising
    names: Mapping[Path, str] = field(default_factory=dict)  # of files that are called otherwise


@dataclass
class ExploreResult:
    """What `explore` did."""

    model: str
    random_weights: bool
    layer: int
    layers: int
    page: Page
    images: list[tuple[str, Geometry]] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data; grids are (height, width)."""
        reduced = self.page.reduced
        return {
            "page": str(self.page.path),
            "bytes": self.page.bytes,
            "model": self.model,
            "weights": "random" if self.random_weights else "pretrained",
            "layer": self.layer,
            "images": [
                {"image": name, "patch_grid": list(geometry.patch_grid)}
                for name, geometry in self.images
            ],
            "bad": [{"image": name, "error": error} for name, error in self.bad],
            "components": len(reduced.scales),
            "variance_kept": reduced.variance_kept,
            "largest_similarity_error": reduced.largest_error,
            "patches_compared": reduced.compared,
        }


def explore(
    paths: Sequence[Path],
    loaded: LoadedEncoder,
    out: Path,
    options: ExploreOptions | None = None,
    *,
    on_images: Callable[[int], None] | None = None,
) -> ExploreResult:
    """Encode image files and write a page to look through their features; see :func:`write_page`.

    Args:
        paths: Image files.
        loaded: The model.
        out: The page, an HTML file.
        options: See :class:`ExploreOptions`.
        on_images: Told how many images are done, unreadable ones included.

    Raises:
        ValueError: an image can't be read (it is named), none can, there is no such layer, or the
            page would replace an input.
        OSError: a file can't be opened or written.
    """
    options = options or ExploreOptions()
    layer, layers = _layer(options.layer, loaded)
    if out.is_dir():
        raise ValueError(f"{out} is a folder: the page is a file")
    if out.resolve() in {path.resolve() for path in paths}:
        raise ValueError(f"{out} is an input and would be replaced")
    bad: list[tuple[Path, str]] = []
    read = passes(
        paths,
        loaded,
        max_img_size=options.max_img_size,
        allow_upscale=options.allow_upscale,
        max_tokens_per_pass=options.max_tokens_per_pass,
        shown_side=SHOWN_SIDE,
        bad=bad if options.skip_bad else None,
        on_bad=on_images,
    )
    images: list[tuple[str, Geometry]] = []
    shown: list[PageImage] = []
    for batch in read:
        shown += _encoded(batch, loaded, layer)
        images += [
            (options.names.get(image.path, str(image.path)), image.geometry) for image in batch
        ]
        if on_images:
            on_images(len(batch))
    if not images:
        raise ValueError("no image could be read")
    which = "" if layer == layers else f" \u00b7 layer {layer} of {layers}"
    page = write_page(
        out, shown, title=options.title or "What the patches share", about=loaded.name + which
    )
    unread = [(options.names.get(path, str(path)), error) for path, error in bad]
    return ExploreResult(loaded.name, loaded.random_weights, layer, layers, page, images, unread)


def _layer(layer: int | None, loaded: LoadedEncoder) -> tuple[int, int]:
    layers = len(loaded.encoder.layer)
    if layer is None:
        return layers, layers
    if not 1 <= layer <= layers:
        raise ValueError(f"layer must be 1 to {layers} for {loaded.name}, got {layer}")
    return layer, layers


def _encoded(batch: list[LoadedImage], loaded: LoadedEncoder, layer: int) -> list[PageImage]:
    """The output of a block after the final norm, and where CLS looks in that block."""
    output, _ = forward(loaded, [image.pixels for image in batch], layers=[layer - 1, layer])
    before, after = output.packed_selected_hidden_states or ()
    with torch.inference_mode():
        maps = output.to_maps(loaded.encoder.norm(after))
    attentions = cls_attention(loaded, output, before, layer - 1)
    return [
        PageImage(image.path.name, image.shown, features.permute(1, 2, 0).float().cpu(), attention)
        for image, features, attention in zip(batch, maps, attentions, strict=True)
        if image.shown is not None
    ]
