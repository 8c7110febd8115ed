"""Where images come from: every kind of input as a list of entries that has always the same order.

An entry says where one image is; its id is that place in words, and does not depend on where the
input lies: the path below the folder, ``shard.tar/name.jpg``, ``table.parquet:17``.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple, Protocol

from ..images.fetch import is_text_image, is_url, readable, unwrapped
from ..images.formats import ImageError, image_endings
from .config import EmbedConfig
from .store import filesystem, is_local

DATASETS = "datasets:"
_COLUMNS = ("image", "images", "path", "file_name", "jpg", "jpeg", "png", "webp", "img", "url")


class Entry(NamedTuple):
    """Where an image is.

    Attributes:
        id: In words.
        file: Below the root of the source.
        place: In the file: a byte, or a row; 0 for a whole file.
        size: Of the image in bytes, or of the file that it is in.
    """

    id: str
    file: str
    place: int
    size: int


class Opener(Protocol):
    """What opens the images of entries."""

    def images(self, entries: Sequence[Entry]) -> Iterator[Any]:
        """What `load_image` takes of each, or the error of reading it."""
        ...


class Source(Opener, Protocol):
    """What lists them, too; `left_out` are names of files that are no images."""

    left_out: Sequence[str]

    def entries(self) -> list[Entry]:
        """All, always in the same order."""
        ...


class Images:
    """Files of images: those in a folder, at any depth, or those that a pattern finds.

    Args:
        root: The folder.
        names: Files below it with their sizes.
        fs: Their file system.
    """

    def __init__(self, root: str, names: Mapping[str, int], fs: Any):
        self._root, self._fs = root, fs
        endings = image_endings()
        self._names = {n: s for n, s in names.items() if n[n.rfind(".") :].lower() in endings}
        self.left_out: Sequence[str] = sorted(set(names) - set(self._names))

    def entries(self) -> list[Entry]:
        """Sorted by name."""
        return [Entry(name, name, 0, size) for name, size in sorted(self._names.items())]

    def images(self, entries: Sequence[Entry]) -> Iterator[Any]:
        """What `load_image` takes of each, or the error of reading it."""
        paths = [f"{self._root}/{entry.file}" for entry in entries]
        if is_local(self._fs):
            yield from paths
            return
        found = self._fs.cat(paths, on_error="return")  # together: a store answers slowly
        found = found if isinstance(found, dict) else {paths[0]: found}
        yield from (found[path] for path in paths)


class _Table:
    """Rows of tables, of which a column holds an image."""

    left_out: Sequence[str] = ()

    def __init__(self, root: str, names: Mapping[str, int], fs: Any, config: EmbedConfig):
        self._root, self._names, self._fs = root, names, fs
        self._column, self._fetch = config.image_column, config.fetch

    def _of_row(self, row: Any, label: str) -> Any:
        try:
            return self._image(row, label)
        except (ValueError, OSError) as error:
            return error

    def _image(self, row: Any, label: str) -> Any:
        value = row
        if isinstance(row, Mapping):
            name = self._column or next((c for c in _COLUMNS if row.get(c) is not None), None)
            if name is None or row.get(name) is None:
                columns = ", ".join(map(str, row)) or "none"
                raise ImageError(f"no image in column {name or _COLUMNS[0]!r}; columns: {columns}")
            value = row[name]
        if isinstance(value, list):
            if len(value) != 1:
                raise ImageError(f"{len(value)} images in a row, expected one")
            value = value[0]
        value = unwrapped(value)
        if not isinstance(value, str):
            return value
        if is_url(value) or (is_text_image(value) and not self._exists(value)):
            return readable(value, label, fetch=self._fetch)
        path = value if value.startswith("/") else f"{self._root}/{value}"
        if "://" in value:
            raise ImageError(f"{value!r:.100}: of addresses only http and https are fetched")
        return path if is_local(self._fs) else self._fs.cat_file(path)

    def _exists(self, value: str) -> bool:
        try:
            return len(value) < 1024 and self._fs.exists(f"{self._root}/{value}")
        except (OSError, ValueError):
            return False


class JsonLines(_Table):
    """A JSON object, or a path, a line."""

    def entries(self) -> list[Entry]:
        """In the order of the files' names and of their lines."""
        found = []
        for name in sorted(self._names):
            place = 0
            with self._fs.open(f"{self._root}/{name}", "rb") as file:
                for number, line in enumerate(file):
                    if line.strip():
                        found.append(Entry(f"{name}:{number}", name, place, len(line)))
                    place += len(line)
        return found

    def images(self, entries: Sequence[Entry]) -> Iterator[Any]:
        """See :meth:`Images.images`."""
        for name, group in groupby(entries, lambda entry: entry.file):
            with self._fs.open(f"{self._root}/{name}", "rb") as file:
                for entry in group:
                    file.seek(entry.place)
                    line = file.read(entry.size)
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        yield ImageError(f"no JSON: {error}")
                    else:
                        yield self._of_row(row, entry.id)


