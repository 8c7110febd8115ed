"""The header of HEIF files with HEVC in them (HEIC): which pictures are decoded for the still.

A picture is one item, or derived from others (a grid of tiles), and alpha is one more. What an item
costs is the size in its sequence header, which need not be that of the boxes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .headers_boxes import Bits, Budget, boxes, edited, item_extents, still_picture
from .stills import LimitError, Pieces, Reader, Still

# What libheif decodes beside HEVC, each with limits of its own, or none.
_OTHER_CODECS = (b"av01", b"avc1", b"evc1", b"j2k1", b"jpeg", b"mski", b"unci", b"vvc1")
_SEQUENCE_HEADER, _MAX_DEPTH = 33, 4


class _Items(NamedTuple):
    """By their numbers: what they are made of (`parts`, also alpha's), and their codes' headers."""

    primary: int
    parts: dict[int, list[int]]
    headers: dict[int, list[tuple[int, int]]]


def heif(file: Reader) -> Still:
    """The still picture, with the boxes of an image sequence and of metadata renamed."""
    width, height, edits, places = still_picture(file, b"hevc", b"heic")
    items = _items(file)
    areas: dict[int, int] = {}
    units = Budget("units in its coded pictures")
    for number, extents in item_extents(file, *places, Budget("items and slices of them")):
        for start, end in items.headers.get(number, []):
            found = _in_configuration(file.at(start, min(end - start, 1 << 16)), units)
            length = (file.at(start + 21, 1)[0] & 3) + 1
            found += _in_units(file, extents, length, units)
            areas[number] = max([areas.get(number, 0), *(w * h for w, h in found)])
    area = _decoded(items.primary, items, areas, Budget("parts of its picture"), _MAX_DEPTH)
    pixels = width * height
    if area > 4 * pixels + (1 << 20):
        raise LimitError(f"coded pictures of {area} pixels for one of {height} x {width}")
    memory = 7 * pixels + 3 * area + 3 * file.size  # libheif's copies of both, and Pillow's
    nanoseconds = 20 * pixels + 10 * area + 280 * file.size
    return Still("HEIF", width, height, edited(file, edits), memory, nanoseconds)


def _decoded(number: int, items: _Items, areas: dict[int, int], budget: Budget, depth: int) -> int:
    """Pixels that are decoded for an item, with those of its parts."""
    budget.spend()
    if depth < 0:
        raise LimitError(f"pictures derived from others more than {_MAX_DEPTH} times")
    parts = items.parts.get(number, [])
    return areas.get(number, 0) + sum(
        _decoded(part, items, areas, budget, depth - 1) for part in parts
    )


def _items(file: Reader) -> _Items:
    start, end = next((s + 4, e) for name, s, e in boxes(file, 0, file.size) if name == b"meta")
    primary: int | None = None
    properties: list[tuple[bytes, int, int]] = []
    parts: dict[int, list[int]] = {}
    of_item: dict[int, list[int]] = {}
    for name, first, last in boxes(file, start, end):
        version = file.upto(first, 1)
        if name == b"pitm":
            primary = _number(file, first + 4, 4 if version[0] else 2)
        elif name == b"iinf":
            _refuse_other_codecs(file, first, last)
        elif name == b"iref":
            parts = _parts(file, first + 4, last, 4 if version[0] else 2)
        elif name == b"iprp":
            for inner, a, b in boxes(file, first, last):
                if inner == b"ipco":
                    properties += list(boxes(file, a, b))
                elif inner == b"ipma":
                    of_item |= _associations(file, a)
    if primary is None:
        raise ValueError("it does not say which of its pictures is meant")
    headers = {
        number: [properties[i - 1][1:] for i in which if _is_hevc(properties, i)]
        for number, which in of_item.items()
    }
    return _Items(primary, parts, headers)


def _is_hevc(properties: list[tuple[bytes, int, int]], index: int) -> bool:
    return 0 < index <= len(properties) and properties[index - 1][0] == b"hvcC"


def _number(file: Reader, position: int, size: int) -> int:
    return int.from_bytes(file.at(position, size), "big")


def _refuse_other_codecs(file: Reader, start: int, end: int) -> None:
    (version,) = file.at(start, 1)
    for name, first, _ in boxes(file, start + (6 if version == 0 else 8), end):
        if name == b"infe":
            kind = file.upto(first + (10 if file.at(first, 1)[0] == 3 else 8), 4)
            if kind in _OTHER_CODECS:
                raise ValueError(
                    f"a picture coded as {kind.decode()!r}, which is not read: HEVC is"
                )


def _parts(file: Reader, start: int, end: int, size: int) -> dict[int, list[int]]:
    parts: dict[int, list[int]] = {}
    budget = Budget("references among its items")
    for name, first, _ in boxes(file, start, end):
        source, count = _number(file, first, size), _number(file, first + size, 2)
        for i in range(count):
            budget.spend()
            target = _number(file, first + size + 2 + i * size, size)
            if name == b"dimg":
                parts.setdefault(source, []).append(target)
            elif name == b"auxl":
                parts.setdefault(target, []).append(source)
    return parts


def _associations(file: Reader, start: int) -> dict[int, list[int]]:
    """The properties of each item, counted from 1."""
    version, wide = file.at(start, 1)[0], file.at(start + 3, 1)[0] & 1
    position = start + 8
    found: dict[int, list[int]] = {}
    budget = Budget("properties of its items")
    for _ in range(_number(file, start + 4, 4)):
        size = 4 if version else 2
        number, count = _number(file, position, size), _number(file, position + size, 1)
        position += size + 1
        which = []
        budget.spend()
        for _ in range(count):
            budget.spend()
            which.append(_number(file, position, 1 + wide) & (0x7FFF if wide else 0x7F))
            position += 1 + wide
        found[number] = found.get(number, []) + which
    return found


def _in_configuration(data: bytes, units: Budget) -> list[tuple[int, int]]:
    """Sizes in the sequence headers of an hvcC box."""
    found, position = [], 23
    for _ in range(data[22]):
        count = int.from_bytes(data[position + 1 : position + 3], "big")
        position += 3
        for _ in range(count):
            units.spend()
            length = int.from_bytes(data[position : position + 2], "big")
            found += _size(data[position + 2 : position + 2 + min(length, 1024)])
            position += 2 + length
    return found


def _in_units(
    file: Reader, extents: list[tuple[int, int]], length_size: int, units: Budget
) -> Iterator[tuple[int, int]]:
    """Sizes in sequence headers among an item's units."""
    pieces = [extent for extent in extents if extent[1] > extent[0]]
    item = Reader(Pieces(file.stream, pieces), file.label)  # type: ignore[arg-type]
    position = 0
    while len(head := item.upto(position, length_size + 2)) == length_size + 2:
        units.spend()
        length = int.from_bytes(head[:length_size], "big")
        if head[length_size] >> 1 & 63 == _SEQUENCE_HEADER:
            yield from _size(item.upto(position + length_size, min(length, 1024)))
        position += length_size + length


def _size(unit: bytes) -> list[tuple[int, int]]:
    """Width and height in a sequence header: section 7.3.2.2 of H.265; nothing in other units."""
    if len(unit) < 2 or unit[0] >> 1 & 63 != _SEQUENCE_HEADER:
        return []
    bits = Bits(unit[2:].replace(b"\0\0\3", b"\0\0"))
    bits(4)
    layers = bits(3)
    bits(1 + 88 + 8)
    present = [(bits(), bits()) for _ in range(layers)]
    bits(2 * (8 - layers) if layers else 0)
    for profile, level in present:
        bits(88 * profile + 8 * level)
    _exponential(bits)
    if _exponential(bits) == 3:
        bits()
    return [(_exponential(bits), _exponential(bits))]


def _exponential(bits: Bits) -> int:
    zeros = 0
    while not bits():
        zeros += 1
    return int((1 << zeros) - 1 + bits(zeros))
