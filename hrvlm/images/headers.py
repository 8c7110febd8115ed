"""The headers of JPEG, PNG, GIF, WebP, BMP and PPM files; see `stills.py`.

The estimates of time are slopes measured on one core of a server (about 2.5 GHz) with files made to
be slow, rounded up; `benchmarks/images/fuzz.py` measures them again.
"""

from __future__ import annotations

import re
import struct
import zlib

from .stills import (
    MAX_METADATA,
    MAX_SEGMENTS,
    LimitError,
    Orientation,
    Piece,
    Reader,
    Still,
    exif_orientation,
    xmp_orientation,
)

# Pillow decodes some files in Python: run-length BMP, plain PPM, PPM of another depth than 8 or 16.
PYTHON_SAMPLES, PYTHON_BYTES = 1_500_000, 3_000_000
MAX_BLOCKS = 1 << 16  # of GIF's metadata, 255 bytes each

# Not \xff+, which would try a run of fill bytes again from each of them.
_MARKER = re.compile(rb"\xff([^\x00\xff])")
_NEXT_SEGMENT = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # past entropy-coded data
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_TOKEN = re.compile(rb"(?:\s|#[^\r\n]*[\r\n])*([^\s#]+)")
# Texts that tools hide an orientation in.
_PNG_TEXTS = {b"Raw profile type exif": "profile", b"XML:com.adobe.xmp": "XMP"}
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def jpeg(file: Reader) -> Still:
    """Tables and scans; of the application segments only those that say how colours are meant."""
    pieces: list[Piece] = [b"\xff\xd8"]
    frame: tuple[int, bytes] | None = None
    turn = Orientation()
    position = 2
    for _ in range(MAX_SEGMENTS):
        marker, position = _marker(file, position)
        if marker in (0x01, 0xD8) or 0xD0 <= marker <= 0xD7:
            continue
        start, position = position, position + _segment_length(file, marker, position)
        body = file.upto(start + 2, min(position - start - 2, MAX_METADATA))
        if marker == 0xDA:
            break
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            turn.look("EXIF", exif_orientation, body, file.label)
        elif marker == 0xE1 and body.startswith(_XMP):
            turn.look("XMP", xmp_orientation, body)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if frame or marker > 0xC2:
                raise ValueError(f"a frame of kind SOF{marker - 0xC0}, or a second one")
            frame = (marker, body)
        if marker in (0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD) or (
            body.startswith(b"JFIF") if marker == 0xE0 else marker == 0xEE and body[:5] == b"Adobe"
        ):
            pieces += [bytes((0xFF, marker)), (start, position)]
    else:
        raise LimitError(f"more than {MAX_SEGMENTS} segments before its first scan")
    if frame is None or len(frame[1]) < 6 or not body:
        raise ValueError("a scan without a frame")
    pieces += [b"\xff\xda", (start, file.size)]
    width, height, memory, nanoseconds = _jpeg_cost(file, *frame, body[0], position)
    plain = frame[1][0] == 8 and frame[1][5] == 3
    return Still("JPEG", width, height, pieces, memory, nanoseconds, turn.value, plain=plain)


def _marker(file: Reader, position: int) -> tuple[int, int]:
    """The next marker, and the position after it; bytes between segments are skipped."""
    for _ in range(16):
        data = file.upto(position, 4096)
        if found := _MARKER.search(data):
            return found[1][0], position + found.end()
        if len(data) < 4096:
            break
        position += 4095
    raise ValueError("truncated: no scan in it")


def _segment_length(file: Reader, marker: int, position: int) -> int:
    (length,) = file.unpack(">H", position)
    if length < 2 or marker == 0xD9:
        raise ValueError(f"marker {marker:#x} with length {length} before the first scan")
    return int(length)


def _jpeg_cost(
    file: Reader, kind: int, frame: bytes, scanned: int, position: int
) -> tuple[int, int, float, float]:
    """Width, height, memory and time; a file of several scans holds all its coefficients."""
    height, width, count = struct.unpack_from(">HHB", frame, 1)
    factors = [divmod(frame[i], 16) for i in range(7, min(len(frame), 6 + 3 * count), 3)]
    if len(factors) != count or not all(1 <= h <= 4 and 1 <= v <= 4 for h, v in factors):
        raise ValueError(f"a frame of {count} components, sampled {factors}")
    pixels, most = width * height, max(h for h, _ in factors) * max(v for _, v in factors)
    samples = sum(h * v for h, v in factors) / most * pixels
    if kind != 0xC2 and scanned == count:
        return width, height, 4 * pixels, 10 * pixels + 14 * file.size
    scans = _scans(file, position)
    memory = 4 * pixels + 2 * samples
    return width, height, memory, 10 * pixels + (4 + 0.5 * scans) * samples + 50 * file.size


