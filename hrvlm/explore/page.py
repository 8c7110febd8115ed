"""Write the page: pictures, features, style and script in one HTML file.

The parts are in ``hrvlm/assets/explore``. The file loads nothing, and its Content-Security-Policy
lets it run and look like what was written here alone: a name with markup in it stays a name.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import __version__
from ..files import write_text
from ..inference.pictures import HEAT_STOPS, pca_colors
from .reduction import COMPONENTS, Reduced, reduce_features

SHOWN_SIDE = 1024  # longest side of a picture in the page
_ASSETS = Path(__file__).parents[1] / "assets" / "explore"
_SCRIPTS = ("data", "similarity", "matches", "colors", "tiles", "lines", "main")  # in this order
_PICTURES, _LEAST, _MOST = 3_400_000, 60_000, 700_000  # bytes of all pictures, and of one
_QUALITIES = (84, 68, 45)


@dataclass(frozen=True)
class PageImage:
    """An image of a page.

    Attributes:
        name: What it is called there; any text.
        picture: What it looks like, upright.
        features: ``[hp, wp, C]``, of each patch; any floating dtype, one C for all images.
        attention: ``[hp, wp]``, weights of CLS over the patches; all images have them, or none.
        note: Stands beside the name, such as a score.
    """

    name: str
    picture: Image.Image
    features: Tensor
    attention: Tensor | None = None
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A page that was written.

    Attributes:
        path: The file.
        bytes: Its size.
        reduced: What became of the features.
    """

    path: Path
    bytes: int
    reduced: Reduced


def write_page(
    path: str | PathLike[str],
    images: Sequence[PageImage],
    *,
    title: str,
    about: str = "",
    start: tuple[int, int, int] | None = None,
    components: int = COMPONENTS,
) -> Page:
    """Write a page that shows how alike the patches of images are.

    Whoever reads it clicks a patch of any image, and sees the cosine similarity of its feature with
    those of all patches of all images, the principal components as colours, CLS attention if there
    is some, and which patches of two images match best. The file is whole or not there.

    Args:
        path: The file; one that exists is replaced.
        images: In the order of the page.
        title: Its heading.
        about: A line below it, such as the model.
        start: The patch that is chosen when it is opened: image, row, column. Default: where CLS
            looks in the first image, or its middle.
        components: Principal components that are kept; see :mod:`hrvlm.explore.reduction`.

    Raises:
        ValueError: there are no images, or the features or attention of one do not fit (it is
            named).
        OSError: the file can't be written.
    """
    _check(images, start)
    reduced = reduce_features(
        torch.cat([image.features.detach().float().cpu().flatten(0, 1) for image in images]),
        components,
    )
    grids = [tuple(image.features.shape[:2]) for image in images]
    each = [rows * columns for rows, columns in grids]
    maps = [
        own.T.unflatten(1, grid)
        for own, grid in zip(reduced.coordinates().split(each), grids, strict=True)
    ]
    limit = min(_MOST, max(_LEAST, _PICTURES // len(images)))
    data = {
        "about": _text(about),
        "width": reduced.width,
        "patches": sum(each),
        "components": len(reduced.scales),
        "scales": reduced.scales.tolist(),
        "varianceKept": reduced.variance_kept,
        "largestError": reduced.largest_error,
        "compared": reduced.compared,
        "heat": HEAT_STOPS,
        "start": start,
        "images": [
            {
                "name": _text(image.name),
                "note": _text(image.note),
                "rows": rows,
                "columns": columns,
                "aspect": image.picture.width / image.picture.height,
                "pixels": image.picture.width,
                "picture": f"data:image/webp;base64,{_base64(_webp(image.picture, limit))}",
                "values": _base64(values),
                "colors": _base64((colors.permute(1, 2, 0) * 255).round().to(torch.uint8)),
                "attention": None if image.attention is None else _base64(image.attention.float()),
            }
            for image, (rows, columns), values, colors in zip(
                images, grids, reduced.values.split(each), pca_colors(maps, joint=True), strict=True
            )
        ],
    }
    text = _fill(_text(title), data)
    write_text(Path(path), text)
    return Page(Path(path), len(text.encode()), reduced)


def _check(images: Sequence[PageImage], start: tuple[int, int, int] | None) -> None:
    if not images:
        raise ValueError("images: a page needs at least one")
    width, with_attention = images[0].features.shape[-1:], images[0].attention is not None
    for i, image in enumerate(images):
        where, shape = f"image {i} ({_text(image.name)})", tuple(image.features.shape)
        if len(shape) != 3 or 0 in shape or shape[-1:] != width:
            raise ValueError(
                f"{where}: features must be [hp, wp, C], C as in the first image, got {list(shape)}"
            )
        if (image.attention is not None) != with_attention:
            raise ValueError(f"{where}: all images have attention, or none")
        if image.attention is not None and tuple(image.attention.shape) != shape[:2]:
            raise ValueError(
                f"{where}: attention must be {list(shape[:2])}, as the features are, "
                f"got {list(image.attention.shape)}"
            )
        if not image.features.isfinite().all():
            raise ValueError(f"{where}: features are not finite")
    if start is not None:
        index, row, column = start
        inside = 0 <= index < len(images)
        rows, columns = images[index].features.shape[:2] if inside else (0, 0)
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(f"start: there is no patch {row}, {column} of image {index}")


def _fill(title: str, data: dict[str, Any]) -> str:
    style = (_ASSETS / "page.css").read_text(encoding="utf-8")
    script = "\n".join((_ASSETS / f"{s}.js").read_text(encoding="utf-8") for s in _SCRIPTS)
    script = f'"use strict";\n{script}'
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )
    parts = {
        "title": html.escape(title),
        "version": __version__,
        "policy": policy,
        "style": style,
        "script": script,
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    }
    template = (_ASSETS / "page.html").read_text(encoding="utf-8")
    # All at once: what stands in a part is never taken for the place of another.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _text(text: str) -> str:
    """Without the bytes of a file's name that are no characters."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _base64(content: bytes | Tensor) -> str:
    if isinstance(content, Tensor):
        content = content.detach().cpu().contiguous().numpy().tobytes()
    return base64.b64encode(content).decode()


def _webp(picture: Image.Image, limit: int) -> bytes:
    """A picture of at most `limit` bytes: coarser, then smaller, until it is."""
    picture = picture.convert("RGB")
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    while True:
        for quality in _QUALITIES:
            file = io.BytesIO()
            picture.save(file, "WEBP", quality=quality, method=2)
            if file.tell() <= limit:
                return file.getvalue()
        picture = picture.reduce(2)
