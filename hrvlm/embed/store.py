"""The folder of the results, on a disk or in an object store: a file is whole or not there.

On a disk a file is written under another name and renamed; in an object store an object appears
when its upload has ended. A part that is there is done; nothing else remembers what is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..files import replacing
from .config import Manifest

_PART = re.compile(r"part-(\d{8})\.parquet")
_TEMPORARY = re.compile(r"\.part-(\d{8})\.parquet\..*\.part")
# Who reads the folder as one table passes over names that begin so.
MANIFEST, LISTING = "_manifest.json", "_listing.parquet"


def part_name(part: int) -> str:
    """Of the file of a part."""
    return f"part-{part:08}.parquet"


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

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all.

        Raises:
            OSError: it can't be written; what was there before still is.
        """
        if self._local is None:
            self._fs.pipe_file(self.path(name), content)
            return
        self._local.mkdir(parents=True, exist_ok=True)
        with replacing(self._local / name) as part:
            part.write_bytes(content)

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
        except ValueError as error:
            raise ValueError(f"{where}: no JSON: {error}") from error
        return Manifest.from_json(stored, where)

    def write_manifest(self, manifest: Manifest) -> None:
        """Say what the rows here will be."""
        text = json.dumps(manifest.to_json(), indent=2) + "\n"
        self.write(MANIFEST, text.encode())

    def parts(self) -> set[int]:
        """Those that are done."""
        return {int(m[1]) for name in self._names() if (m := _PART.fullmatch(name))}

    def sizes(self) -> dict[int, int]:
        """Bytes of each part that is done."""
        return {part: int(self._fs.size(self.path(part_name(part)))) for part in self.parts()}

    def remove_leftovers(self, parts: set[int]) -> None:
        """Remove what killed writers of these parts have left."""
        for name in self._names():
            match = _TEMPORARY.fullmatch(name)
            if match and int(match[1]) in parts:
                (Path(self.root) / name).unlink(missing_ok=True)

    def footers(self, parts: Iterable[int]) -> dict[int, PartFooter | None]:
        """What each part says of itself, None for one that can't be read."""
        ordered = sorted(parts)
        with ThreadPoolExecutor(16) as pool:
            return dict(zip(ordered, pool.map(self._footer, ordered), strict=True))

    def _footer(self, part: int) -> PartFooter | None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with self.open(part_name(part)) as file:
                size = file.seek(0, 2)
                file.seek(0)
                metadata = pq.read_metadata(file)
            own = json.loads((metadata.metadata or {})[b"hrvlm"])
        except (pa.ArrowInvalid, OSError, KeyError, ValueError):
            return None
        if own.get("part") != part:
            return None
        return PartFooter(metadata.num_rows, own["bad"], size)

    def _names(self) -> list[str]:
        try:
            found = self._fs.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in found]


class PartFooter:
    """What a part says of itself.

    Args:
        rows: In it.
        bad: Of those without features: kind of error to [count, id of one, its error].
        size: In bytes.
    """

    def __init__(self, rows: int, bad: dict[str, list[Any]], size: int):
        self.rows, self.bad, self.size = rows, bad, size


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
