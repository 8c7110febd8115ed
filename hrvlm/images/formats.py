"""Which image files are opened, within which limits, and how their first frame is decoded.

A file is accepted or refused by its header, before a pixel is decoded:

- formats: those of `FORMATS`, and no other, whatever plugins Pillow has
- `max_pixels`, and `MAX_SIDE` pixels a side
- memory: `BYTES_PER_PIXEL` for each pixel of the first frame and `SPARE_BYTES` besides, whatever
  the format keeps while it decodes (canvases, coefficients, tiles, the file itself)
- time: `MAX_SECONDS` of one core, by an estimate for each format that leaves a margin to 3

Nothing but the first frame is decoded, and no metadata is read but the orientation.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import IO, Any, NamedTuple

from PIL import ExifTags, Image

from . import headers, headers_boxes, headers_tiff
from .stills import LimitError, Pieces, Reader, Still

BYTES_PER_PIXEL, SPARE_BYTES = 8, 80_000_000
MAX_SECONDS = 2.5
MAX_SIDE = 65_535

_RGB_NANOSECONDS = 9  # a pixel, from any mode to RGB on a background, and upright
# Pillow brings these PNG pixels to 8 bits, and leaves their colour key at the depth of the file.
_KEY_TO_8_BITS: dict[Any, Callable[[int], int]] = {
    "L;2": lambda v: v * 85,
    "L;4": lambda v: v * 17,
    "RGB;16B": lambda v: v >> 8,
}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class ImageError(ValueError):
    """An image that cannot be read; the message names its file or its index in the batch."""


class Decoded(NamedTuple):
    """The first frame as Pillow decodes it, and the orientation that its file gives."""

    image: Image.Image
    orientation: int | None


class _Format(NamedTuple):
    name: str
    accepts: Callable[[bytes], bool]
    header: Callable[[Reader], Still]


def _is_avif(prefix: bytes) -> bool:
    brands = [prefix[8:12], *(prefix[i : i + 4] for i in range(16, len(prefix), 4))]
    return prefix[4:8] == b"ftyp" and (b"avif" in brands or b"avis" in brands)


def _begins(*signatures: bytes) -> Callable[[bytes], bool]:
    return lambda prefix: prefix.startswith(signatures)


FORMATS = (
    _Format("AVIF", _is_avif, headers_boxes.avif),
    _Format("BMP", _begins(b"BM"), headers.bmp),
    _Format("GIF", _begins(b"GIF87a", b"GIF89a"), headers.gif),
    _Format("JPEG", _begins(b"\xff\xd8\xff"), headers.jpeg),
    _Format(
        "JPEG 2000",
        _begins(b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"),
        headers_boxes.jpeg2000,
    ),
    _Format("PNG", _begins(b"\x89PNG\r\n\x1a\n"), headers.png),
    _Format("PPM", _begins(*(b"P" + kind for kind in b"1 2 3 4 5 6 f".split())), headers.ppm),
    _Format("TIFF", _begins(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), headers_tiff.tiff),
    _Format("WebP", lambda p: p[:4] == b"RIFF" and p[8:12] == b"WEBP", headers.webp),
)


def read_header(stream: IO[bytes], label: str, max_pixels: int) -> Still:
    """What the file is, if it is within the limits (top of this file).

    Raises:
        ImageError: it is none of `FORMATS`, is damaged, or is over a limit.
    """
    file = Reader(stream, label)
    prefix = file.upto(0, 64)
    if not prefix:
        raise ImageError(f"{label} is empty (0 bytes)")
    format = next((f for f in FORMATS if f.accepts(prefix)), None)
    if format is None:
        raise ImageError(f"{label} {_unknown(prefix)}")
    try:
        still = format.header(file)
        check_size(still.width, still.height, label, max_pixels)
        _check_cost(still, format.name)
    except ImageError:
        raise
    except LimitError as error:
        raise ImageError(
            f"{label} is over the limits of a {format.name} file: {error}; a file that you trust: "
            "open it yourself and pass the Pillow image"
        ) from error
    except Exception as error:
        raise ImageError(
            f"{label} has a {format.name} header that cannot be read: {error}"
        ) from error
    return still


def check_size(width: int, height: int, label: str, max_pixels: int) -> None:
    """Accept pictures of at least one pixel and at most `max_pixels`.

    Raises:
        ImageError: it is another.
    """
    if width < 1 or height < 1:
        raise ImageError(f"{label} has no pixels: height {height}, width {width}")
    if width * height > max_pixels:
        raise ImageError(
            f"{label} is over the pixel limit: height {height} * width {width} = {height * width}, "
            f"max_pixels={max_pixels}"
        )


def _check_cost(still: Still, name: str) -> None:
    pixels = still.width * still.height
    size = f"height {still.height}, width {still.width}"
    if max(still.width, still.height) > MAX_SIDE:
        raise LimitError(f"{size}: more than {MAX_SIDE} pixels a side")
    most = BYTES_PER_PIXEL * pixels + SPARE_BYTES
    if still.memory > most:
        raise LimitError(
            f"{size}: to decode it takes about {still.memory / 1e6:.0f} MB, more than "
            f"{BYTES_PER_PIXEL} bytes a pixel and {SPARE_BYTES / 1e6:.0f} MB, {most / 1e6:.0f} MB"
        )
    seconds = (still.nanoseconds + _RGB_NANOSECONDS * pixels) / 1e9
    if seconds > MAX_SECONDS:
        raise LimitError(
            f"{size}: to decode it takes up to {seconds:.1f} s, more than {MAX_SECONDS} s"
        )


def _unknown(prefix: bytes) -> str:
    if prefix[4:8] == b"ftyp" and prefix[8:12] in _HEIF_BRANDS:
        return (
            "is a HEIF image (HEIC), which Pillow does not read: convert it to JPEG or PNG, or "
            "open it with the package pillow-heif and pass the Pillow image"
        )
    names = ", ".join(f.name for f in FORMATS)
    return f"is not an image of a format that is read ({names}): it begins with {prefix[:16]!r}"


def decode_first_frame(stream: IO[bytes], label: str, max_pixels: int) -> Decoded:
    """Decode what `read_header` accepts; the stream is left open.

    Raises:
        ImageError: as `read_header`, or the pixels are truncated or corrupt.
    """
    still = read_header(stream, label, max_pixels)
    source = io.BufferedReader(Pieces(stream, still.pieces))
    try:
        if still.format == "WEBP":
            return Decoded(_webp(source.read()), still.orientation)
        whole = still.format in ("AVIF", "JPEG2000")
        image = _open(still.format, io.BytesIO(source.read()) if whole else source)
        if image.width * image.height > still.width * still.height:
            raise ValueError(f"its decoder finds {image.height} x {image.width} pixels in it")
        _widen_colour_key(image)
        image.load()
        turned = image.getexif().get(ExifTags.Base.Orientation) if still.format == "AVIF" else None
        return Decoded(image, turned or still.orientation)
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{label}: the decoder of this format obeys PIL.Image.MAX_IMAGE_PIXELS, "
            f"whatever max_pixels is: {error}"
        ) from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ImageError(f"{label} is truncated or corrupt: {reason}") from error


def _open(name: str, stream: IO[bytes]) -> Any:
    """`Image.open` for one format, without its check against Pillow's global pixel limit.

    The check warns or raises for sizes that the caller allowed, and no argument turns it off. No
    path is given, lest Pillow map that file instead of reading the pieces of it.
    """
    if name not in Image.OPEN:
        Image.preinit()
    if name not in Image.OPEN:
        Image.init()
    factory, _ = Image.OPEN[name]
    return factory(stream, "")


def _widen_colour_key(image: Image.Image) -> None:
    """Bring the colour key to 8 bits, as Pillow does with the pixels; not loaded yet."""
    key, widen = image.info.get("transparency"), _KEY_TO_8_BITS.get(_rawmode(image))
    if widen and isinstance(key, int | tuple):
        image.info["transparency"] = widen(key) if isinstance(key, int) else tuple(map(widen, key))


def _rawmode(image: Image.Image) -> Any:
    """How the file stores its pixels ("L;4", ...), which Pillow tells until they are decoded."""
    tile = getattr(image, "tile", None)
    args = tile[0][3] if tile else None
    return args[0] if isinstance(args, tuple) and args else args


def _webp(data: bytes) -> Image.Image:
    """What Pillow's `load` does, less the decoder's two canvases by the time of the copy."""
    image = _open("WEBP", io.BytesIO(data))
    size, mode, rawmode = image.size, image.mode, image.rawmode
    frame = image._decoder.get_next()
    if frame is None:
        raise ValueError("its frame can't be decoded")
    del image
    return Image.frombuffer(mode, size, frame[0], "raw", rawmode, 0, 1)
