"""Where Pillow reads the pixels of a file wrongly, and what is done about it.

Found by comparison with other decoders, which `tests/images/test_other_decoders.py` repeats.

- TIFF, uncompressed: planes of 16 bits come out as noise, planes with alpha in the colours not at
  all, subsampled YCbCr as noise, and YCbCr by JFIF's coefficients whatever the file's are. libtiff
  reads all of these, so it is made to.
- TIFF, compressed, most significant byte first: floats and 32-bit integers have their bytes swapped
- TIFF of 12 bits: on the scale of 16 bits, almost black
- TIFF of 32 bits without a sign: with one
- TIFF of more than 8 bits whose zero is white: a negative, or not at all (`headers_tiff.py`)
- TIFF with an 8-bit palette or without photometric interpretation: black, a negative (likewise)
- JPEG 2000 of more than 8 bits in colour: what rounds up to 256 becomes 0, so that white is black.
  No pixel tells which of the two it was: if there is a 0, the file is refused.
- JPEG 2000 of fewer than 8 bits: white is not 255
- PNG of some depths: the pixels are brought to 8 bits, their colour key is not
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from PIL import Image, Jpeg2KImagePlugin

_BITS, _PHOTOMETRIC, _PLANAR, _FORMAT = 258, 262, 284, 339
_YCBCR = 6
_NATIVE = {"F;32F": "F;32NF", "F;32BF": "F;32NF", "I;32S": "I;32NS", "I;32BS": "I;32NS"}
_KEY_TO_8_BITS: dict[Any, Callable[[int], int]] = {
    "L;2": lambda v: v * 85,
    "L;4": lambda v: v * 17,
    "RGB;16B": lambda v: v >> 8,
}
_WHITE_PIXEL = base64.b64decode(  # RGB of 16 bits
    "/0//UQAvAAAAAAABAAAAAQAAAAAAAAAAAAAAAQAAAAEAAAAAAAAAAAADDwEBDwEBDwEB/1IADAAAAAEAAAQEAAH/XAAEQID/"
    "kAAKAAAAAAAgAAH/k8/8MAgBP8/8MAgBP8/8MAgBP//Z"
)


class UnreadablePixels(ValueError):
    """What the pixels were is lost in decoding."""


def mend_before_decoding(image: Image.Image) -> None:
    """Correct how an image that is opened, and not yet loaded, will be decoded."""
    tags = _tiff_tags(image)
    if tags and getattr(image, "tile", None):
        _choose_tiff_decoder(image, tags)
    _widen_colour_key(image)


def mend_after_decoding(image: Image.Image, bits: int | None) -> Image.Image:
    """Correct what was decoded of a JPEG 2000 file with samples of so many bits.

    Raises:
        UnreadablePixels: it can't be known what they were.
    """
    if bits is None or bits == 8:
        return image
    if bits < 8:
        top = (1 << bits) - 1
        table = [((v >> 8 - bits) * 510 + top) // (2 * top) for v in range(256)]
        return image.point(table * len(image.getbands()))
    if not image.mode.startswith("I") and _white_is_black() and _has_zero(image):
        raise UnreadablePixels(
            f"{bits} bits in colour, and zeros in it: this Pillow decodes white as 0, so that what "
            "is black and what is white can't be told apart; pass an array from another decoder"
        )
    return image


class Grey(NamedTuple):
    """How to read an image of integers.

    Attributes:
        peak: The value of white: 65535, in a TIFF of 12 bits 4095.
        unsigned: Whether its 32 bits have no sign, which Pillow gives them.
    """

    peak: int = 65535
    unsigned: bool = False


def grey_of(image: Image.Image) -> Grey:
    """How to read it, if it is one of integers."""
    tags = _tiff_tags(image)
    bits = tuple(tags.get(_BITS, ()))
    return Grey(4095 if bits == (12,) else 65535, bits == (32,) and tags.get(_FORMAT, (1,))[0] == 1)


def is_negative(image: Image.Image) -> bool:
    """Whether an image of integers or floats from a TIFF has white as its zero."""
    deep = image.mode == "F" or image.mode.startswith("I")
    return deep and _tiff_tags(image).get(_PHOTOMETRIC) == 0


def _tiff_tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", None) or {}


def _choose_tiff_decoder(image: Any, tags: Any) -> None:
    tile = image.tile[0]
    rawmode = tile[3][0]
    if image.use_load_libtiff:
        if rawmode in _NATIVE:  # what libtiff returns, whatever the file's order
            image.tile = [tile._replace(args=(_NATIVE[rawmode], *tile[3][1:]))]
        return
    planes = tags.get(_PLANAR) == 2 and image.mode in ("RGB", "RGBA", "CMYK")
    if tags.get(_PHOTOMETRIC) == _YCBCR and image.mode in ("YCbCr", "RGB"):
        image._mode, rawmode = "RGB", "RGBX"
    elif planes:
        rawmode = image.mode + (";16N" if max(tags[_BITS]) == 16 else "")
    else:
        return
    image.use_load_libtiff = True
    whole = (0, 0, *image._tile_size)
    image.tile = [
        tile._replace(
            codec_name="libtiff", extents=whole, offset=0, args=_libtiff(rawmode, tags.offset)
        )
    ]


def _libtiff(rawmode: str, offset: int) -> tuple[Any, ...]:
    """What Pillow's decoder by libtiff is told; until some release the compression, too."""
    return (rawmode, *(("raw",) if _libtiff_is_told_the_compression() else ()), False, offset)


@cache
def _libtiff_is_told_the_compression() -> bool:
    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, "TIFF", compression="tiff_lzw")
    with Image.open(stream, formats=["TIFF"]) as image:
        told = image.tile[0][3]
    return isinstance(told, tuple) and len(told) == 4


def _widen_colour_key(image: Image.Image) -> None:
    key, widen = image.info.get("transparency"), _KEY_TO_8_BITS.get(_rawmode(image))
    if widen and isinstance(key, int | tuple):
        image.info["transparency"] = widen(key) if isinstance(key, int) else tuple(map(widen, key))


def _rawmode(image: Image.Image) -> Any:
    """How the file stores its pixels ("L;4", ...), which Pillow tells until they are decoded."""
    tile = getattr(image, "tile", None)
    args = tile[0][3] if tile else None
    return args[0] if isinstance(args, tuple) and args else args


@cache
def _white_is_black() -> bool:
    """Whether this Pillow has the fault."""
    return (
        Jpeg2KImagePlugin.Jpeg2KImageFile(io.BytesIO(_WHITE_PIXEL), "").getpixel((0, 0))
        != (255,) * 3
    )


def _has_zero(image: Image.Image) -> bool:
    return any(image.getchannel(band).getextrema()[0] == 0 for band in image.getbands()[:3])
