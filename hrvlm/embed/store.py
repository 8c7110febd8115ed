"""The folder of the results, on a disk or in an object store: a file is whole or not there.

On a disk a file is written under another name and renamed; in an object store an object appears
when its upload has ended. A part that is there is done; nothing else remembers what is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..files import folder_for_results, replacing
from .config import Manifest

_PART = re.compile(r"part-(\d{8})\.parquet")
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+\.part")  # of `replacing`
# Who reads the folder as one table passes over names that begin so.
MANIFEST, LISTING = "_manifest.json", "_listing.parquet"
_INDEX = re.compile(r"_index-\w+\.(faiss|json)")
_WRITES = 10  # of a file whose temporary one goes away


def part_name(part: int) -> str:
    """Of the file of a part."""
    return f"part-{part:08}.parquet"


def index_names(by: str) -> tuple[str, str]:
    """Of the index of a column, and of what is said of it."""
    return f"_index-{by}.faiss", f"_index-{by}.json"


def is_result(name: str) -> bool:
    """Whether a run, or a search, gives a file of its folder such a name."""
    temporary = _TEMPORARY.fullmatch(name)
    name = temporary["name"] if temporary else name
    return name in (MANIFEST, LISTING) or bool(_PART.fullmatch(name) or _INDEX.fullmatch(name))


class Store:
    """A folder, by its path or address.

    Args:
        address: A path, or an address that fsspec knows (``s3://bucket/folder``).

    Raises:
        ValueError: fsspec has nothing for this address.
    """

    def __init__(self, address: str):
        self.address = address
        self._fs, self.root = filesystem(address)
        self._local = Path(self.root) if is_local(self._fs) else None

    def path(self, name: str) -> str:
        """Of a file in it."""
        return f"{self.root}/{name}"

    def open(self, name: str) -> Any:
        """A file of it, to be read."""
        return self._fs.open(self.path(name), "rb")

    def read(self, name: str) -> bytes | None:
        """A file of it; None where there is none."""
        try:
            with self.open(name) as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all.

        Raises:
            OSError: it can't be written; what was there before still is.
        """
        if self._local is None:
            self._fs.pipe_file(self.path(name), content)
            return
        with folder_for_results(self._local):
            for left in reversed(range(_WRITES)):
                try:
                    with replacing(self._local / name) as part:
                        part.write_bytes(content)
                    return
                except FileNotFoundError:  # another run took the temporary one for a leftover
                    if not left:
                        raise

    def read_manifest(self) -> Manifest | None:
        """What the rows here are; None in a new folder.

        Raises:
            ValueError: there is another file of that name.
        """
        where = self.path(MANIFEST)
        try:
            with self.open(MANIFEST) as file:
                stored = json.load(file)
        except FileNotFoundError:
            if self.parts():
                raise ValueError(
                    f"{self.address} has parts but no {MANIFEST}: give another --out"
                ) from None
            return None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: no JSON: {error}") from error
        return Manifest.from_json(stored, where)

    def write_manifest(self, manifest: Manifest) -> None:
        """Say what the rows here will be."""
        text = json.dumps(manifest.to_json(), indent=2) + "\n"
        self.write(MANIFEST, text.encode())

    def parts(self) -> set[int]:
        """Those that are done."""
        return {int(m[1]) for name in self._names() if (m := _PART.fullmatch(name))}

    def remove_leftovers(self, names: Collection[str]) -> None:
        """Remove what killed writers of these files have left."""
        for name in self._names() if self._local else ():
            match = _TEMPORARY.fullmatch(name)
            if match and match["name"] in names:
                (Path(self.root) / name).unlink(missing_ok=True)

    def _names(self) -> list[str]:
        try:
            found = self._fs.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in found]


def filesystem(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it.

    Raises:
        ValueError: fsspec has nothing for it.
    """
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise ValueError(
            f"{address}: reading from there needs packages that are not installed: {error}; "
            "download it, or name the images by their addresses in a JSON Lines file (--fetch)"
        ) from error
    except ValueError as error:
        raise ValueError(f"{address}: {error}") from error
    return fs, root.rstrip("/") or "/"


def is_local(fs: Any) -> bool:
    """Whether its paths are files of this machine."""
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    return protocol in ("file", "local")