def _scans(file: Reader, position: int) -> int:
    """How many scans there are, the first of which begins before `position`."""
    data = file.upto(position, file.size)
    position, scans = 0, 1
    for _ in range(MAX_SEGMENTS):
        found = _NEXT_SEGMENT.search(data, position)
        if not found or found[1] == b"\xd9":
            return scans
        scans += found[1] == b"\xda"
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    raise LimitError(f"more than {MAX_SEGMENTS} segments")


def png(file: Reader) -> Still:
    """Header, palette, colour key and pixels; no text, no profile, no further frame."""
    width, height, depth, color, _, _, _ = file.unpack(">IIBBBBB", 16)
    if file.at(8, 8) != b"\0\0\0\rIHDR" or color not in _PNG_CHANNELS:
        raise ValueError("no IHDR chunk at its beginning")
    pieces: list[Piece] = [(0, 33)]
    turn = Orientation()
    position, others, data, plain = 33, 0, 0, (depth, color) == (8, 2)
    while others <= MAX_SEGMENTS and data <= MAX_SEGMENTS + file.size // 1024:
        head = file.upto(position, 8)
        if len(head) < 8:
            plain = False
            break
        length, kind = struct.unpack(">I4s", head)
        end = min(position + 12 + length, file.size)
        plain &= end == position + 12 + length  # of a cut file Pillow says whether it is read
        others, data = others + (kind != b"IDAT"), data + (kind == b"IDAT")
        if kind in (b"IDAT", b"IEND", b"PLTE", b"tRNS"):
            pieces.append((position, end))
            plain &= kind != b"tRNS"
        elif kind == b"eXIf":
            body = file.upto(position + 8, min(length, MAX_METADATA))
            turn.look("EXIF", exif_orientation, body, file.label)
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            body = file.upto(position + 8, min(length, MAX_METADATA))
            if means := _PNG_TEXTS.get(body[:32].partition(b"\0")[0]):
                turn.look(means, _png_text_orientation, kind, body, file.label)
        if kind == b"IEND":
            break
        position = end
    else:
        raise LimitError(f"{others} chunks beside its pixels, which are in {data}")
    pixels, raw = width * height, _PNG_CHANNELS[color] * depth / 8
    memory = (1 if raw <= 1 else 2 if color == 0 else 4) * pixels + 4 * (width * raw)
    nanoseconds = (8 + 14 * raw) * pixels
    return Still("PNG", width, height, pieces, memory, nanoseconds, turn.value, plain=plain)


def _png_text_orientation(kind: bytes, chunk: bytes, label: str) -> int | None:
    key, _, text = chunk.partition(b"\0")
    packed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    text = text[1:] if kind == b"zTXt" else text
    if kind == b"iTXt":
        text = text[2:].partition(b"\0")[2].partition(b"\0")[2]
    try:
        if packed:
            text = zlib.decompressobj().decompress(text, MAX_METADATA)
        if _PNG_TEXTS[key] == "XMP":
            return xmp_orientation(text)
        # A line break, its name, its length, and then lines of hexadecimal digits.
        digits = b"".join(text.split(b"\n", 3)[3:])
        return exif_orientation(bytes.fromhex(digits.decode()), label)
    except (zlib.error, ValueError):  # as if it were not there, as Pillow takes it
        return None


def gif(file: Reader) -> Still:
    """Screen, palettes, the first picture and the block that says what is transparent in it."""
    width, height, flags = file.unpack("<HHB2x", 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0)
    pieces: list[Piece] = [(0, position)]
    control: tuple[int, int] | None = None
    blocks = MAX_BLOCKS
    for _ in range(MAX_SEGMENTS):
        kind = file.at(position, 1)
        if kind == b",":
            break
        if kind == b"!":
            start = position
            position, blocks = _after_blocks(file, position + 2, blocks)
            if file.at(start + 1, 1) == b"\xf9":
                control = (start, position)
        elif kind == b";":
            raise ValueError("it has no picture")
        else:
            position += 1
    else:
        raise LimitError(f"more than {MAX_SEGMENTS} blocks before its first picture")
    x, y, w, h = file.unpack("<HHHH", position + 1)
    pieces += [control] if control else []
    pieces.append((position, file.size))
    width, height = max(width, x + w), max(height, y + h)
    return Still("GIF", width, height, pieces, 2 * width * height, 32 * width * height)


def _after_blocks(file: Reader, position: int, left: int) -> tuple[int, int]:
    """The position after blocks of metadata, and how many more there may be of `left`."""
    while left:
        left -= 1
        length = file.at(position, 1)[0]
        position += 1 + length
        if not length:
            return position, left
    raise LimitError(f"more than {MAX_BLOCKS} blocks of metadata before its first picture")


