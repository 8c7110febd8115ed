"""Any image in, upright 8-bit RGB out.

What a picture means is decided here, once, for every way into the package:

- orientation: EXIF is applied, all eight values
- alpha (RGBA, LA, palettes, colour keys): composited on a background colour,
  `round((c * a + bg * (255 - a)) / 255)`
- 16 bits (`I;16` in every byte order, `I`, uint16 arrays): `round(v / 257)`. Pillow's 32-bit mode
  `I` is how it hands out 16-bit files, so it is read on that scale whatever it holds, and refused
  outside 0..65535
- float (mode `F`, float arrays): must lie in [0, 1]; `floor(v * 255 + 1/2)`. Values that were
  normalised already, or that run to 255, are refused: guessing the scale from the contents would
  turn a dark picture into a bright one
- more than one frame (GIF, TIFF, APNG, WebP, AVIF): the first one, and no other is decoded; of a
  Pillow image, the one it stands at
- colour profiles are not applied, as in the other libraries that feed such models

Which files are opened, and within which limits: `formats.py`. A Pillow image was opened by
the caller, and only its size is judged here.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from PIL import ExifTags, Image

from .fetch import fetch_image, is_data_uri, shortened, unwrapped
from .formats import ImageError as ImageError  # part of this module's interface, too
from .formats import check_size, decode_first_frame, read_header
from .geometry import positive_int
from .pillow_faults import Grey, grey_of, is_negative, mend_before_decoding
from .stills import PiecesFile, Still

if TYPE_CHECKING:
    import torch

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]"
    " | Image.Image | np.ndarray | torch.Tensor | Mapping[str, Any]"
)
Channels: TypeAlias = Literal["first", "last"]

MAX_PIXELS = 178_956_970  # Pillow's own default: 512 MiB of RGB
MAX_STREAM_BYTES = 64_000_000  # of a stream that can't seek, before its header is read
WHITE = (255, 255, 255)

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_CHANNEL_COUNTS = (1, 3, 4)
_UPRIGHT = {  # EXIF orientation: what brings the picture back
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STRIPE_PIXELS = 1 << 20


def load_image(
    source: ImageSource,
    *,
    name: str | int | None = None,
    background: Sequence[int] = WHITE,
    max_pixels: int = MAX_PIXELS,
    channels: Channels | None = None,
) -> Image.Image:
    """The image as a new, upright, 8-bit RGB Pillow image without metadata (rules: top of file).

    `max_pixels` and the limits of `formats.py` decide about a file by its header, before a pixel
    is decoded. Pillow's global `MAX_IMAGE_PIXELS` is not changed, and neither warns nor raises
    here; only the decoders of TIFF and WebP look at it again by themselves, so that pictures of
    these formats which are larger than twice that global are refused until the caller raises it.

    Args:
        source: a path; the bytes of a file; a data URI; a binary file object (read from its start
            if it can seek, else up to `MAX_STREAM_BYTES`; left open); a Pillow image (not
            modified); an array or tensor: uint8, uint16, bool, or float in [0, 1], shaped [H, W],
            [H, W, C] or [C, H, W] with C = 1 (grey), 3 (RGB) or 4 (RGBA); or one of these as the
            ``bytes`` or ``path`` of an object, as `datasets` has them.
        name: what to call the image in errors; a whole number is its index in the batch.
        background: the colour under transparent pixels, three numbers from 0 to 255.
        max_pixels: the largest height * width that is accepted.
        channels: where the channels of an array are, "first" or "last"; needed for shapes that can
            be read both ways, such as 3x5x3. Other sources have no use for it.

    Raises:
        ImageError: (a ValueError) empty, truncated, corrupt or no image of a known format; over
            `max_pixels` or another limit; a URL; an array whose shape, dtype or values are not as
            above.
        OSError: the file cannot be opened (FileNotFoundError, PermissionError, ...).
        TypeError: `source` is of another type, or a file object in text mode.
        ValueError: `background`, `max_pixels` or `channels` is out of range.
    """
    options: Any = {"background": background, "max_pixels": max_pixels, "channels": channels}
    rgb = upright_rgb(source, name=name, **options)
    return rgb.copy() if rgb is unwrapped(source) else rgb


def upright_rgb(
    source: ImageSource,
    *,
    name: str | int | None = None,
    background: Sequence[int] = WHITE,
    max_pixels: int = MAX_PIXELS,
    channels: Channels | None = None,
) -> Image.Image:
    """As :func:`load_image`, to be read only: an image that comes from there is returned itself."""
    source = unwrapped(source)
    label = label_of(source, name)
    under = rgb_color("background", background)
    positive_int("max_pixels", max_pixels)
    if channels not in (None, "first", "last"):
        raise ValueError(f'channels={channels!r}: expected "first", "last" or None')
    if isinstance(source, Image.Image):
        check_size(source.width, source.height, label, max_pixels)
        if _is_plain(source):
            return source
        with _failures_named(label, "is truncated or corrupt"):
            mend_before_decoding(source)
            source.load()
        # Not earlier: the TIFF decoder turns the pixels while it loads them, and drops the tag.
        return _upright(_to_rgb(source, label, under), _orientation(source, label))
    if isinstance(source, np.ndarray) or _is_tensor(source):
        return _to_rgb(_from_array(source, label, max_pixels, channels), label, under)
    with opened(source, label) as stream:
        return rgb_of_file(stream, label, under, read_header(stream, label, max_pixels))


def rgb_of_file(
    stream: IO[bytes], label: str, background: tuple[int, int, int], still: Still
) -> Image.Image:
    """The first frame, upright, by its header; errors are those of :func:`load_image`."""
    image, orientation, negative = decode_first_frame(stream, label, still)
    rgb = _to_rgb(image, label, background, negative)
    del image  # so that no more than two pictures are held while one is turned
    return _upright(rgb, orientation)


def is_file(source: ImageSource) -> bool:
    """Whether it is none of the images that are decoded already."""
    return not isinstance(source, Image.Image | np.ndarray) and not _is_tensor(source)


def _is_plain(image: Image.Image) -> bool:
    """Whether an image is in memory, RGB, without metadata, and not marked as turned."""
    plain = type(image) is Image.Image and image.mode == "RGB" and not image.info
    return plain and _orientation(image, "image") not in _UPRIGHT


def _is_tensor(source: Any) -> bool:
    """Whether it is torch's, which is not imported for it: a tensor's torch is there already."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def rgb_color(argument: str, color: Sequence[int]) -> tuple[int, int, int]:
    """The color as three ints from 0 to 255.

    Raises:
        ValueError: `color` is anything else; `argument` names it.
    """
    try:
        red, green, blue = (int(c) for c in color if int(c) == c and 0 <= c <= 255)
    except (TypeError, ValueError):
        raise ValueError(
            f"{argument}={color!r}: expected red, green and blue, whole numbers from 0 to 255"
        ) from None
    return red, green, blue


