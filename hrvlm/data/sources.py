"""Rows of training data: files, the `datasets` library, drawn text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..files import json_fault
from ..images.fetch import is_text_image, unwrapped
from .config import FineVision, JsonL, Parquet, SourceConfig, Synthetic
from .rows import Row, plain_row


class Source(Protocol):
    """Rows in an order that depends on nothing but the arguments."""

    name: str

    def rows(self, seed: int, epoch: int, shard: int, shards: int) -> Iterator[tuple[str, Row]]:
        """One pass over every `shards`-th row, from row `shard` on: (name of the row, row)."""
        ...


def open_source(config: SourceConfig, *, indexed: bool = False) -> Any:
    """A source of rows.

    Args:
        config: Which.
        indexed: Whether it must have a length and rows by index, as for evaluation.

    Raises:
        ValueError: there are no rows, or no end where `indexed`.
        OSError: there is no such file or dataset.
    """
    if isinstance(config, Synthetic):
        source = SyntheticSource(
            seed=config.seed, start=config.start, count=config.limit, **config.options
        )
        if indexed:
            len(source)
        return source
    path = Path(config.path)
    root = Path(config.image_root) if config.image_root is not None else None
    if isinstance(config, JsonL):
        rows: Any = JsonLines(path)
        root = path.parent if root is None else root
    else:
        rows = _dataset(config)
    if isinstance(config, JsonL) or not config.streaming:
        if config.limit is not None:
            rows = _First(rows, config.limit)
        return RowSource(str(config.path), rows, root, shuffle=config.shuffle)
    if config.limit is not None:
        rows = rows.take(config.limit)
    if indexed:
        if config.limit is None:
            raise ValueError(f"{config.path}: streamed evaluation data needs a `limit`")
        return RowSource(str(config.path), list(rows), root)
    return StreamSource(str(config.path), rows, root, config.buffer if config.shuffle else 0)


def _dataset(config: FineVision | Parquet) -> Any:
    """A data set of the `datasets` library whose images are not decoded.

    A corrupt image is then one that this package fails to open, which it reports.
    """
    if find_spec("datasets") is None:
        raise ValueError(f"{config.path}: the library `datasets` is missing: pip install datasets")
    import datasets

    path = Path(config.path)
    rows: Any
    if isinstance(config, FineVision) and path.is_file():
        raise ValueError(
            f"{path}: a file; of files, JSON lines (.jsonl) and Parquet (.parquet) are read, each "
            "by its own kind of source"
        )
    if isinstance(config, Parquet):
        rows = datasets.load_dataset(
            "parquet", data_files=config.path, split="train", streaming=config.streaming
        )
    elif (path / "state.json").is_file():
        rows = datasets.load_from_disk(config.path)
        rows = rows.to_iterable_dataset() if config.streaming else rows
    else:
        rows = datasets.load_dataset(
            config.path, config.name, split=config.split, streaming=config.streaming
        )
    if config.streaming:
        return rows.decode(False)
    for name, feature in rows.features.items():
        if name == "images":
            rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
        elif isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


class _First:
    """The first rows of a sequence."""

    def __init__(self, rows: Any, count: int):
        self.rows, self.count = rows, min(count, len(rows))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class RowSource:
    """Rows by index.

    Args:
        name: For the report.
        rows: A sequence of rows.
        image_root: What relative paths of images are relative to.
        shuffle: Whether a pass is in a new random order.
    """

    def __init__(
        self, name: str, rows: Any, image_root: Path | None = None, *, shuffle: bool = True
    ):
        self.name, self._rows, self.image_root, self.shuffle = name, rows, image_root, shuffle
        if not len(rows):
            raise ValueError(f"{name}: it has no rows")

    def __len__(self) -> int:
        """Rows."""
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """Name of the row, and the row."""
        return f"{self.name}, row {index}", _located(self._rows[index], self.image_root)

    def rows(self, seed: int, epoch: int, shard: int, shards: int) -> Iterator[tuple[str, Row]]:
        """See :class:`Source`."""
        order: Sequence[int] = range(len(self))
        if self.shuffle:
            order = np.random.default_rng([seed, epoch]).permutation(len(self)).tolist()
        for index in order[shard::shards]:
            yield self[index]


class StreamSource:
    """Rows of a streamed data set of the `datasets` library.

    Args:
        name: For the report.
        stream: ``datasets.IterableDataset``.
        image_root: What relative paths of images are relative to.
        shuffle: Rows among which one is drawn, with the order of the files shuffled; 0 for the
            order of the files.
    """

    def __init__(self, name: str, stream: Any, image_root: Path | None = None, shuffle: int = 0):
        self.name, self._stream, self.image_root, self.shuffle = name, stream, image_root, shuffle

    def rows(self, seed: int, epoch: int, shard: int, shards: int) -> Iterator[tuple[str, Row]]:
        """See :class:`Source`; by files where there are enough of them for all shards."""
        stream = self._stream
        if self.shuffle:
            stream = stream.shuffle(seed=seed, buffer_size=self.shuffle)
            stream.set_epoch(epoch)
        own_files = stream.num_shards >= shards
        if own_files:
            stream = stream.shard(num_shards=shards, index=shard)
        # In batches of one: a plain loop would divide the stream among the workers once more.
        for i, batch in enumerate(stream.iter(batch_size=1)):
            if own_files or i % shards == shard:
                row = {name: values[0] for name, values in batch.items()}
                where = f"shard {shard} of {shards}, pass {epoch}, row {i}"
                yield f"{self.name}, {where}", _located(row, self.image_root)


class SyntheticSource:
    """Pictures of text, drawn as they are asked for: see :mod:`hrvlm.drawn_text.drawing`.

    Args:
        name: For the report.
        seed: Of the supply.
        start: Index of the first picture.
        count: Pictures in a pass; None for no end.
        **options: Of :class:`~hrvlm.drawn_text.drawing.RenderOptions`.

    Raises:
        ValueError: an option is unknown or wrong.
    """

    def __init__(
        self,
        name: str = "synthetic",
        seed: int = 0,
        start: int = 0,
        count: int | None = None,
        **options: Any,
    ):
        from ..drawn_text.drawing import RenderOptions

        try:
            RenderOptions(**options)  # refuses wrong ones now
        except TypeError as error:
            raise ValueError(f"{name}: {error}") from error
        self.name, self.seed, self.start, self.count = name, seed, start, count
        self.options = options

    def __len__(self) -> int:
        """Pictures.

        Raises:
            ValueError: there is no end.
        """
        if self.count is None:
            raise ValueError(f"{self.name}: it has no end; give it a `count`")
        return self.count

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """Name of the row, and the row."""
        from ..drawn_text.drawing import text_images

        start = self.start + index
        row = next(text_images(self.seed, start, 1, **self.options))
        return f"{self.name}, row {start}", row

    def rows(self, seed: int, epoch: int, shard: int, shards: int) -> Iterator[tuple[str, Row]]:
        """See :class:`Source`; always in order, and the same in each pass."""
        index = shard
        while self.count is None or index < self.count:
            yield self[index]
            index += shards


class JsonLines(Sequence[Any]):
    """The rows of a JSONL file, read when asked for: only their places are kept in memory."""

    def __init__(self, path: Path):
        self.path = path
        places, place = [], 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    places.append((place, number))
                place += len(line)
        self._places = np.array(places, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        """Rows."""
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        """A row, or what is wrong with its line, which is raised by who uses the row."""
        place, number = self._places[index]
        with open(self.path, "rb") as file:
            file.seek(int(place))
            line = file.readline()
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            return ValueError(f"line {number}: {json_fault(error)}")


def _located(row: Any, root: Path | None) -> Any:
    """The row with the paths of its images below `root`; a row of no known form as it is."""
    if root is None:
        return row
    try:
        row = plain_row(row)
    except ValueError:  # which who uses the row meets again
        return row

    def below(image: Any) -> Any:
        image = unwrapped(image)
        if not isinstance(image, str) or (is_text_image(image) and not _is_file(root / image)):
            return image
        return root / image

    found = dict(row)
    for name in ("images", "image"):
        value = row.get(name)
        if isinstance(value, list):
            found[name] = [below(image) for image in value]
        elif name == "image" and value is not None:
            found[name] = below(value)
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # base64 is no name of a file
        return False
