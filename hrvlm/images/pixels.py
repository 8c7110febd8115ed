"""The pixels of an image as bytes, at the size asked for: what every processor begins with.

By default the fast way: plain files (JPEG and PNG of a byte each of red, green and blue) are
decoded by torchvision, and torch resizes bytes. Whatever else there is, and plain files that
torchvision gives up on, goes through Pillow, by the rules of `intake.py`. With `exact` everything
does, and Pillow resizes: the fast way's pixels differ from these by at most 2 steps of 255, on
average by less than 0.1.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .fetch import unwrapped
from .formats import BYTES_PER_PIXEL, SPARE_BYTES, read_header
from .geometry import positive_int
from .intake import (
    MAX_PIXELS,
    WHITE,
    Channels,
    ImageSource,
    is_file,
    label_of,
    opened,
    rgb_color,
    rgb_of_file,
    stripes,
    upright_rgb,
)
from .stills import PiecesFile, Still

_MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
_UPRIGHT: dict[int, Callable[[Tensor], Tensor]] = {  # EXIF orientation: what brings [3, H, W] back
    2: lambda x: x.flip(2),
    3: lambda x: x.flip(1, 2),
    4: lambda x: x.flip(1),
    5: lambda x: x.transpose(1, 2),
    6: lambda x: x.flip(1).transpose(1, 2),
    7: lambda x: x.flip(1, 2).transpose(1, 2),
    8: lambda x: x.flip(2).transpose(1, 2),
}


def load_pixels(
    source: ImageSource,
    *,
    exact: bool = False,
    name: str | int | None = None,
    background: Sequence[int] = WHITE,
    max_pixels: int = MAX_PIXELS,
    channels: Channels | None = None,
) -> Tensor:
    """The bytes of an image, upright: uint8 [3, H, W], of any strides, to be read only.

    `exact` has Pillow decode files; the other arguments, and the errors, are `load_image`'s.
    """
    source = unwrapped(source)
    if exact or not is_file(source):
        rgb = upright_rgb(
            source, name=name, background=background, max_pixels=max_pixels, channels=channels
        )
        return _bytes_of(rgb)
    label, under = label_of(source, name), rgb_color("background", background)
    positive_int("max_pixels", max_pixels)
    with opened(source, label) as stream:
        still = read_header(stream, label, max_pixels)
        pixels = _decoded_by_torchvision(stream, still) if still.plain else None
        if pixels is None:
            return _bytes_of(rgb_of_file(stream, label, under, still))
    turn = _UPRIGHT.get(still.orientation or 1)
    return pixels if turn is None else turn(pixels)


def resize_pixels(
    pixels: Tensor,
    height: int,
    width: int,
    resample: int = Image.Resampling.BICUBIC,
    *,
    exact: bool = False,
) -> Tensor:
    """Antialiased, uint8 [3, H, W] to [3, height, width]: across, then down, each to 8 bits.

    On the CPU by Pillow if `exact`, else by torch's arithmetic of whole numbers. On a GPU in
    float32: a few pixels in ten thousand differ from Pillow's by one step.
    """
    size = tuple(pixels.shape[1:])
    if size == (height, width):
        return pixels
    method = Image.Resampling(resample)
    if pixels.device.type == "cpu" and exact:
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        # In one call Pillow does the same up to version 12; since 13 it chooses the order of the
        # directions by cost, which moves pixels by up to 20 steps of 255.
        across = image.resize((width, image.height), method)
        return _bytes_of(across.resize((width, height), method))
    if pixels.device.type == "cpu":
        return _interpolated(pixels[None], (height, width), method)[0]
    return _resized_on_floats(pixels, height, width, method)


def _resized_on_floats(pixels: Tensor, height: int, width: int, method: Image.Resampling) -> Tensor:
    """In two calls: in one, bicubic overshoots past 255 between the two directions."""
    batch = pixels[None].float()
    for step in ((pixels.shape[1], width), (height, width)):
        batch = _interpolated(batch, step, method).round_().clamp_(0, 255)
    return batch[0].to(torch.uint8)


def _interpolated(batch: Tensor, size: tuple[int, int], method: Image.Resampling) -> Tensor:
    return F.interpolate(batch, size, mode=_MODES[method], antialias=True)


def _bytes_of(image: Image.Image) -> Tensor:
    """Copied in stripes: Pillow hands out an image's bytes twice over, and these are a copy too."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for (_, top, _, bottom), piece in stripes(image):
        pixels[top:bottom] = np.asarray(piece)
    return torch.from_numpy(pixels).permute(2, 0, 1)


@functools.cache
def torchvision_survives_damaged_png() -> bool:
    """Whether the installed release may be given a PNG that nobody has looked into.

    0.26 raises where the pixels are damaged; in 0.29 the process ends with a segmentation fault.
    The releases between have not been tried.
    """
    from torchvision import __version__

    return tuple(map(int, re.findall(r"\d+", __version__)[:2])) < (0, 27)


def _decoded_by_torchvision(stream: IO[bytes], still: Still) -> Tensor | None:
    """The pixels of a plain file, not turned; None where Pillow has to try.

    Files that hold more than their pixels account for, within the limits of memory, are Pillow's,
    which reads them piece by piece.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg, decode_png
    except ImportError:
        return None
    if still.format == "PNG" and not torchvision_survives_damaged_png():
        return None
    pieces = PiecesFile(stream, still.pieces)
    size = pieces.seek(0, io.SEEK_END)
    if not size or still.memory + size > BYTES_PER_PIXEL * still.width * still.height + SPARE_BYTES:
        return None
    pieces.seek(0)
    data = torch.empty(size, dtype=torch.uint8)
    read = pieces.readinto(data.numpy().data)
    try:
        decode = decode_jpeg if still.format == "JPEG" else decode_png
        decoded = decode(data[:read], mode=ImageReadMode.RGB)
    except RuntimeError:  # Pillow says what is wrong with it, or reads it after all
        return None
    return decoded if tuple(decoded.shape) == (3, still.height, still.width) else None
