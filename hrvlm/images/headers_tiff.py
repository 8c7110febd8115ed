"""The first directory of a TIFF file; see `stills.py`.

Pillow and libtiff get a directory written anew, of the tags that say how the pixels are stored:
a directory may list tens of thousands of tags that all point at the same megabytes.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from math import ceil
from typing import NamedTuple

from .stills import LimitError, Piece, Reader, Still

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION = 256, 257, 258, 259, 262, 274
_STRIP_OFFSETS, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR = 273, 277, 278, 279, 284
_COLORMAP, _INKSET, _SAMPLE_FORMAT = 320, 332, 339
_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_STRIPS = (_STRIP_OFFSETS, _ROWS, _STRIP_BYTES)
_TILES = (_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_BYTES)
_KEPT = {
    *(_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR, *_STRIPS, *_TILES),
    *(266, 292, 293),  # order of bits, options of the fax codings
    *(317, _COLORMAP, _INKSET, 338, _SAMPLE_FORMAT),  # 317: predictor, 338: extra samples
    *(347, 529, 530, 532),  # tables of JPEG, YCbCr's coefficients, subsampling, range
}
_COMPRESSIONS = {
    **{1: "none", 2: "CCITT", 3: "CCITT", 4: "CCITT", 5: "LZW", 7: "JPEG"},
    **{8: "deflate", 32946: "deflate", 32773: "PackBits", 50000: "zstd"},
}
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_MEANINGS = {
    **{0: "grey, white is zero", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK"},
    **{6: "YCbCr", 8: "Lab", 9: "ICC Lab", 10: "ITU Lab", 32803: "colour filter array"},
}
_SAMPLE_KINDS = {1: "unsigned", 2: "signed", 3: "float"}
_JPEG, _JPEG_SCANS = 7, 100  # libtiff gives up a part that has more scans
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 16: 8}
_MAX_ENTRIES, _MAX_VALUES = 4096, 1 << 17  # of a directory, of a tag


class _Tag(NamedTuple):
    kind: int
    number: int
    data: bytes


def tiff(file: Reader) -> Still:
    """The first picture: its directory at the end of the pieces, all else where it was."""
    order = "<" if file.at(0, 2) == b"II" else ">"
    tags = _directory(file, order)

    def value(tag: int, default: int) -> int:
        found = _numbers(tags[tag], order) if tag in tags else ()
        return found[0] if found else default

    width, height = value(_WIDTH, 0), value(_LENGTH, 0)
    compression = value(_COMPRESSION, 1)
    if compression not in _COMPRESSIONS:
        names = ", ".join(dict.fromkeys(_COMPRESSIONS.values()))
        raise ValueError(f"compression {compression} is not read, only {names}")
    bits = sum(_numbers(tags[_BITS], order)) if _BITS in tags else 1
    samples = value(_SAMPLES, 1)
    if samples > 8 or bits > 32 * 8 or (_BITS in tags and tags[_BITS].number > 8):
        raise ValueError(f"{samples} samples of {bits} bits in a pixel")
    bits = max(bits, samples * value(_BITS, 1))
    tiled = _TILE_OFFSETS in tags and _STRIP_OFFSETS not in tags
    part = (
        (value(_TILE_WIDTH, 0), value(_TILE_LENGTH, 0))
        if tiled
        else (width, min(value(_ROWS, height), height))
    )
    if min(width, height, *part) < 1:
        raise ValueError(f"height {height}, width {width} in parts of {part[1]} x {part[0]}")
    parts = ceil(width / part[0]) * ceil(height / part[1])
    area = parts * part[0] * part[1]
    if area > 4 * width * height + (1 << 20) or parts > _MAX_VALUES:
        raise LimitError(f"{parts} parts of {part[1]} x {part[0]} pixels for {height} x {width}")
    photometric = value(_PHOTOMETRIC, _default_photometric(compression, samples))
    kind = _check_samples(tags, order, photometric)
    part_bytes, pixels = part[0] * part[1] * bits / 8, width * height
    memory = 4 * pixels + part_bytes + _longest_gap(tags, order)
    nanoseconds = 14 * pixels + 0.2 * bits * area
    if compression != 1 or value(_PLANAR, 1) == 2 or photometric == _YCBCR:
        # libtiff: the whole file in memory, and a part's coded bytes
        coded = _coded_bytes(file, tags, order, _TILE_BYTES if tiled else _STRIP_BYTES)
        memory += 2 * file.size + part_bytes
        nanoseconds += (0.5 * bits + 20) * area + 20 * coded
        if compression == _JPEG:
            memory += 8 * part[0] * part[1]
            nanoseconds += 60 * area + 30 * coded
            if _has_progressive(file):
                nanoseconds += (4 + 0.5 * _JPEG_SCANS) * samples * area
    orientation = value(_ORIENTATION, 0) or None
    # Else libtiff would read tiles where Pillow reads strips.
    for other in (_ORIENTATION, *(_STRIPS if tiled else _TILES)):
        tags.pop(other, None)
    # Pillow takes deep samples as they are, and knows fewer kinds of them whose zero is white.
    negative = photometric == _WHITE_IS_ZERO and samples == 1 and bits > 8
    meaning = _BLACK_IS_ZERO if negative else photometric
    tags[_PHOTOMETRIC] = _Tag(3, 1, struct.pack(order + "H", meaning))
    _widen_palette(tags, order)
    pieces = _with_directory(file, order, tags)
    still = Still("TIFF", width, height, pieces, memory, nanoseconds, orientation)
    return still._replace(negative=negative, kind=kind)


def _default_photometric(compression: int, samples: int) -> int:
    """Where the tag is missing: as libtiff; Pillow would take a picture for its negative."""
    if samples >= 3:
        return _RGB
    fax = _COMPRESSIONS[compression] == "CCITT"
    return _WHITE_IS_ZERO if fax else _BLACK_IS_ZERO


def _check_samples(tags: dict[int, _Tag], order: str, photometric: int) -> str:
    """In words: what a pixel is made of, if it is nothing that Pillow takes for something else."""

    def values(tag: int, default: int) -> tuple[int, ...]:
        return (_numbers(tags[tag], order) if tag in tags else ()) or (default,)

    bits, formats = values(_BITS, 1), values(_SAMPLE_FORMAT, 1)
    depths = "/".join(map(str, dict.fromkeys(bits)))
    numbers = _SAMPLE_KINDS.get(formats[0], f"format {formats[0]}")
    samples = values(_SAMPLES, 1)[0]
    meaning = _MEANINGS.get(photometric, f"photometric interpretation {photometric}")
    kind = f"{meaning} in {numbers} samples of {depths} bits, {samples} for a pixel"
    if formats[0] == 2 and bits[0] < 32:
        raise ValueError(f"{kind}: signed samples have no agreed range")
    if photometric == _CMYK and values(_INKSET, 1)[0] != 1:
        raise ValueError(f"{kind}: its inks are not cyan, magenta, yellow and black")
    return kind


def _widen_palette(tags: dict[int, _Tag], order: str) -> None:
    """To 16 bits, where a writer has put 8: told by their values, as libtiff does."""
    if _COLORMAP in tags:
        colors = _numbers(tags[_COLORMAP], order)
        if colors and max(colors) < 256:
            data = struct.pack(f"{order}{len(colors)}H", *(257 * color for color in colors))
            tags[_COLORMAP] = _Tag(3, len(colors), data)


def _coded_bytes(file: Reader, tags: dict[int, _Tag], order: str, tag: int) -> int:
    """Of all parts: more than the file has where they overlap."""
    counts = _numbers(tags[tag], order) if tag in tags else ()
    return max(file.size, sum(min(count, file.size) for count in counts))


def _has_progressive(file: Reader) -> bool:
    return any(
        b"\xff\xc2" in file.upto(start, (1 << 20) + 1) for start in range(0, file.size, 1 << 20)
    )


def _longest_gap(tags: dict[int, _Tag], order: str) -> int:
    """Between two parts: Pillow reads uncompressed ones up to where the next begins."""
    starts = sorted(
        offset
        for tag in (_STRIP_OFFSETS, _TILE_OFFSETS)
        if tag in tags
        for offset in _numbers(tags[tag], order)
    )
    return max((b - a for a, b in pairwise(starts)), default=0)


def _directory(file: Reader, order: str) -> dict[int, _Tag]:
    """The kept tags of the first directory, of a classic or a big TIFF file."""
    (version,) = file.unpack(order + "H", 2)
    big = version == 43
    (start,) = file.unpack(order + ("Q" if big else "I"), 8 if big else 4)
    (count,) = file.unpack(order + ("Q" if big else "H"), start)
    if count > _MAX_ENTRIES:
        raise LimitError(f"{count} tags")
    layout = order + ("HHQ8s" if big else "HHI4s")
    size = struct.calcsize(layout)
    entries = file.upto(start + (8 if big else 2), count * size)
    tags = {}
    for tag, kind, number, inline in struct.iter_unpack(
        layout, entries[: len(entries) // size * size]
    ):
        if tag not in _KEPT | {_ORIENTATION} or kind not in _TYPE_BYTES or tag in tags:
            continue  # of a tag that is there again, libtiff takes the first
        length = number * _TYPE_BYTES[kind]
        if number > _MAX_VALUES:
            raise LimitError(f"tag {tag} has {number} values")
        data = inline[:length]
        if length > len(inline):
            data = file.at(struct.unpack(order + ("Q" if big else "I"), inline)[0], length)
        if kind == 16:
            kind, data = 4, _as_long(data, order, tag)
        tags[tag] = _Tag(kind, number, data)
    return tags


def _as_long(data: bytes, order: str, tag: int) -> bytes:
    values = struct.unpack(f"{order}{len(data) // 8}Q", data)
    if max(values, default=0) >= 1 << 32:
        raise LimitError(f"tag {tag} reaches beyond 4 GiB")
    return struct.pack(f"{order}{len(values)}I", *values)


def _numbers(tag: _Tag, order: str) -> tuple[int, ...]:
    layout = {1: "B", 3: "H", 4: "I"}.get(tag.kind)
    return () if layout is None else struct.unpack(f"{order}{tag.number}{layout}", tag.data)


def _with_directory(file: Reader, order: str, tags: dict[int, _Tag]) -> list[Piece]:
    """The file with a directory of these tags as its only one, behind everything else."""
    start = file.size + file.size % 2
    values = start + 2 + 12 * len(tags) + 4
    entries, tail = b"", b""
    for tag, (kind, number, data) in sorted(tags.items()):
        inline = data.ljust(4, b"\0")
        if len(data) > 4:
            inline = struct.pack(order + "I", values + len(tail))
            tail += data + b"\0" * (len(data) % 2)
        entries += struct.pack(order + "HHI", tag, kind, number) + inline
    directory = struct.pack(order + "H", len(tags)) + entries + b"\0\0\0\0" + tail
    header = file.at(0, 2) + struct.pack(order + "HI", 42, start)
    return [header, (8, file.size), b"\0" * (file.size % 2), directory]
