"""The image processors for transformers: torchvision and Pillow backends, one geometry.

Both give the packed layout of the encoder: `pixel_values` float32 [N, 3 * p * p], the patches of
all images one after the other, and `image_grid_hw` int64 [B, 2], the patch grid of each image; the
token grid is `image_grid_hw // pixel_shuffle_factor`. The base classes are those of transformers
5.17 (`image_processing_backends.py`); the split into files follows `models/qwen2_vl`.

Importing this file imports transformers, and torchvision where it is installed. Where it is not,
`VLMImageProcessorPil` works and `VLMImageProcessor` raises when it is made. To let
`AutoImageProcessor` load both:

    AutoImageProcessor.register(
        VLMConfig,
        image_processor_classes={"torchvision": VLMImageProcessor, "pil": VLMImageProcessorPil},
        exist_ok=True,
    )
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs
from transformers.utils.import_utils import is_torchvision_available

from hrvlm_kernels import normalize_patchify

from ..files import save_whole
from ..machine import first_line
from .fetch import readable
from .geometry import (
    Geometry,
    positive_int,
    positive_number,
    shuffled_grid,
    token_grid,
    true_or_false,
)
from .intake import (
    MAX_PIXELS,
    WHITE,
    Channels,
    ImageError,
    ImageSource,
    rgb_color,
)
from .patches import patchify
from .pixels import load_pixels, resize_pixels
from .processor import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    check_normalization,
    normalize,
)

_LOGGER = logging.getLogger(__name__)
ImageSources: TypeAlias = "ImageSource | list[ImageSources] | tuple[ImageSources, ...]"

# By these two, Pillow and torch resize alike.
_RESAMPLING = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_CHANNELS: dict[Any, Channels | None] = {
    None: None,
    "channels_first": "first",
    "channels_last": "last",
}
_RESIZED = (
    "a whole image is resized to what max_img_size, patch_size, pixel_shuffle_factor and "
    "allow_upscale say"
)
# Options of transformers that have no meaning here: the value they may have, and why no other.
_NOT_OURS = {
    "size": (None, _RESIZED),
    "crop_size": (None, _RESIZED),
    "pad_size": (None, _RESIZED),
    "do_center_crop": (False, _RESIZED),
    "do_pad": (False, _RESIZED),
    "do_convert_rgb": (True, "every image becomes RGB"),
    "image_seq_length": (None, _RESIZED),
    "data_format": ("channels_first", "packed patches have one order, that of patchify"),
}
_SWITCHES = ("do_resize", "do_rescale", "do_normalize", "allow_upscale", "exact")
# What transformers writes into a saved configuration beside the options.
_SERVICE_KEYS = {"image_processor_type", "processor_class", "feature_extractor_type", "auto_map"}


class VLMImageProcessorKwargs(ImagesKwargs, total=False):
    """The options beside those of every image processor; `VLMImageProcessor` explains them."""

    # Any: they are checked here, by one rule however they are given, and not by transformers too.
    patch_size: Any
    pixel_shuffle_factor: Any
    max_img_size: Any
    allow_upscale: Any
    background: Any
    max_pixels: Any
    exact: Any


class _PackedImageProcessor(BaseImageProcessor):
    """What both backends share: everything but the resizing.

    `preprocess` replaces the whole of the base class's, so that a batch is loaded and packed image
    by image, and every error says which image it is about.
    """

    valid_kwargs = VLMImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_hw"]

    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    resample = Image.Resampling.BICUBIC
    image_mean = IMAGENET_MEAN
    image_std = IMAGENET_STD
    patch_size = 16
    pixel_shuffle_factor = 4
    max_img_size = 2048
    allow_upscale = True
    background = WHITE
    max_pixels = MAX_PIXELS
    exact = False

    def __init__(self, **kwargs: Any) -> None:
        options = {k: v for k, v in kwargs.items() if k not in _SERVICE_KEYS and k[0] != "_"}
        self._options(options)
        super().__init__(**kwargs)
        self.background = rgb_color("background", self.background)  # a list in a saved file

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; a damaged file raises ValueError."""
        try:
            return super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        except OSError:
            raise  # it names the file
        except Exception as error:
            raise ValueError(
                f"{pretrained_model_name_or_path}: processor_config.json or "
                f"preprocessor_config.json holds no options ({first_line(error)})"
            ) from error

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> list[str]:
        """As in transformers, but all files or none."""
        return save_whole(super().save_pretrained, save_directory, *args, **kwargs)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers: from what a file holds, and options that override it.

        An option of the file that is unknown here, as one of another release, is kept as an
        attribute, with a warning.
        """
        known = {*cls.valid_kwargs.__annotations__, *_SERVICE_KEYS}
        stored = dict(image_processor_dict)
        others = {k: stored.pop(k) for k in list(stored) if k not in known and k[0] != "_"}
        loaded = super().from_dict(stored, **kwargs)
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        if others:
            _LOGGER.warning(
                "%s: the file has options that this release does not know, and that change "
                "nothing: %s",
                cls.__name__,
                ", ".join(sorted(others)),
            )
        for name, value in others.items():
            setattr(processor, name, value)
        return loaded

    def preprocess(self, images: ImageSources, *args: Any, **kwargs: Any) -> BatchFeature:
        """Pack images into `pixel_values` [N, 3 * p * p] and `image_grid_hw` [B, 2].

        Args:
            images: one image, or lists of images nested in any way; an image is whatever
                `load_image` takes, or base64, and an array or tensor with four axes is a list of
                them.
            *args: none.
            **kwargs: any option, for this call only, and `return_tensors`: "pt" or "np".

        Raises:
            TypeError: an unknown option, or an image of an unknown type.
            ValueError: there is no image, an image is bad (named by its index in the flat list),
                an option is out of range, or `do_resize=False` and a side is not a multiple of
                `patch_size * pixel_shuffle_factor`.
        """
        if args:
            raise TypeError(f"{type(self).__name__}: options are given by name, got {args!r}")
        options = self._options(kwargs)
        sources = list(_flat(images))
        if not sources:
            raise ValueError("images: expected at least one image, got none")
        packs, grids = [], []
        for pixels, grid in _in_threads(partial(self._opened, options), sources):
            packs.append(_patches(pixels, options))
            grids.append(grid)
        data = {"pixel_values": torch.cat(packs), "image_grid_hw": torch.tensor(grids)}
        return BatchFeature(data=data, tensor_type=options["return_tensors"])

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """The images as they are: `preprocess` reads them, with EXIF, alpha and limits as asked.

        The base class, which a processor of transformers calls first, would read paths and URLs in
        ways of its own.
        """
        return image_url_or_urls

    def get_patch_grid(
        self, height: int, width: int, images_kwargs: dict[str, Any] | None = None
    ) -> tuple[int, int]:
        """(hp, wp) of an upright image of height x width pixels; `images_kwargs` as in a call."""
        options = self._options(images_kwargs or {})
        return self._geometry(height, width, options, "image").patch_grid

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: dict[str, Any] | None = None
    ) -> int:
        """Patches (not tokens) of an image, hp * wp: the method that serving engines ask for."""
        hp, wp = self.get_patch_grid(height, width, images_kwargs)
        return hp * wp

    def _options(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """Every option, checked; as everywhere in transformers, None is the default."""
        names = self.valid_kwargs.__annotations__
        if unknown := sorted(set(overrides) - set(names)):
            raise TypeError(f"{type(self).__name__}: unknown options {', '.join(unknown)}")
        options: dict[str, Any] = {name: getattr(self, name, None) for name in names}
        options |= {name: value for name, value in overrides.items() if value is not None}
        for name, (only, why) in _NOT_OURS.items():
            if options[name] is not None and options[name] != only:
                raise ValueError(f"{name}={options[name]!r}: not supported, {why}")
        for name in _SWITCHES:
            true_or_false(name, options[name])
        if options["resample"] not in _RESAMPLING:
            raise ValueError(f"resample={options['resample']!r}: expected one of {_RESAMPLING}")
        if options["input_data_format"] not in _CHANNELS:
            raise ValueError(
                f"input_data_format={options['input_data_format']!r}: expected "
                '"channels_first", "channels_last" or None'
            )
        positive_number("rescale_factor", options["rescale_factor"])
        mean, std = (_spread(options[name]) for name in ("image_mean", "image_std"))
        options["image_mean"], options["image_std"] = check_normalization(mean, std)
        rgb_color("background", options["background"])
        for name in ("max_pixels", "max_img_size", "patch_size", "pixel_shuffle_factor"):
            options[name] = positive_int(name, options[name])
        if options["device"] is not None:
            options["device"] = _device(options["device"])
        unit = options["patch_size"] * options["pixel_shuffle_factor"]
        self._geometry(unit, unit, options, "image")
        return options

    def _geometry(self, height: int, width: int, options: dict[str, Any], label: str) -> Geometry:
        p, s = options["patch_size"], options["pixel_shuffle_factor"]
        if options["do_resize"]:
            return token_grid(
                height,
                width,
                max_img_size=options["max_img_size"],
                patch_size=p,
                factor=s,
                allow_upscale=options["allow_upscale"],
            )
        if height % (p * s) or width % (p * s):
            raise ImageError(
                f"{label}: height {height}, width {width}; do_resize=False needs multiples of "
                f"patch_size * pixel_shuffle_factor = {p} * {s} = {p * s}"
            )
        grid = height // p, width // p
        return Geometry(height, width, grid, shuffled_grid(grid, s))

    def _opened(
        self, options: dict[str, Any], index: int, source: ImageSource
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """Image `index` of a call at its size, uint8 [3, H, W], and its patch grid."""
        pixels = load_pixels(
            readable(source, f"image {index}", fetch=False),
            exact=options["exact"],
            name=index,
            background=options["background"],
            max_pixels=options["max_pixels"],
            channels=_CHANNELS[options["input_data_format"]],
        ).to(options["device"])
        _, height, width = pixels.shape
        size = self._geometry(height, width, options, f"image {index}")
        pixels = resize_pixels(
            pixels, size.height, size.width, options["resample"], exact=options["exact"]
        )
        return pixels, size.patch_grid


class VLMImageProcessorPil(_PackedImageProcessor, PilBackend):
    """`VLMImageProcessor` with `exact=True` unless told otherwise; it needs no torchvision."""

    exact = True


class VLMImageProcessor(_PackedImageProcessor, TorchvisionBackend):
    """Images of any shapes into packed patches, on a GPU if asked.

    Every option can be given here, in a call, or in `from_pretrained`:

        patch_size: side of a patch in pixels (16).
        pixel_shuffle_factor: the projector's factor (4).
        max_img_size: limit of the longer side in pixels (2048).
        allow_upscale: see `token_grid` (True).
        background: the colour under transparent pixels (white).
        max_pixels: the largest image that is decoded, height * width (178 956 970).
        image_mean, image_std: per channel, on the scale of [0, 1] (ImageNet).
        do_resize: False takes the image as it is, if it is a multiple of what a token covers.
        do_rescale, rescale_factor, do_normalize: (pixel * rescale_factor - mean) / std; both off
            leave 0 to 255.
        resample: bicubic or bilinear, antialiased (bicubic).
        exact: True decodes and resizes with Pillow alone (on a GPU it only decodes); by default a
            faster way, whose pixels differ by at most 2 steps of 255.
        input_data_format: where the channels of an array are, if its shape does not tell.
        device: where to resize ("cuda"); the result stays there.

    Float images must lie in [0, 1]; they are brought to 8 bits first, so rescaling is right for
    them too. `disable_grouping` has no effect: images are packed, not stacked.

    Raises:
        ImportError: torchvision is not installed.
        TypeError: an unknown option.
        ValueError: an option is out of range, or one of transformers' that has no meaning here
            (`size`, cropping, padding).
    """

    def __init__(self, **kwargs: Any) -> None:
        if not is_torchvision_available():
            raise ImportError("VLMImageProcessor needs torchvision; VLMImageProcessorPil does not")
        super().__init__(**kwargs)


def _in_threads(
    work: Callable[[int, ImageSource], tuple[torch.Tensor, tuple[int, int]]],
    sources: list[ImageSource],
) -> Iterator[tuple[torch.Tensor, tuple[int, int]]]:
    """The results in order, by as many threads as torch takes; the first error is raised."""
    threads = min(torch.get_num_threads(), len(sources))
    if threads < 2:
        yield from map(work, range(len(sources)), sources)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, range(len(sources)), sources)


def _device(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r:.60}: {first_line(error)}") from error


def _spread(value: Any) -> Any:
    return [value] * 3 if isinstance(value, int | float) else value


def _flat(images: Any) -> Iterator[Any]:
    nested = isinstance(images, list | tuple)
    if nested or (isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4):
        for image in images:
            yield from _flat(image) if nested else (image,)
    else:
        yield images


def _patches(pixels: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Scaled and cut; on a GPU, and by the usual scale, in one kernel."""
    patch_size, mean, std = (options[name] for name in ("patch_size", "image_mean", "image_std"))
    scale = options["rescale_factor"] if options["do_rescale"] else 1.0
    if not options["do_normalize"]:
        return patchify(pixels.float() * scale, patch_size)
    if scale == 1 / 255:
        return normalize_patchify(pixels[None], patch_size, mean, std)[0]
    return patchify(normalize(pixels, mean, std, scale), patch_size)
