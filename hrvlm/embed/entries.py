"""Images by where they are: what a listing is made of, and what keeps damage to its own images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """Where an image is.

    Attributes:
        id: In words.
        file: Below the root of the source.
        place: In the file: a byte, or a row; 0 for a whole file.
        size: Of the image in bytes, or of the file that it is in; below 0 for what can't be read,
            which its kind of file has words for.
    """

    id: str
    file: str
    place: int
    size: int


def with_own_ids(entries: Iterable[Entry]) -> list[Entry]:
    """The entries with ids that are text and stand once: a second "a.jpg" is "a.jpg#2"."""
    seen: set[str] = set()
    counts: dict[str, int] = {}
    found = []
    for entry in entries:
        name = first = name_of(entry.id)
        while name in seen:
            counts[first] = counts.get(first, 1) + 1
            name = f"{first}#{counts[first]}"
        seen.add(name)
        found.append(entry if name == entry.id else entry._replace(id=name))
    return found


def name_of(text: str) -> str:
    """A name without the bytes that are no characters."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def digest_of(entries: Iterable[Entry]) -> str:
    """Of all that the entries say: equal for equal inputs, wherever they lie."""
    digest = hashlib.blake2b(digest_size=16)
    for entry in entries:
        digest.update(repr(tuple(entry)).encode())
    return digest.hexdigest()


def apart(
    read: Callable[[Sequence[Entry]], Iterable[Any]], entries: Sequence[Entry]
) -> Iterator[Any]:
    """What is read for each entry; an error on the way is that of the entries that follow.

    Of these alone: who reads several files calls it for each.
    """
    done = 0
    try:
        for given in read(entries):
            done += 1
            yield given
    except Exception as error:  # file systems and decoders raise anything
        yield from [error] * (len(entries) - done)


@contextmanager
def parquet_named(name: str) -> Iterator[None]:
    """Errors of pyarrow, which say no name, with that of the file.

    Raises:
        ValueError: it is no parquet file that is whole.
    """
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter of names and texts
        raise ValueError(f"damaged parquet file {name!r}: {error}") from error
    except OSError as error:
        if error.errno is not None:  # of the system
            raise
        raise ValueError(f"damaged parquet file {name!r}: {error}") from error