class ParquetTables(_Table):
    """Rows of parquet files."""

    def entries(self) -> list[Entry]:
        """In the order of the files' names and of their rows."""
        import pyarrow.parquet as pq

        found = []
        for name, size in sorted(self._names.items()):
            with self._fs.open(f"{self._root}/{name}", "rb") as file:
                rows = pq.read_metadata(file).num_rows
            found += [Entry(f"{name}:{row}", name, row, size) for row in range(rows)]
        return found

    def images(self, entries: Sequence[Entry]) -> Iterator[Any]:
        """See :meth:`Images.images`; a row group is read at a time, and no other column."""
        import pyarrow.parquet as pq

        for name, group in groupby(entries, lambda entry: entry.file):
            wanted = [entry.place for entry in group]
            with self._fs.open(f"{self._root}/{name}", "rb") as file:
                table = pq.ParquetFile(file)
                names = table.schema_arrow.names
                columns = [self._column] if self._column else [c for c in _COLUMNS if c in names]
                first = 0
                for i in range(table.num_row_groups):
                    rows = table.metadata.row_group(i).num_rows
                    if first + rows > wanted[0] and first <= wanted[-1]:
                        low, high = max(wanted[0] - first, 0), min(wanted[-1] + 1 - first, rows)
                        read = table.read_row_group(i, columns=columns).slice(low, high - low)
                        for j, row in enumerate(read.to_pylist()):
                            yield self._of_row(row, f"{name}:{first + low + j}")
                    first += rows


class WebDataset:
    """Images inside uncompressed tar files."""

    left_out: Sequence[str] = ()

    def __init__(self, root: str, names: Mapping[str, int], fs: Any):
        self._root, self._names, self._fs = root, names, fs

    def entries(self) -> list[Entry]:
        """In the order of the files' names, then as they lie in them; images by their endings."""
        endings, found = image_endings(), []
        for name in sorted(self._names):
            with self._fs.open(f"{self._root}/{name}", "rb") as file:
                try:
                    with tarfile.open(fileobj=file, mode="r:") as archive:
                        members = archive.getmembers()
                except tarfile.TarError as error:
                    raise ValueError(f"{name}: no uncompressed tar file: {error}") from error
            for member in members:
                if member.isfile() and member.name[member.name.rfind(".") :].lower() in endings:
                    place = member.offset_data
                    found.append(Entry(f"{name}/{member.name}", name, place, member.size))
        return found

    def images(self, entries: Sequence[Entry]) -> Iterator[Any]:
        """See :meth:`Images.images`."""
        for name, group in groupby(entries, lambda entry: entry.file):
            with self._fs.open(f"{self._root}/{name}", "rb") as file:
                for entry in group:
                    file.seek(entry.place)
                    yield file.read(entry.size)


