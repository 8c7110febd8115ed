"""Kinds of input: how the images in their files are listed, and how they are read.

A file that is no such file at all is refused when it is listed, by its name. What is damaged behind
its beginning is an error of the images that it concerns: of a row, of a row group, of a member.
"""

from __future__ import annotations

import json
import os
import posixpath
import tarfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any

from ..files import json_fault
from ..images.fetch import is_text_image, is_url, readable, unwrapped
from ..images.formats import ImageError, image_endings
from .config import EmbedConfig
from .entries import Entry, apart, parquet_named
from .store import filesystem, is_local

DATASETS = "datasets:"
_COLUMNS = ("image", "images", "path", "file_name", "jpg", "jpeg", "png", "webp", "img", "url")


class Kind:
    """A kind of file.

    Args:
        root: The folder that they lie in.
        fs: Their file system.
        config: Of the run.
    """

    def __init__(self, root: str, fs: Any, config: EmbedConfig):
        self._root, self._fs, self._config = root, fs, config

    def entries(self, names: Mapping[str, int]) -> Iterator[Entry]:
        """Of the files of these names and sizes, always in the same order."""
        for name, size in sorted(names.items()):
            yield from self._listed(name, size)

    def images(self, entries: Sequence[Entry]) -> Iterator[Any]:
        """What `load_image` takes of each, or the error of reading it."""
        for _, group in groupby(entries, lambda entry: entry.file):
            yield from apart(self._read, list(group))

    def _listed(self, name: str, size: int) -> Iterable[Entry]:
        raise NotImplementedError

    def _read(self, entries: Sequence[Entry]) -> Iterator[Any]:
        """Entries of one file."""
        raise NotImplementedError

    def _open(self, name: str) -> Any:
        """A file to be read.

        Raises:
            ValueError: it is a folder, a pipe or a device: reading some of these would wait.
        """
        path = f"{self._root}/{name}"
        if is_local(self._fs) and os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{name}: expected a regular file")
        return self._fs.open(path, "rb")

    def _pieces(self, entries: Sequence[Entry]) -> Iterator[bytes | Exception]:
        """Bytes of one file."""
        with self._open(entries[0].file) as file:
            for entry in entries:
                try:
                    file.seek(entry.place)
                    yield file.read(entry.size)
                except (OSError, ValueError) as error:
                    yield error


class ImageFiles(Kind):
    """A file is an image."""

    def _listed(self, name: str, size: int) -> Iterable[Entry]:
        return [Entry(name, name, 0, size)]

    def images(self, entries: Sequence[Entry]) -> Iterator[Any]:
        """See :meth:`Kind.images`."""
        paths = [f"{self._root}/{entry.file}" for entry in entries]
        if is_local(self._fs):
            yield from paths
        else:  # together: a store answers slowly; and by ranges, for which no name is a pattern
            yield from self._fs.cat_ranges(paths, None, None, on_error="return")


class _Table(Kind):
    """Rows, of which a column holds an image."""

    def _columns(self, there: Sequence[str], where: str) -> list[str]:
        """The columns that may hold it.

        Raises:
            ValueError: there is none.
        """
        column = self._config.image_column
        wanted = [column] if column else list(_COLUMNS)
        if found := [name for name in wanted if name in there]:
            return found
        raise ValueError(
            f"{where}: no column {' or '.join(map(repr, wanted))}; its columns are "
            f"{', '.join(map(repr, there)) or 'none'}: --image-column names the one of the images"
        )

    def _of_row(self, row: Any, label: str) -> Any:
        try:
            return self._image(row, label)
        except Exception as error:
            return error

    def _image(self, row: Any, label: str) -> Any:
        value, column = row, self._config.image_column
        if isinstance(row, Mapping):
            name = column or next((c for c in _COLUMNS if row.get(c) is not None), None)
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
            return readable(value, label, fetch=self._config.fetch)
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

    def _listed(self, name: str, size: int) -> Iterable[Entry]:
        place = 0
        with self._open(name) as file:
            for number, line in enumerate(file):
                if line.strip():
                    yield Entry(f"{name}:{number}", name, place, len(line))
                place += len(line)

    def _read(self, entries: Sequence[Entry]) -> Iterator[Any]:
        for entry, line in zip(entries, self._pieces(entries), strict=True):
            yield line if isinstance(line, Exception) else self._of_line(line, entry.id)

    def _of_line(self, line: bytes, label: str) -> Any:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            return ImageError(json_fault(error))
        return self._of_row(row, label)