def label_of(source: Any, name: str | int | None) -> str:
    """What errors call a source: its name or index in the batch, and its file."""
    path = source
    if not isinstance(source, str | os.PathLike):
        path = getattr(source, "filename" if isinstance(source, Image.Image) else "name", "")
    path = shortened(path) if isinstance(path, str) else path
    file = repr(os.fspath(path)) if path and isinstance(path, str | os.PathLike) else ""
    if len(file) > 300:
        file = f"{file[:300]}..."
    if name is None:
        return file or "image"
    subject = f"image {name}" if isinstance(name, int) else name
    return f"{subject} ({file})" if file else subject


@contextmanager
def _failures_named(label: str, what: str) -> Iterator[None]:
    """Pillow raises almost anything on bad data; all of it leaves here with the image's name."""
    try:
        yield
    except (MemoryError, ImageError):
        raise
    except Exception as error:
        raise ImageError(f"{label} {what}: {str(error) or type(error).__name__}") from error


@contextmanager
def opened(source: Any, label: str) -> Iterator[IO[bytes]]:
    """The file as a stream that can seek."""
    if isinstance(source, str | os.PathLike):
        if isinstance(source, str) and is_data_uri(source):
            yield io.BytesIO(fetch_image(source, label))
            return
        if isinstance(source, str) and _URL.match(source):
            raise ImageError(f"{label} is a URL: download it first, then pass its path or bytes")
        with _file(source, label) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ImageError(f"{label} is a pipe or a device: expected a regular file")
            yield stream
        return
    if isinstance(source, bytes | bytearray | memoryview):
        yield PiecesFile(None, [memoryview(source).cast("B")])
        return
    if not callable(getattr(source, "read", None)):
        raise TypeError(
            f"{label}: expected a path, bytes, a binary file object, a Pillow image, a numpy array "
            f"or a torch tensor, got {type(source).__name__}"
        )
    start = source.read(0)
    if not isinstance(start, bytes):
        raise TypeError(
            f"{label}: expected a file object in binary mode, its read() gave "
            f"{type(start).__name__}"
        )
    if hasattr(source, "seekable") and source.seekable():
        yield source
        return
    data = start
    while len(data) <= MAX_STREAM_BYTES and (more := source.read(1 << 20)):
        data += more
    if len(data) > MAX_STREAM_BYTES:
        raise ImageError(
            f"{label}: more than {MAX_STREAM_BYTES} bytes in a stream that can't seek; save it to "
            "a file first"
        )
    yield io.BytesIO(data)


