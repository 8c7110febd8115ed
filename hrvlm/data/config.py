"""Where rows come from: the section ``data`` of a training file, and what evaluation reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..files import as_mapping, check_names
from ..images.geometry import positive_int, positive_number, true_or_false


@dataclass(frozen=True)
class _Table:
    """Rows with ``images`` and ``texts``, as FineVision has them.

    Attributes:
        path: Where they are.
        streaming: Read while training, instead of downloading everything before.
        shuffle: Whether each pass is in a new order; in a stream, among `buffer` rows.
        buffer: Rows that a stream keeps to draw from.
        image_root: What relative paths of images are relative to.
        limit: Use only the first so many rows.
        weight: How often this source is drawn, relative to the others.
    """

    path: str
    streaming: bool = False
    shuffle: bool = True
    buffer: int = 1000
    image_root: str | None = None
    limit: int | None = None
    weight: float | None = None


@dataclass(frozen=True)
class FineVision(_Table):
    """Rows of the `datasets` library.

    Attributes:
        path: Hub id, a directory that `datasets` can load, or one by ``Dataset.save_to_disk``.
        name: Configuration of the dataset.
        split: Split of the dataset.
    """

    name: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class Parquet(_Table):
    """Parquet files; the path is a file, or a pattern as ``data/*.parquet``."""


@dataclass(frozen=True)
class JsonL:
    """A file with a JSON object a line; what else it has is as of the others.

    Attributes:
        path: The file.
        image_root: Folder of the images; default: that of the file.
    """

    path: str
    image_root: str | None = None
    shuffle: bool = True
    limit: int | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Synthetic:
    """Pictures of text.

    Attributes:
        seed: Of the supply.
        start: Index of the first picture.
        limit: Pictures in all; None for no end.
        weight: How often it is drawn, relative to the others.
        options: Of :class:`hrvlm.drawn_text.drawing.RenderOptions`.
    """

    seed: int = 0
    start: int = 0
    limit: int | None = None
    weight: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


SOURCES: dict[str, type] = {
    "finevision": FineVision,
    "jsonl": JsonL,
    "parquet": Parquet,
    "synthetic": Synthetic,
}
SourceConfig = FineVision | JsonL | Parquet | Synthetic


@dataclass(frozen=True)
class DataConfig:
    """Sources, and what becomes of their samples.

    Attributes:
        train: Sources to train on.
        eval: Sources to evaluate on; may be none.
        max_sample_length: Longer samples are left out, in tokens; default: the context.
        sequence_packing: Length of rows that samples are packed into, in tokens; None for one
            sample a row.
    """

    train: tuple[SourceConfig, ...]
    eval: tuple[SourceConfig, ...] = ()
    max_sample_length: int | None = None
    sequence_packing: int | None = None
    fetch: bool = False


def data_config(section: Any) -> DataConfig:
    """From plain data.

    Raises:
        ValueError: a name is unknown (the nearest one is named) or missing; a value is wrong.
    """
    section = dict(as_mapping(section, "data"))
    check_names(section, [f.name for f in dataclasses.fields(DataConfig)], "data.")
    for name in ("train", "eval"):
        given = section.get(name)
        given = [] if given is None else [given] if isinstance(given, Mapping) else given
        if not isinstance(given, list):
            raise ValueError(f"data.{name}: expected a source or a list of them, got {given!r}")
        if name == "train" and not given:
            raise ValueError("data.train is missing: one source, or a list of them")
        section[name] = tuple(_source(s, f"data.{name}[{i}]") for i, s in enumerate(given))
    for name in ("max_sample_length", "sequence_packing"):
        if (value := section.get(name)) is not None:
            positive_int(f"data.{name}", value)
    true_or_false("data.fetch", section.get("fetch", False))
    return DataConfig(**section)


def _source(section: Any, where: str) -> SourceConfig:
    section = dict(as_mapping(section, where))
    kind = section.pop("kind", None)
    if not isinstance(kind, str) or kind not in SOURCES:
        raise ValueError(f"{where}.kind={kind!r}: expected one of {sorted(SOURCES)}")
    fields = dataclasses.fields(SOURCES[kind])
    names = [f.name for f in fields]
    if kind == "synthetic":  # what is drawn stands beside the rest, without a section of its own
        drawn = {name: section.pop(name) for name in [*section] if name not in names}
        section["options"] = as_mapping(section.get("options", {}), f"{where}.options") | drawn
    check_names(section, names, f"{where}.")
    if "path" in names and not isinstance(section.get("path"), str):
        raise ValueError(f"{where}.path={section.get('path')!r}: expected a path")
    weight, limit = section.get("weight"), section.get("limit")
    if weight is not None:
        positive_number(f"{where}.weight", weight)
    if limit is not None:
        positive_int(f"{where}.limit", limit)
    make: Callable[..., SourceConfig] = SOURCES[kind]
    return make(**section)