class ParquetTables(_Table):
    """Rows of parquet files."""

    def _listed(self, name: str, size: int) -> Iterable[Entry]:
        import pyarrow.parquet as pq

        with self._open(name) as file, parquet_named(name):
            table = pq.ParquetFile(file)
            self._columns(table.schema_arrow.names, name)
            rows = table.metadata.num_rows
        return (Entry(f"{name}:{row}", name, row, size) for row in range(rows))

    def _read(self, entries: Sequence[Entry]) -> Iterator[Any]:
        """A row group at a time, and no other column."""
        import pyarrow.parquet as pq

        name = entries[0].file
        with self._open(name) as file:
            with parquet_named(name):
                table = pq.ParquetFile(file)
                columns = self._columns(table.schema_arrow.names, name)
                sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
            firsts = list(accumulate(sizes, initial=0))

            def of_group(wanted: Sequence[Entry]) -> Iterator[Any]:
                i = group_of(wanted[0])
                with parquet_named(name):
                    group = table.read_row_group(i, columns=columns)
                for entry in wanted:
                    yield self._of_group(group.slice(entry.place - firsts[i], 1), entry.id)

            def group_of(entry: Entry) -> int:
                return bisect_right(firsts, entry.place) - 1

            for _, wanted in groupby(entries, group_of):
                yield from apart(of_group, list(wanted))

    def _of_group(self, one: Any, label: str) -> Any:
        try:
            (row,) = one.to_pylist()
        except ValueError as error:  # text that is none
            return error
        return self._of_row(row, label)


_CUT, _DANGLING, _SPARSE = -1, -2, -3  # sizes of what can't be read
_WORDS = {
    _CUT: "damaged tar file {file!r}: neither a member nor the end at byte {place}; what may "
    "follow is not listed",
    _DANGLING: "a link to what is not in tar file {file!r}",
    _SPARSE: "stored in tar file {file!r} with holes, which are not read",
}


class WebDataset(Kind):
    """Images inside uncompressed tar files, as they lie in them; which are images, endings say."""

    def _listed(self, name: str, size: int) -> Iterable[Entry]:
        endings = image_endings()
        with self._open(name) as file:
            members, end = _members(file, name)
        by_name: dict[str, tarfile.TarInfo] = {}
        for member in members:
            by_name[posixpath.normpath(member.name)] = member
        for member in members:
            if ending_of(member.name) in endings and (member.isfile() or _is_link(member)):
                place, length = _place_of(member, by_name)
                yield Entry(f"{name}/{member.name}", name, place, length)
        if end is not None:
            yield Entry(name, name, end, _CUT)

    def _read(self, entries: Sequence[Entry]) -> Iterator[Any]:
        found = [entry for entry in entries if entry.size not in _WORDS]
        pieces = self._pieces(found) if found else iter(())
        for entry in entries:
            if words := _WORDS.get(entry.size):
                yield ImageError(words.format(file=entry.file, place=entry.place))
            else:
                yield next(pieces)


def _members(file: Any, name: str) -> tuple[list[tarfile.TarInfo], int | None]:
    """What is in a tar file, and the byte from which on it is damaged.

    `tarfile` itself takes any header that is none for the end.

    Raises:
        ValueError: it begins with no header.
    """
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  # the file is the caller's
    except tarfile.TarError as error:
        raise ValueError(f"{name}: no uncompressed tar file: {error}") from error
    members: list[tarfile.TarInfo] = []
    with suppress(tarfile.TarError):
        members.extend(archive)  # one by one: those before an error stay
    end = archive.offset
    file.seek(end)
    return members, None if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE) else end


def _is_link(member: tarfile.TarInfo) -> bool:
    return member.islnk() or member.issym()


def _place_of(member: tarfile.TarInfo, by_name: Mapping[str, tarfile.TarInfo]) -> tuple[int, int]:
    """Its first byte and its size, which are those of what it is a link to."""
    for _ in range(40):  # links to links; more are a circle
        if not _is_link(member):
            break
        folder = "" if member.islnk() else posixpath.dirname(member.name)
        target = by_name.get(posixpath.normpath(posixpath.join(folder, member.linkname)))
        if target is None:
            break
        member = target
    if not member.isfile():
        return member.offset, _DANGLING
    return member.offset_data, _SPARSE if member.issparse() else member.size


class HubDataset(_Table):
    """Rows of the `datasets` library, by name or as ``save_to_disk`` left them."""

    def __init__(self, config: EmbedConfig):
        name = config.input.removeprefix(DATASETS)
        if not name:
            raise ValueError(f"{config.input}: expected {DATASETS}NAME, or {DATASETS}FOLDER")
        super().__init__(name, filesystem(".")[0], config)
        self._rows = _dataset_rows(name, config.split)

    def entries(self, names: Mapping[str, int]) -> Iterator[Entry]:
        """In the order of the data set."""
        self._columns(list(self._rows[0]), self._config.input)
        for row in range(len(self._rows)):
            yield Entry(str(row), "", row, 0)

    def _read(self, entries: Sequence[Entry]) -> Iterator[Any]:
        for entry in entries:
            yield from apart(self._one, [entry])

    def _one(self, entries: Sequence[Entry]) -> Iterator[Any]:
        (entry,) = entries
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


KINDS: Mapping[str, type[Kind]] = {
    ".jsonl": JsonLines,
    ".parquet": ParquetTables,
    ".tar": WebDataset,
}


def ending_of(name: str) -> str:
    """In small letters."""
    return name[name.rfind(".") :].lower()