class HubDataset(_Table):
    """Rows of the `datasets` library, by name or as ``save_to_disk`` left them."""

    def __init__(self, config: EmbedConfig):
        name = config.input.removeprefix(DATASETS)
        super().__init__(name, {}, filesystem(".")[0], config)
        self._rows = _dataset_rows(name, config.split)

    def entries(self) -> list[Entry]:
        """In the order of the data set."""
        return [Entry(str(row), "", row, 0) for row in range(len(self._rows))]

    def images(self, entries: Sequence[Entry]) -> Iterator[Any]:
        """See :meth:`Images.images`."""
        for entry in entries:
            yield self._of_row(self._rows[entry.place], entry.id)


@lru_cache(maxsize=2)
def _dataset_rows(name: str, split: str) -> Any:
    from ..data.config import FineVision
    from ..data.sources import open_source as open_rows

    source = open_rows(FineVision(path=name, split=split, shuffle=False), indexed=True)
    return _Indexed(source)


class _Indexed:
    """Rows by index, without the names that training gives them."""

    def __init__(self, source: Any):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        return self._source[index][1]


def open_source(config: EmbedConfig) -> Source:
    """The images of an input.

    Raises:
        ValueError: the input is of no known kind, or mixes them.
        FileNotFoundError: there is no such file.
    """
    if config.input.startswith(DATASETS):
        return HubDataset(config)
    root, names, fs = _files(config.input)
    endings = {name[name.rfind(".") :].lower() for name in names}
    tables = endings & {".jsonl", ".parquet", ".tar"}
    if not tables or fs.isdir(filesystem(config.input)[1]):
        source = Images(root, names, fs)
        if not source.entries():
            hint = f"; for its {', '.join(sorted(tables))} files give a pattern" if tables else ""
            raise ValueError(f"{config.input}: no images by their endings{hint}")
        return source
    if len(endings) > 1:
        raise ValueError(
            f"{config.input}: files of different kinds, {', '.join(sorted(endings))}; "
            "give a pattern that finds one kind"
        )
    (ending,) = tables
    if ending == ".tar":
        return WebDataset(root, names, fs)
    return (JsonLines if ending == ".jsonl" else ParquetTables)(root, names, fs, config)


def _files(address: str) -> tuple[str, dict[str, int], Any]:
    """The folder of an input, the files below it with their sizes, and their file system."""
    fs, path = filesystem(address)
    if any(sign in path for sign in "*?["):
        fixed = path[: min(path.index(sign) for sign in "*?[" if sign in path)]
        root = fixed.rpartition("/")[0]
        found = fs.glob(path, detail=True)
    elif fs.isdir(path):
        root, found = path, fs.find(path, detail=True)
    elif fs.isfile(path):
        root, found = path.rpartition("/")[0], {path: fs.info(path)}
    else:
        raise FileNotFoundError(
            f"{address}: no such file, folder or pattern (a data set of the `datasets` library is "
            f"{DATASETS}NAME)"
        )
    names = {
        name[len(root) + 1 :]: int(info.get("size") or 0)
        for name, info in found.items()
        if info.get("type") == "file" or info.get("islink")  # no folders, and no pipes, which wait
    }
    if not names:
        raise FileNotFoundError(f"{address}: no files")
    return root, names, fs


def list_images(source: Source) -> list[Entry]:
    """All entries, with ids that stand once: a second "a.jpg" of a tar file is "a.jpg#2"."""
    seen: dict[str, int] = {}
    found = []
    for entry in source.entries():
        count = seen[entry.id] = seen.get(entry.id, 0) + 1
        found.append(entry if count == 1 else entry._replace(id=f"{entry.id}#{count}"))
    return found


def digest_of(entries: Iterable[Entry]) -> str:
    """Of all that the entries say: equal for equal inputs, wherever they lie."""
    digest = hashlib.blake2b(digest_size=16)
    for entry in entries:
        digest.update(repr(tuple(entry)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
