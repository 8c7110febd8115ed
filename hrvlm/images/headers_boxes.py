"""The headers of AVIF, and the boxes that HEIF and JPEG 2000 are made of, too; see `stills.py`."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from .stills import MAX_METADATA, MAX_SEGMENTS, LimitError, Piece, Pieces, Reader, Still


def avif(file: Reader) -> Still:
    """The still picture, with the boxes of an image sequence and of metadata renamed."""
    width, height, edits, places = still_picture(file, b"avis", b"avif")
    pixels, planes, area = width * height, 0.0, 0
    units = Budget("units in its coded pictures")
    samples: list[float] = []  # of an item
    for _, extents in item_extents(file, *places, Budget("items and slices of them")):
        frames = list(_av1_frames(file, extents, units))
        planes += sum(w * h * sample for w, h, sample in frames)
        area += sum(w * h for w, h, _ in frames)
        samples += [max(sample for _, _, sample in frames)] if frames else []
    if area > 4 * pixels + (1 << 20):
        raise LimitError(f"coded pictures of {area} pixels for one of {height} x {width}")
    # A smaller picture is scaled up, and so is its alpha; more items are the tiles of a grid.
    scaled = pixels * sum(samples if len(samples) <= 2 else set(samples))
    memory = 10 * pixels + 1.5 * max(planes, scaled) + file.size
    nanoseconds = 15 * pixels + 20 * area + 150 * file.size
    return Still("AVIF", width, height, edited(file, edits), memory, nanoseconds)


def still_picture(
    file: Reader, sequence: bytes, still: bytes
) -> tuple[int, int, dict[int, bytes], tuple[int, int, int]]:
    """Width, height, what is renamed, and where its items are listed: start, end, local data."""
    edits: dict[int, bytes] = {}
    meta = None
    for name, start, end in boxes(file, 0, file.size):
        if name == b"ftyp" and file.at(start, 4) == sequence:
            edits[start] = still
            for brand in range(start + 8, min(end, start + 256), 4):
                if file.at(brand, 4) == sequence:
                    edits[brand] = still
        elif name == b"moov":
            edits[start - 4] = b"free"
        elif name == b"meta" and meta is None:
            meta = (start + 4, end)
    if meta is None or meta[1] - meta[0] > MAX_METADATA:
        raise ValueError("no still picture in it")
    sizes: list[tuple[int, int]] = []
    listed, local = (0, 0), 0
    for name, start, end in boxes(file, *meta):
        if name == b"idat":
            local = start
        elif name == b"iloc":
            listed = (start, end)
        elif name == b"iinf":
            _hide_exif(file, start, end, edits)
        elif name == b"iprp":
            for inner, first, last in boxes(file, start, end):
                if inner == b"ipco":
                    sizes += [
                        file.unpack(">II", at + 4)
                        for kind, at, _ in boxes(file, first, last)
                        if kind == b"ispe"
                    ]
    if not sizes or not listed[1]:
        raise ValueError("no size in it, or no picture")
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return width, height, edits, (*listed, local)


class Budget:
    """How many parts of a kind there may be in a file, which can refer to one of them often."""

    def __init__(self, what: str):
        self.what, self.left = what, MAX_SEGMENTS

    def spend(self) -> None:
        """Count one.

        Raises:
            LimitError: there are too many.
        """
        self.left -= 1
        if self.left < 0:
            raise LimitError(f"more than {MAX_SEGMENTS} {self.what}")


def boxes(file: Reader, position: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of the contents of each box."""
    for _ in range(MAX_SEGMENTS):
        head = file.upto(position, 8)
        if position + 8 > end or len(head) < 8:
            return
        length, name = struct.unpack(">I4s", head)
        start = position + 8
        if length == 1:
            (length,) = file.unpack(">Q", start)
            start += 8
        stop = end if length == 0 else position + length
        if stop < start or stop > end:
            if name == b"mdat":
                return
            raise ValueError(f"a box {name!r} of {length} bytes")
        yield name, start, stop
        position = stop
    raise LimitError(f"more than {MAX_SEGMENTS} boxes")


def _hide_exif(file: Reader, start: int, end: int, edits: dict[int, bytes]) -> None:
    """Rename the items that hold metadata: how to turn the picture stands in its properties."""
    (version,) = file.unpack(">B", start)
    for name, first, _ in boxes(file, start + (6 if version == 0 else 8), end):
        if name == b"infe":
            kind = first + (10 if file.at(first, 1)[0] == 3 else 8)
            if file.upto(kind, 4) in (b"Exif", b"mime"):
                edits[kind] = b"none"


