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

from . import headers, headers_boxes, headers_heif, headers_jpeg2000, headers_tiff
from .pillow_faults import UnreadablePixels, mend_after_decoding, mend_before_decoding
from .stills import LimitError, PiecesFile, Reader, Still

BYTES_PER_PIXEL, SPARE_BYTES = 8, 80_000_000
MAX_SECONDS = 2.5
MAX_SIDE = 65_535

_RGB_NANOSECONDS = 9  # a pixel, from any mode to RGB on a background, and upright
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class ImageError(ValueError):
    """An image that cannot be read; the message names its file or its index in the batch."""


class Decoded(NamedTuple):
    """The first frame as Pillow decodes it, the orientation of its file, whether 0 is white."""

    image: Image.Image
    orientation: int | None
    negative: bool


class _Format(NamedTuple):
    name: str
    accepts: Callable[[bytes], bool]
    header: Callable[[Reader], Still]


def _has_brand(*brands: bytes) -> Callable[[bytes], bool]:
    def accepts(prefix: bytes) -> bool:
        named = [prefix[8:12], *(prefix[i : i + 4] for i in range(16, len(prefix), 4))]
        return prefix[4:8] == b"ftyp" and any(brand in named for brand in brands)

    return accepts


def _begins(*signatures: bytes) -> Callable[[bytes], bool]:
    return lambda prefix: prefix.startswith(signatures)


FORMATS = (
    _Format("AVIF", _has_brand(b"avif", b"avis"), headers_boxes.avif),
    _Format("BMP", _begins(b"BM"), headers.bmp),
    _Format("GIF", _begins(b"GIF87a", b"GIF89a"), headers.gif),
    _Format("HEIF", _has_brand(*_HEIF_BRANDS), headers_heif.heif),
    _Format("JPEG", _begins(b"\xff\xd8\xff"), headers.jpeg),
    _Format(
        "JPEG 2000",
        _begins(b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"),
        headers_jpeg2000.jpeg2000,
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
    names = ", ".join(f.name for f in FORMATS)
    return f"is not an image of a format that is read ({names}): it begins with {prefix[:16]!r}"


def decode_first_frame(stream: IO[bytes], label: str, still: Still) -> Decoded:
    """Decode what `read_header` accepted; the stream is left open.

    Raises:
        ImageError: the pixels are truncated or corrupt, or can't be read here.
    """
    source = PiecesFile(stream, still.pieces)
    try:
        if still.format == "WEBP":
            return Decoded(_webp(source.read()), still.orientation, False)
        if still.format == "HEIF":
            return Decoded(_heif(source.read(), label), None, False)
        whole = still.format in ("AVIF", "JPEG2000")
        try:
            image = _open(still.format, io.BytesIO(source.read()) if whole else source)
        except SyntaxError as error:
            if still.kind is None:
                raise
            raise ImageError(
                f"{label} has pixels that Pillow does not read: {still.kind}"
            ) from error
        if image.width * image.height > still.width * still.height:
            raise ValueError(f"its decoder finds {image.height} x {image.width} pixels in it")
        mend_before_decoding(image)
        image.load()
        image = mend_after_decoding(image, still.bits)
        turned = image.getexif().get(ExifTags.Base.Orientation) if still.format == "AVIF" else None
        return Decoded(image, turned or still.orientation, still.negative)
    except (MemoryError, ImageError):
        raise
    except UnreadablePixels as error:
        raise ImageError(f"{label} can't be read: {error}") from error
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


def _webp(data: bytes) -> Image.Image:
    """What Pillow's `load` does, less the decoder's two canvases by the time of the copy."""
    image = _open("WEBP", io.BytesIO(data))
    size, mode, rawmode = image.size, image.mode, image.rawmode
    frame = image._decoder.get_next()
    if frame is None:
        raise ValueError("its frame can't be decoded")
    del image
    return Image.frombuffer(mode, size, frame[0], "raw", rawmode, 0, 1)


def _heif(data: bytes, label: str) -> Image.Image:
    """Upright: turning is part of the format, and its decoder does it."""
    try:
        from pillow_heif import open_heif
    except ImportError as error:
        raise ImageError(
            f"{label} is a HEIF image (HEIC), which Pillow does not read: install pillow-heif "
            "(pip install 'hrvlm[heif]'), or convert it to JPEG or PNG"
        ) from error
    image: Image.Image = open_heif(io.BytesIO(data)).to_pillow()
    image.info.clear()  # its EXIF says how to turn what is turned already
    return image


def image_endings() -> frozenset[str]:
    """Endings of the names of files that may be opened, in lower case: ``.png``, ``.jpg``, ..."""
    Image.init()
    return frozenset(end for end, name in Image.EXTENSION.items() if name in Image.OPEN)
