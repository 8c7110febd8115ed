"""The header of JPEG 2000: what its codestream is divided into; see `stills.py`."""

from __future__ import annotations

import struct
from math import ceil

from .headers_boxes import boxes
from .stills import MAX_SEGMENTS, LimitError, Reader, Still

_CODESTREAM = b"\xff\x4f\xff\x51"
_COD, _COC, _QCD, _QCC, _RGN = 0xFF52, 0xFF53, 0xFF5C, 0xFF5D, 0xFF5E
_NOT_READ = (0xFF5F, 0xFF60, 0xFF61)
_MAX_LEVELS, _WHOLE = 32, 15  # halvings; the side of a precinct where none is given, 2^15


def jpeg2000(file: Reader) -> Still:
    """The whole file: size, components, tiles, precincts and code-blocks bound the cost."""
    start = 0
    if file.at(0, 4) != _CODESTREAM:
        start = next((s for name, s, _ in boxes(file, 0, file.size) if name == b"jp2c"), 0)
        if not start or file.at(start, 4) != _CODESTREAM:
            raise ValueError("no codestream in it")
    right, bottom, left, top, tile_w, tile_h, tile_x, tile_y, count = file.unpack(
        ">IIIIIIIIH", start + 8
    )
    if not 1 <= count <= 4 or not tile_w or not tile_h:
        raise ValueError(f"{count} components in tiles of {tile_h} x {tile_w}")
    width, height = right - left, bottom - top
    tiles = ceil((right - tile_x) / tile_w) * ceil((bottom - tile_y) / tile_h)
    if tiles > MAX_SEGMENTS:
        raise LimitError(f"{tiles} tiles")
    coding = _Coding(min(tile_w, width), min(tile_h, height))
    coding.read(file, start + 2)
    passes = 3 * min(coding.planes + coding.shift, 31) - 2  # the decoder's own limit
    pixels, part = width * height, coding.width * coding.height
    memory = 4 * pixels + count * (6 * part + 500 * coding.parts) + file.size
    nanoseconds = max(16, 0.55 * passes) * count * pixels + 280 * file.size
    nanoseconds += tiles * count * (800 * coding.parts + 150 * coding.packets)
    bits = max((s & 127) + 1 for s in file.at(start + 42, 3 * count)[::3])
    still = Still("JPEG2000", width, height, [(0, file.size)], memory, nanoseconds)
    return still._replace(bits=bits)


class _Coding:
    """What the segments of a codestream say of its cost: the most that any of them says.

    Attributes:
        width: Of a tile, in pixels.
        height: Likewise.
        planes: Bit planes that a quantisation leaves (Annex A.6.4 and E.1).
        shift: Those that a region of interest adds.
        parts: Precincts and code-blocks in a component of a tile; the decoder allocates some
            hundred bytes for each, before it has seen whether there is anything in it.
        packets: Of a component of a tile: one for each layer of a precinct.
    """

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.planes = self.shift = self.parts = self.packets = 0

    def read(self, file: Reader, position: int) -> None:
        """All segments from `position` on, those of the tiles too."""
        for _ in range(2 * MAX_SEGMENTS):
            head = file.upto(position, 14)
            if len(head) < 4 or head[:2] == b"\xff\xd9":
                return
            marker, length = struct.unpack(">HH", head[:4])
            if marker == 0xFF90:  # the header of a part of a tile: the next one is `size` bytes on
                size = int.from_bytes(head[6:10], "big")
                self._read_tile(file, position + 12, position + size if size else file.size)
                if size < 14:
                    return
                position += size
                continue
            self._take(marker, file.upto(position + 4, min(max(length - 2, 0), 256)))
            position += 2 + length
        raise LimitError(f"more than {2 * MAX_SEGMENTS} segments")

    def _read_tile(self, file: Reader, position: int, end: int) -> None:
        for _ in range(MAX_SEGMENTS):
            head = file.upto(position, 4)
            if len(head) < 4 or position >= end or head[:2] == b"\xff\x93":
                return
            marker, length = struct.unpack(">HH", head)
            self._take(marker, file.upto(position + 4, min(max(length - 2, 0), 256)))
            position += 2 + length
        raise LimitError(f"more than {MAX_SEGMENTS} segments in a tile")

    def _take(self, marker: int, body: bytes) -> None:
        if marker in (_QCD, _QCC) and len(body) >= 3:
            body = body[marker == _QCC :]
            exponents = [b >> 3 for b in (body[1::2] if body[0] & 31 else body[1:])]
            self.planes = max(self.planes, (body[0] >> 5) + max(exponents, default=0) - 1)
        elif marker == _RGN and len(body) >= 3:
            self.shift = max(self.shift, body[2])
        elif marker == _COD and len(body) >= 10:
            self._divide(int.from_bytes(body[2:4], "big"), body[0], body[5:])
        elif marker == _COC and len(body) >= 7:  # of up to 256 components
            self._divide(1, body[1], body[2:])
        elif marker in _NOT_READ:
            raise ValueError(f"a segment {marker:#x}, which is not read")

    def _divide(self, layers: int, style: int, body: bytes) -> None:
        """Count what levels, code-blocks and precincts (Annex B.6 and B.7) divide a tile into."""
        levels, blocks = body[0], [2 + (b & 15) for b in body[1:3]]
        precincts = body[5:] if style & 1 else b""
        if layers > 64 or levels > _MAX_LEVELS or min(blocks) < 4:
            raise LimitError(
                f"{layers} layers of {levels} levels in code-blocks of {1 << blocks[1]} x "
                f"{1 << blocks[0]}"
            )
        parts = packets = 0
        for level in range(levels + 1):
            side = precincts[level] if level < len(precincts) else _WHOLE * 17
            first = level == 0
            count, inner, bands = 1, 1, 1 if first else 3
            for pixels, exponent, block in (
                (self.width, side & 15, blocks[0]),
                (self.height, side >> 4, blocks[1]),
            ):
                if not exponent and not first:
                    raise ValueError("precincts of one pixel above the lowest level")
                sides = _parts(pixels, levels - level, exponent)
                count *= sides
                block = min(block, exponent - (not first))
                inner *= max(sides, _parts(pixels, levels - level + (not first), block))
            parts += bands * (count + inner)
            packets += layers * count
        self.parts, self.packets = max(self.parts, parts), max(self.packets, packets)


def _parts(pixels: int, halvings: int, exponent: int) -> int:
    """Pieces of 2^exponent that lie in `pixels`, halved so often; they may begin anywhere."""
    return 1 + (((pixels >> halvings) + 1) >> exponent)