def item_extents(
    file: Reader, start: int, end: int, local: int, budget: Budget
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Number and extents of each item, which are slices of the file."""
    data = file.at(start, end - start)
    version, sizes, index = data[0], data[4:6], 6
    offset_size, length_size, base_size = sizes[0] >> 4, sizes[0] & 15, sizes[1] >> 4
    index_size = sizes[1] & 15 if version else 0

    def number(size: int) -> int:
        nonlocal index
        index += size
        if index > len(data):
            raise ValueError("truncated: its list of items")
        return int.from_bytes(data[index - size : index], "big")

    for _ in range(number(4 if version == 2 else 2)):
        budget.spend()
        item = number(4 if version == 2 else 2)
        method = number(2) & 15 if version else 0
        number(2)
        base, extents = number(base_size), []
        for _ in range(number(2)):
            budget.spend()  # one may be written in no bytes at all
            number(index_size)
            first, length = base + number(offset_size), number(length_size)
            first += local if method == 1 else 0
            extents.append((first, min(first + length, file.size) if length else file.size))
        yield item, extents


def _av1_frames(
    file: Reader, extents: list[tuple[int, int]], units: Budget
) -> Iterator[tuple[int, int, float]]:
    """(width, height, bytes of a pixel's planes) of each frame in an item: all are decoded."""
    item = Reader(Pieces(file.stream, [e for e in extents if e[1] > e[0]]), file.label)  # type: ignore[arg-type]
    shape, position = None, 0
    while head := item.upto(position, 10):
        units.spend()
        kind, start = head[0] >> 3 & 15, 2 if head[0] & 4 else 1
        size, used = _leb128(head[start:]) if head[0] & 2 else (item.size, 0)
        if kind == 1:
            shape = _sequence_header(item.upto(position + start + used, min(size, 256)))
        elif kind in (3, 6) and shape:
            yield shape
        position += start + used + size


def _leb128(data: bytes) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(data[:8]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, i + 1
    raise ValueError("truncated: the length of a unit")


class Bits:
    """Reads the bits of a header from the first on; called with how many."""

    def __init__(self, data: bytes):
        self.value, self.left = int.from_bytes(data, "big"), 8 * len(data)

    def __call__(self, count: int = 1) -> int:
        """The next `count` bits as a number."""
        self.left -= count
        if self.left < 0:
            raise ValueError("truncated: a sequence header")
        return self.value >> self.left & (1 << count) - 1


def _sequence_header(data: bytes) -> tuple[int, int, float]:
    """Section 5.5 of the AV1 specification, as far as size and depth."""
    bits = Bits(data)
    profile, _, reduced = bits(3), bits(), bits()
    if reduced:
        bits(5)
    else:
        _skip_timing_and_operating_points(bits)
    width_bits, height_bits = bits(4) + 1, bits(4) + 1
    width, height = bits(width_bits) + 1, bits(height_bits) + 1
    if not reduced and bits():
        bits(7)  # frame numbers
    bits(3)
    if not reduced:
        _skip_tools(bits)
    bits(3)
    deep = bits()
    if profile == 2 and deep:
        bits()
    mono = profile != 1 and bits()
    return width, height, (1 + deep) * (1 if mono else 1.5 if profile == 0 else 3)


def _skip_tools(bits: Bits) -> None:
    bits(4)
    ordered = bits()
    if ordered:
        bits(2)
    if (bits() or bits()) and not bits():  # screen content tools and their motion vectors
        bits()
    if ordered:
        bits(3)


def _skip_timing_and_operating_points(bits: Bits) -> None:
    delay = None
    if bits():
        bits(64)
        if bits():
            zeros = 0
            while not bits():
                zeros += 1
            bits(min(zeros, 32))
        if bits():
            delay = bits(5) + 1
            bits(42)
    shown = bits()
    for _ in range(bits(5) + 1):
        bits(12)
        if bits(5) > 7:
            bits()
        if delay and bits():
            bits(2 * delay + 1)
        if shown and bits():
            bits(4)


def edited(file: Reader, edits: dict[int, bytes]) -> list[Piece]:
    """The file with other bytes at these positions."""
    pieces: list[Piece] = []
    position = 0
    for start, data in sorted(edits.items()):
        pieces += [(position, start), data]
        position = start + len(data)
    return [*pieces, (position, file.size)]