def _file(path: str | os.PathLike[str], label: str) -> IO[bytes]:
    try:
        return open(path, "rb", opener=_without_waiting)
    except (OSError, ValueError) as error:  # a ValueError has a character that no path has
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise
        raise ImageError(
            f"{label} can't be a path; an image in base64: pass its bytes, or a data URI"
        ) from error


def _without_waiting(path: str, flags: int) -> int:
    """A descriptor; of a pipe, too, to which nobody writes."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _upright(rgb: Image.Image, orientation: Any) -> Image.Image:
    turn = _UPRIGHT.get(orientation)
    upright = rgb if turn is None else rgb.transpose(turn)
    upright.info.clear()  # an orientation left in it would turn the image again, next time
    return upright


def _orientation(image: Image.Image, label: str) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # there is no one exception for bad EXIF, and the pixels are good
        warnings.warn(f"{label}: taken as upright, its EXIF is unreadable: {error}", stacklevel=3)
        return 1


def _to_rgb(
    image: Image.Image, label: str, background: tuple[int, int, int], negative: bool = False
) -> Image.Image:
    """In stripes, so that what lies between the two pictures is small."""
    invert = (lambda v: 255 - v) if negative or is_negative(image) else None
    grey = grey_of(image)
    with _failures_named(label, f"of mode {image.mode} cannot be converted to RGB"):
        rgb = Image.new("RGB", image.size)
        for box, piece in stripes(image):
            stripe = _stripe_to_rgb(piece, label, background, grey)
            stripe = stripe.point(invert) if invert else stripe
            if piece is image:
                return stripe
            rgb.paste(stripe, box)
        return rgb


def stripes(image: Image.Image) -> Iterator[tuple[tuple[int, int, int, int], Image.Image]]:
    """Boxes over the whole width with what is in them; of a small image one, and itself."""
    rows = max(1, _STRIPE_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        yield box, image if rows >= image.height else image.crop(box)


def _stripe_to_rgb(
    image: Image.Image, label: str, background: tuple[int, int, int], depth: Grey
) -> Image.Image:
    if image.mode == "F":
        return Image.fromarray(_floats_to_uint8(np.asarray(image), label)).convert("RGB")
    if image.mode == "I" or image.mode.startswith("I;"):
        values = np.asarray(image)
        if depth.unsigned:
            values = values.view(np.uint32)
        grey = Image.fromarray(_integers_to_uint8(values, label, depth.peak)).convert("RGB")
        key = image.info.get("transparency")
        return grey if key is None else _on(background, grey, Image.fromarray(values != key))
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "P":  # Pillow writes the palette's alpha into the image that it converts
        image = image.copy()
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    return _on(background, rgba.convert("RGB"), rgba.getchannel("A"))


def _on(background: tuple[int, int, int], rgb: Image.Image, alpha: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", rgb.size, background)
    canvas.paste(rgb, mask=alpha)
    return canvas


def _from_array(source: Any, label: str, max_pixels: int, channels: Channels | None) -> Image.Image:
    """An image of mode L, RGB or RGBA."""
    if isinstance(source, np.ndarray):
        array = source
    else:
        try:
            tensor = source.detach().cpu()
            array = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
        except (TypeError, NotImplementedError, RuntimeError) as error:
            raise ImageError(
                f"{label}: a {source.layout} tensor of {source.dtype} on {source.device} has no "
                f"pixels that can be read: {error}"
            ) from error
    array = _channels_last(array, label, channels)
    check_size(array.shape[1], array.shape[0], label, max_pixels)
    pixels = np.ascontiguousarray(_to_uint8(array, label))
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _channels_last(array: np.ndarray, label: str, channels: Channels | None) -> np.ndarray:
    """The array as [H, W, C]; which axis holds the channels has to be beyond doubt."""
    if array.ndim == 2:
        return array[:, :, None]
    shape = "x".join(map(str, array.shape))
    if array.ndim != 3:
        raise ImageError(
            f"{label}: expected an array [H, W], [H, W, C] or [C, H, W], got {array.ndim} axes"
            + (f" ({shape})" if shape else "")
        )
    if 0 in array.shape:
        raise ImageError(f"{label} has no pixels: shape {shape}")
    possible = {
        "first": array.shape[0] in _CHANNEL_COUNTS,
        "last": array.shape[2] in _CHANNEL_COUNTS,
    }
    if channels is None and all(possible.values()):
        raise ImageError(
            f"{label}: shape {shape} can be read as [H, W, C] and as [C, H, W]; "
            'say which with channels="last" or channels="first"'
        )
    where = channels or ("first" if possible["first"] else "last")
    if not possible[where]:
        axis = f"as its {channels}" if channels else "as its first or last"
        raise ImageError(f"{label}: shape {shape} has no axis of 1, 3 or 4 channels {axis}")
    return array.transpose(1, 2, 0) if where == "first" else array


def _to_uint8(values: np.ndarray, label: str) -> np.ndarray:
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "b":
        return values.astype(np.uint8) * 255
    if kind == "u" and size == 1:
        return values
    if kind == "u" and size == 2:
        return _integers_to_uint8(values, label)
    if kind == "f":
        return _floats_to_uint8(values, label)
    raise ImageError(
        f"{label}: dtype {values.dtype} has no agreed range; "
        "expected uint8, uint16, bool, or float in [0, 1]"
    )


def _integers_to_uint8(values: np.ndarray, label: str, peak: int = 65535) -> np.ndarray:
    """round(v * 255 / peak) for v in 0..peak: 65535, or 4095."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > peak:
        depth = peak.bit_length()
        raise ImageError(f"{label}: expected {depth}-bit pixels, 0 to {peak}, got {low} to {high}")
    return ((values.astype(np.uint32) * 510 + peak) // (2 * peak)).astype(np.uint8)


def _floats_to_uint8(values: np.ndarray, label: str) -> np.ndarray:
    """floor(v * 255 + 1/2) for v in [0, 1], give or take half a step of rounding noise."""
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError(f"{label}: float pixels contain NaN or infinity")
    if low <= -0.5 / 255 or high >= 255.5 / 255:
        raise ImageError(
            f"{label}: expected float pixels in [0, 1], got {low:.6g} to {high:.6g} "
            "(0 to 255: pass uint8; normalised: pass the picture as it was before)"
        )
    wide = values.astype("float32" if values.dtype.itemsize <= 4 else "float64")
    # float32 rounds up to 256 just below the bound
    return np.clip(np.floor(wide * 255 + 0.5), 0, 255).astype(np.uint8)
