"""What the readers of image headers share.

Every reader (`headers*.py`) turns a file into a `Still`: format, size, an upper estimate of
what decoding costs, and the pieces of the file that the first frame needs. Pillow is given those
pieces and nothing else, so that metadata, later frames and thumbnails cost nothing, however many
there are.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple, TypeAlias

# A slice (start, stop) of the file, or bytes that take the place of some.
Piece: TypeAlias = "tuple[int, int] | bytes | bytearray | memoryview"

MAX_SEGMENTS = 4096  # blocks of a file beside its pixels
MAX_METADATA = 1 << 20  # bytes of one block that is read here

_ORIENTATION = 0x0112
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


class LimitError(ValueError):
    """A file that costs more than it may."""


class Still(NamedTuple):
    """The first frame of a file, not decoded.

    Attributes:
        format: Pillow's name of the format.
        width: in pixels, as stored.
        height: likewise.
        pieces: what Pillow gets, in order.
        memory: bytes at the peak of decoding, the caller's own bytes not counted.
        nanoseconds: of one CPU core, for decoding and bringing to RGB.
        orientation: EXIF's, 1 to 8 or what the file says instead; None if it says nothing.
        negative: whether the smallest of the values that Pillow decodes is white.
        bits: of a sample, where decoding has to know them.
        kind: what a pixel is made of, for the error if Pillow can't read it.
        plain: whether a pixel is a byte each of red, green and blue, whoever decodes it.
    """

    format: str
    width: int
    height: int
    pieces: Sequence[Piece]
    memory: float
    nanoseconds: float
    orientation: int | None = None
    negative: bool = False
    bits: int | None = None
    kind: str | None = None
    plain: bool = False


class Reader:
    """Random access to a file; what lies past its end is an error."""

    def __init__(self, stream: IO[bytes], label: str):
        self.stream, self.label = stream, label
        self.size = stream.seek(0, io.SEEK_END)

    def at(self, position: int, count: int) -> bytes:
        """`count` bytes from `position`."""
        data = self.upto(position, count)
        if len(data) < count:
            raise ValueError(f"truncated: it ends after {self.size} bytes")
        return data

    def upto(self, position: int, count: int) -> bytes:
        """At most `count` bytes from `position`: fewer at the end of the file."""
        if position >= self.size:
            return b""
        self.stream.seek(position)
        return _read_fully(self.stream, min(count, self.size - position))

    def unpack(self, layout: str, position: int) -> tuple[Any, ...]:
        """`struct.unpack` of the bytes at `position`."""
        return struct.unpack(layout, self.at(position, struct.calcsize(layout)))


class Pieces(io.RawIOBase):
    """Pieces of a stream, one after the other, as a file of its own. The stream is left open."""

    def __init__(self, stream: IO[bytes] | None, pieces: Sequence[Piece]):
        self._stream, self._position = stream, 0
        self._starts: list[int] = []
        self._pieces = [p for p in pieces if _length(p)]
        end = 0
        for piece in self._pieces:
            self._starts.append(end)
            end += _length(piece)
        self._end, self._at = end, 0

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def tell(self) -> int:  # noqa: D102
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:  # noqa: D102
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._end}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:  # noqa: D102
        if self._position >= self._end:
            return 0
        while self._starts[self._at] > self._position:
            self._at -= 1
        while self._position >= self._starts[self._at] + _length(self._pieces[self._at]):
            self._at += 1
        piece, skip = self._pieces[self._at], self._position - self._starts[self._at]
        count = min(len(buffer), _length(piece) - skip)
        if isinstance(piece, tuple):
            assert self._stream is not None
            self._stream.seek(piece[0] + skip)
            data: bytes | memoryview = _read_fully(self._stream, count)
        else:
            data = memoryview(piece)[skip : skip + count]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class PiecesFile(io.BufferedReader):
    """:class:`Pieces`, buffered. No more is asked for than there is left.

    A damaged file may give a block 2 GB, and a buffered reader allocates what it is asked for.
    """

    def __init__(self, stream: IO[bytes] | None, pieces: Sequence[Piece]):
        super().__init__(Pieces(stream, pieces))
        self._size = sum(map(_length, pieces))

    def read(self, size: int | None = -1) -> bytes:  # noqa: D102
        if size is not None and size > 1 << 16:
            size = min(size, max(self._size - self.tell(), 0))
        return super().read(size)


def _length(piece: Piece) -> int:
    return piece[1] - piece[0] if isinstance(piece, tuple) else len(piece)


def _read_fully(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    while len(data) < count and (more := stream.read(count - len(data))):  # unbuffered files
        data += more
    return data


class Orientation:
    """What a file says about how to turn it: its first metadata of each kind, whatever follows."""

    def __init__(self) -> None:
        self._found: dict[str, int | None] = {}

    def look(self, kind: str, read: Callable[..., int | None], *arguments: Any) -> None:
        """Read metadata of this kind ("EXIF", "profile", "XMP"), if they are the first of it."""
        if kind not in self._found:
            self._found[kind] = read(*arguments)

    @property
    def value(self) -> int | None:
        """EXIF's, else that of an EXIF profile in a text, else XMP's."""
        found = (self._found.get(kind) for kind in ("EXIF", "profile", "XMP"))
        return next((turn for turn in found if turn is not None), None)


def exif_orientation(blob: bytes, label: str) -> int | None:
    """The orientation in EXIF data (a TIFF file without pixels), None if it has none.

    Only the first directory's entries are looked at: their values, which may point anywhere and
    overlap, are not read.
    """
    blob = blob.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(blob[:4])
    try:
        if order is None:
            raise ValueError(f"it begins with {blob[:4]!r}")
        (start,) = struct.unpack_from(order + "I", blob, 4)
        (count,) = struct.unpack_from(order + "H", blob, start)
        for entry in range(start + 2, start + 2 + 12 * min(count, MAX_SEGMENTS), 12):
            tag, kind, number, value = struct.unpack_from(order + "HHIH2x", blob, entry)
            if tag == _ORIENTATION and kind == 3 and number == 1:
                return value
    except (struct.error, ValueError) as error:
        warnings.warn(f"{label}: taken as upright, its EXIF is unreadable: {error}", stacklevel=2)
    return None


def xmp_orientation(packet: bytes) -> int | None:
    """The orientation in XMP data, None if it has none."""
    found = _XMP_ORIENTATION.search(packet)
    return int(found[1]) if found else None