def webp(file: Reader) -> Still:
    """The picture, or an animation of the first frame alone; Pillow wants all of it in memory."""
    kind = file.at(12, 4)
    first, animated, frame, body_start = file.at(20, 10), False, b"", 0
    body: list[Piece] = []
    turn = Orientation()
    position = 12
    for _ in range(MAX_SEGMENTS):
        head = file.upto(position, 8)
        if len(head) < 8:
            break
        name, length = struct.unpack("<4sI", head)
        start, end = position + 8, min(position + 8 + length, file.size)
        position += 8 + length + length % 2
        if name == b"VP8X":
            flags = file.at(start, 1)[0] & ~0x2C  # no profile, EXIF nor XMP: they are left out
            animated = bool(flags & 2)
            body = [name, b"\n\0\0\0", bytes((flags,)), (start + 1, start + 10)]
        elif name == b"EXIF":
            data = file.upto(start, min(length, MAX_METADATA))
            turn.look("EXIF", exif_orientation, data, file.label)
        elif name == b"XMP ":
            turn.look("XMP", xmp_orientation, file.upto(start, min(length, MAX_METADATA)))
        elif (
            name in ((b"ANIM", b"ANMF") if animated else (b"ALPH", b"VP8 ", b"VP8L")) and not frame
        ):
            body += [(start - 8, end), b"\0" * ((end - start) % 2)]
            frame, body_start = name if name in (b"ANMF", b"VP8 ", b"VP8L") else b"", start
            if kind != b"VP8X":
                break
    else:
        raise LimitError(f"more than {MAX_SEGMENTS} chunks")
    if kind == b"VP8X":
        width, height = (int.from_bytes(first[i : i + 3], "little") + 1 for i in (4, 7))
    elif kind == b"VP8L":
        bits = int.from_bytes(first[1:5], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(first[i : i + 2], "little") & 0x3FFF for i in (6, 8))
    pixels, size = width * height, sum(_length(piece) for piece in body)
    pieces = [b"RIFF", struct.pack("<I", size + 4), b"WEBP", *body]
    lossless = frame == b"VP8L" or (frame == b"ANMF" and file.upto(body_start + 16, 4) == b"VP8L")
    nanoseconds = 40 * pixels + (25 if lossless else 130) * size
    return Still("WEBP", width, height, pieces, 13 * pixels + size, nanoseconds, turn.value)


def bmp(file: Reader) -> Still:
    """The whole file: it has one picture."""
    (header,) = file.unpack("<I", 14)
    if header == 12:
        width, height, compression = *file.unpack("<HH", 18), 0
    else:
        width, height, _, compression = file.unpack("<IiII", 18)
    pixels = width * abs(height)
    if compression in (1, 2):
        _check_python("run-length BMP", pixels, file.size)
    return Still("BMP", width, abs(height), [(0, file.size)], 4 * pixels, 20 * pixels)


def ppm(file: Reader) -> Still:
    """The header, without its comments, and what follows."""
    head, position = file.upto(0, 4096), 0
    tokens: list[bytes] = []
    count = 3 if head[1:2] in b"14" else 4
    while len(tokens) < count:
        found = _TOKEN.match(head, position)
        if not found or found.end() == len(head):
            raise ValueError("no complete header in its first 4096 bytes")
        tokens.append(found[1])
        position = found.end()
    kind, pixels = tokens[0], int(tokens[1]) * int(tokens[2])
    depth = int(tokens[3]) if kind in (b"P5", b"P6") else 255
    if kind in (b"P1", b"P2", b"P3") or depth not in ((255, 65535) if kind == b"P5" else (255,)):
        samples = pixels * (3 if kind in (b"P3", b"P6") else 1)
        _check_python(f"PPM as text or with {depth} steps", samples, file.size)
        # Pillow copies the rest of a block for each comment in it.
        if kind in (b"P1", b"P2", b"P3") and file.upto(0, file.size).count(b"#") > MAX_SEGMENTS:
            raise LimitError(f"more than {MAX_SEGMENTS} comments")
    pieces: list[Piece] = [b" ".join(tokens) + b"\n", (position + 1, file.size)]
    return Still("PPM", int(tokens[1]), int(tokens[2]), pieces, 4 * pixels, 20 * pixels)


def _check_python(what: str, samples: int, size: int) -> None:
    if samples > PYTHON_SAMPLES or size > PYTHON_BYTES:
        raise LimitError(
            f"{what} is read up to {PYTHON_SAMPLES} samples and {PYTHON_BYTES} bytes, "
            f"this one has {samples} and {size}"
        )


def _length(piece: Piece) -> int:
    return piece[1] - piece[0] if isinstance(piece, tuple) else len(piece)
