"""Where images come from: every kind of input as a list of entries that has always the same order.

An entry says where one image is; its id is that place in words, and does not depend on where the
input lies: the path below the folder, ``shard.tar/name.jpg``, ``table.parquet:17``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol

from ..images.formats import image_endings
from .config import EmbedConfig
from .entries import Entry, with_own_ids
from .kinds import DATASETS, KINDS, HubDataset, ImageFiles, Kind, ending_of
from .store import filesystem, is_local, is_result


class Opener(Protocol):
    """What opens the images of entries."""

    def images(self, entries: Sequence[Entry]) -> Iterator[Any]:
        """What `load_image` takes of each, or the error of reading it."""
        ...


class Source:
    """The images of an input: listed where that is asked for, opened by what a listing says.

    Who only opens them lists nothing: a process that decodes knows its own images alone.

    Args:
        config: Of the run.

    Attributes:
        left_out: Names of files that are no images, once the images are listed.
    """

    def __init__(self, config: EmbedConfig):
        self.left_out: Sequence[str] = ()
        self._config = config
        self._kinds: dict[type[Kind], Kind] = {}
        if config.input.startswith(DATASETS):
            self._kinds[HubDataset] = HubDataset(config)
            return
        self._fs, self._path = filesystem(config.input)
        self._is_folder = self._fs.isdir(self._path)
        self._is_pattern = not self._is_folder and _signs(self._path) != []
        if self._is_pattern and self._fs.isfile(self._path):
            self._is_pattern = False
        fixed = self._path[: min(_signs(self._path))] if self._is_pattern else self._path
        self._root = (fixed if self._is_folder else fixed.rpartition("/")[0]).rstrip("/")

    def entries(self) -> list[Entry]:
        """All, always in the same order.

        Raises:
            ValueError: the input is of no known kind, mixes them, or has a file that is none.
            FileNotFoundError: there is no such file.
        """
        if HubDataset in self._kinds:
            return list(self._kinds[HubDataset].entries({}))
        names, where = self._files(), self._config.input
        endings = {ending_of(name) for name in names}
        tables = endings & KINDS.keys()
        if not tables or self._is_folder:
            known = image_endings()
            images = {name: size for name, size in names.items() if ending_of(name) in known}
            self.left_out = sorted(set(names) - set(images))
            if not images:
                hint = f"; for its {', '.join(sorted(tables))} files give a pattern"
                raise ValueError(f"{where}: no images by their endings{hint if tables else ''}")
            return list(self._kind(ImageFiles).entries(images))
        if len(endings) > 1:
            raise ValueError(
                f"{where}: files of different kinds, {', '.join(sorted(endings))}; "
                "give a pattern that finds one kind"
            )
        return list(self._kind(KINDS[tables.pop()]).entries(names))

    def images(self, entries: Sequence[Entry]) -> Iterator[Any]:
        """What `load_image` takes of each, or the error of reading it."""
        for kind, group in groupby(entries, lambda entry: self._kind_of(entry.file)):
            yield from self._kind(kind).images(list(group))

    def _kind_of(self, name: str) -> type[Kind]:
        if HubDataset in self._kinds:
            return HubDataset
        return KINDS.get(ending_of(name), ImageFiles)

    def _kind(self, kind: type[Kind]) -> Kind:
        if kind not in self._kinds:
            self._kinds[kind] = kind(self._root, self._fs, self._config)
        return self._kinds[kind]

    def _files(self) -> dict[str, int]:
        """The files below the root with their sizes, but for what an earlier run has written."""
        found: Mapping[str, Any] = {}
        if self._is_folder:
            found = self._fs.find(self._path, detail=True)
        elif self._is_pattern:
            found = self._fs.glob(self._path, detail=True)
        elif self._fs.isfile(self._path):
            found = {self._path: self._fs.info(self._path)}
        else:
            raise FileNotFoundError(
                f"{self._config.input}: no such file, folder or pattern (a data set of the "
                f"`datasets` library is {DATASETS}NAME)"
            )
        of_out = _results(self._fs, found, self._config.out)
        names = {
            path[len(self._root) + 1 :]: int(info.get("size") or 0)
            for path, info in found.items()
            if info.get("type") != "directory" and path not in of_out
        }
        if not names:
            raise FileNotFoundError(f"{self._config.input}: no files")
        return names


def _signs(path: str) -> list[int]:
    """Where a pattern may begin."""
    return [path.index(sign) for sign in "*?[" if sign in path]


def _results(fs: Any, paths: Mapping[str, Any], out: str) -> set[str]:
    """Those of the paths that are a run's own files in the folder of its results."""
    there, folder = filesystem(out)
    if there != fs:
        return set()
    real = os.path.realpath if is_local(fs) else str
    folder, named = real(folder), [path.rpartition("/") for path in paths]
    return {
        "".join(path) for path in named if is_result(path[2]) and real(path[0] or "/") == folder
    }


def open_source(config: EmbedConfig) -> Source:
    """The images of an input.

    Raises:
        ValueError: it is of no known kind.
    """
    return Source(config)


def list_images(source: Source) -> list[Entry]:
    """All entries, with ids that stand once; see :func:`with_own_ids`.

    Raises:
        ValueError: the input is of no known kind, mixes them, or has a file that is none.
        FileNotFoundError: there is no such file.
    """
    return with_own_ids(source.entries())
