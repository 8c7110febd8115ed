"""Images of a run that are like given ones: the command behind `hrvlm search`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..files import write_picture
from ..images.intake import load_image
from .config import EmbedConfig, Manifest, need_extra
from .entries import Entry
from .index import Hit, Index, entry_of, open_index
from .rows import Row
from .sources import Source, open_source
from .stages import Run, decode, encode
from .store import MANIFEST, Store

if TYPE_CHECKING:
    from .model import FeatureModel

_CELL, _TEXT, _GAP = 224, 34, 8  # pixels


@dataclass(frozen=True)
class Found:
    """What is near one image.

    Attributes:
        query: Its file, or what it was called.
        hits: Nearest first.
    """

    query: Path | str
    hits: list[Hit]


@dataclass(frozen=True)
class SearchResult:
    """What a search gave.

    Attributes:
        found: For each query.
        by: The feature that was compared.
        index: What was searched.
        random_weights: The features mean nothing.
        sheet: Picture of the hits, if one was drawn.
    """

    found: list[Found]
    by: str
    index: Index
    random_weights: bool
    sheet: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "by": self.by,
            "rows": self.index.rows,
            "exact": self.index.exact,
            "recall": self.index.recall,
            "lists": list(self.index.lists),
            "weights": "random" if self.random_weights else "pretrained",
            "sheet": self.sheet and str(self.sheet),
            "queries": [
                {
                    "image": str(found.query),
                    "hits": [{"id": h.id, "row": h.row, "score": h.score} for h in found.hits],
                }
                for found in self.found
            ],
        }


class Searcher:
    """A run that can be searched, with the encoder that made it.

    Args:
        index: Folder of the run.
        by: ``cls`` or ``mean``; None for ``cls`` where the encoder has one.
        exact: Compare every row, however many there are.
        options: Fields of the `EmbedConfig` to be other than they were: where the input or the
            model is now, the device, the backend.

    Raises:
        ValueError: there is no complete run, or the model is not the one that made it.
    """

    def __init__(self, index: str, by: str | None = None, *, exact: bool = False, **options: Any):
        need_extra("pyarrow", "faiss")
        from .model import FeatureModel

        self._store = Store(index)
        manifest = self._store.read_manifest()
        if manifest is None:
            raise ValueError(f"{index}: no {MANIFEST}; hrvlm embed makes such a folder")
        self.manifest: Manifest = manifest
        self.by = by or ("cls" if manifest.facts.num_prefix_tokens else "mean")
        self.index = open_index(self._store, manifest, self.by, exact=exact)
        given = {name: value for name, value in options.items() if value is not None}
        config = EmbedConfig(**{**manifest.asked, "input": manifest.input, "out": index, **given})
        self.run = Run(config, manifest)
        self.model: FeatureModel = FeatureModel(config, manifest.facts.dtype)
        weights = self.model.facts().weights
        if weights != manifest.facts.weights:
            raise ValueError(
                f"model {config.model!r}: its weights are not those that made {index} "
                f"({manifest.facts.name}): --model names the right one"
            )

    def search(self, queries: Sequence[Path], top: int) -> list[Found]:
        """The nearest rows of each image.

        Raises:
            ValueError: an image can't be read.
        """
        rows = self._encoded(_Files(queries), [Entry(str(path), "", 0, 0) for path in queries])
        vectors = np.stack([(row.features or {})[self.by] for row in rows])
        hits = self.index.search(vectors, top)
        return [Found(path, near) for path, near in zip(queries, hits, strict=True)]

    def _encoded(self, source: Any, entries: Sequence[Entry]) -> list[Row]:
        rows = decode(source, entries, 0, self.run)
        encode(rows, self.model, self.run)
        for row in rows:
            if row.error is not None:
                raise ValueError(row.error)
        return rows

    def pictures(self, hits: Sequence[Hit]) -> list[Image.Image]:
        """The images of hits.

        Raises:
            ValueError: one can't be read any more.
        """
        source: Source = open_source(self.run.config)
        entries = sorted(
            {hit.row: entry_of(self._store, self.manifest, hit.row) for hit in hits}.items()
        )
        images = {}
        for row, entry in entries:  # one by one: tables want theirs in order and side by side
            (given,) = source.images([entry])
            if isinstance(given, BaseException):
                raise ValueError(f"{entry.id}: {given}") from given
            images[row] = load_image(given, name=entry.id)
        return [images[hit.row] for hit in hits]

    def write_sheet(self, path: Path, found: Sequence[Found]) -> None:
        """A contact sheet: a row for each query, the query first.

        Raises:
            ValueError: an image can't be read any more, or the ending is of no known format.
            OSError: the file can't be written.
        """
        columns = 1 + max(len(one.hits) for one in found)
        step_x, step_y = _CELL + _GAP, _CELL + _TEXT + _GAP
        page = Image.new("RGB", (columns * step_x + _GAP, len(found) * step_y + _GAP), "white")
        draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
        for line, one in enumerate(found):
            images = [load_image(one.query), *self.pictures(one.hits)]
            texts = [f"query\n{Path(one.query).name}"]
            texts += [f"{i}: {hit.score:.3f}\n{hit.id}" for i, hit in enumerate(one.hits, 1)]
            for column, (image, text) in enumerate(zip(images, texts, strict=True)):
                left, top = _GAP + column * step_x, _GAP + line * step_y
                image.thumbnail((_CELL, _CELL))
                page.paste(image, (left + (_CELL - image.width) // 2, top + _CELL - image.height))
                lines = "\n".join(_fitted(part, draw, font) for part in text.split("\n"))
                draw.multiline_text((left, top + _CELL + 2), lines, fill="black", font=font)
        kind = Image.registered_extensions().get(path.suffix.lower())
        if kind not in Image.SAVE:  # Pillow reads more formats than it writes
            raise ValueError(f"{path}: no picture by its ending; .png and .jpg are")
        write_picture(path, page, kind)

    def patches_of(self, found: Found) -> Iterator[tuple[str, Image.Image, Any, str]]:
        """Of the query and its hits: name, picture, patch features [hp, wp, C] and score."""
        import torch

        config = replace(self.run.config, keep=("patches",), stored="bfloat16")
        run, model = Run(config, self.manifest), self.model.keeping(config)
        images = [load_image(found.query), *self.pictures(found.hits)]
        names = [Path(found.query).name, *(hit.id for hit in found.hits)]
        notes = ["query", *(f"{hit.score:.3f}" for hit in found.hits)]
        rows = decode(_Files(images), [Entry(name, "", 0, 0) for name in names], 0, run)
        encode(rows, model, run)
        for row, image, note in zip(rows, images, notes, strict=True):
            if row.features is None or row.grid is None:
                raise ValueError(row.error)
            flat = torch.frombuffer(bytearray(row.features["patches"]), dtype=torch.bfloat16)
            image.thumbnail((1024, 1024))
            yield row.id, image, flat.view(*row.grid, -1).float(), note


class _Files:
    """Images at hand as a source."""

    def __init__(self, images: Sequence[Any]):
        self._images = images

    def images(self, entries: Sequence[Entry]) -> Iterator[Any]:
        yield from self._images


def _fitted(text: str, draw: ImageDraw.ImageDraw, font: Any) -> str:
    """The end of a text that is too long for its cell: what tells names apart."""
    text = text.encode("utf-8", "replace").decode()
    while len(text) > 4 and draw.textlength(text, font=font) > _CELL:
        text = "..." + text[4:]
    return text
