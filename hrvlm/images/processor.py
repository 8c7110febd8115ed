"""From an image to the numbers an encoder takes: load, resize, normalise.

`get_image_processor` keeps nanoVLM's name and its two modes (`data/processors.py`); what it returns
is normalised in both. The processors for transformers, with the same geometry and numbers, are in
`transformers_processor.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, NamedTuple

from .geometry import (
    Geometry,
    TileGeometry,
    positive_int,
    tile_grid,
    token_grid,
    true_or_false,
)
from .intake import (
    MAX_PIXELS,
    WHITE,
    Channels,
    ImageSource,
    rgb_color,
)

if TYPE_CHECKING:  # else imported when it is used: who decodes in a process of its own needs none
    import torch


class Normalization(NamedTuple):
    """Mean and standard deviation of red, green and blue, on the scale of [0, 1].

    Attributes:
        mean: subtracted first.
        std: divided by then.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SAT493M = Normalization((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))  # DINOv3's satellite models
SIGLIP = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = Normalization((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# What stands in the names of checkpoints, and of architectures, that were trained with each.
_KNOWN = (
    (SAT493M, ("sat493m",)),
    (SIGLIP, ("siglip", "idefics3", "smolvlm", "lfm2-vl", "qwen3_vl", "qwen3-vl")),
    (CLIP, ("pixtral", "qwen2_vl", "qwen2-vl", "qwen2_5_vl", "qwen2.5-vl", "glm4v", "glm-4.1v")),
    (IMAGENET, ("dinov2", "dinov3")),
)
IMAGENET_MEAN, IMAGENET_STD = IMAGENET


def normalization_for(name: str) -> Normalization:
    """The mean and std that a family of checkpoints was trained with, by the checkpoint's name.

    "sat493m" in the name (`facebook/dinov3-vitl16-pretrain-sat493m`) gives DINOv3's satellite
    statistics, "siglip" (and Idefics 3, SmolVLM, Qwen3-VL) 0.5 and 0.5, Pixtral, Qwen2-VL,
    Qwen2.5-VL and GLM-4.1V CLIP's, and every other name ImageNet's, which are those of DINOv2, the
    other DINOv3 models and most ViTs. Upper and lower case are the same.

    Raises:
        TypeError: it is no text.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected the name of a checkpoint, got {type(name).__name__}")
    return known_normalization(name) or IMAGENET


def known_normalization(name: str) -> Normalization | None:
    """As :func:`normalization_for`, but None for a name that says nothing."""
    lowered = name.lower()
    return next((n for n, words in _KNOWN if any(word in lowered for word in words)), None)


def normalize(
    pixels: torch.Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    scale: float = 1 / 255,
) -> torch.Tensor:
    """(pixel * scale - mean) / std, float32, for pixels [3, H, W] of any dtype."""
    import torch

    center, spread = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (mean, std))
    numbers = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    return numbers.copy_(pixels).mul_(scale).sub_(center).div_(spread)


@dataclass(frozen=True)
class ImageProcessor:
    """Makes of one image what the encoder takes; `get_image_processor` is another name for it.

    A call takes everything that `load_image` does, and its keyword arguments `name` and `channels`.

    `single_image_mode=True` gives `(pixels, (gh, gw))`: float32 [3, H, W], normalised, at the size
    of `token_grid`, with its token grid.

    `single_image_mode=False` is nanoVLM's split mode and gives `(images, (n_h, n_w))`: float32
    [K, 3, S, S], normalised, with S = `splitted_image_size`. `images[0]` is the whole image
    squeezed into one S x S square, then come the n_h * n_w tiles row by row, so
    K = 1 + n_h * n_w; if there is only one tile it stands alone and K = 1. The grid counts tiles;
    each of the K squares has (S // patch // factor)^2 tokens.

    nanoVLM's own function has `resize_to_max_side_len` as its third argument: here that is
    `allow_upscale`, the sixth.

    Args:
        max_img_size: limit of the longer side in pixels.
        splitted_image_size: side of a tile in pixels, in split mode a multiple of `vit_patch_size
            * pixel_shuffle_factor`; single-image mode does not look at it.
        single_image_mode: False cuts the image into tiles.
        vit_patch_size: side of a patch in pixels.
        pixel_shuffle_factor: the projector's factor: factor x factor patches make a token; 1 for
            an encoder without a projector, whose images need whole patches only.
        allow_upscale: see `token_grid`.
        image_mean: three numbers on the scale of [0, 1]; `normalization_for` knows presets.
        image_std: three numbers greater than 0, likewise.
        background: the colour under transparent pixels, three numbers from 0 to 255.
        max_pixels: the largest image that is decoded, height * width.
        exact: True decodes and resizes with Pillow alone; by default a faster way, whose pixels
            differ from these by at most 2 steps of 255 (`pixels.py`).

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    max_img_size: int
    splitted_image_size: int | None = None
    single_image_mode: bool = True
    vit_patch_size: int = 16
    pixel_shuffle_factor: int = 4
    allow_upscale: bool = True
    _: KW_ONLY
    image_mean: Sequence[float] = IMAGENET_MEAN
    image_std: Sequence[float] = IMAGENET_STD
    background: Sequence[int] = WHITE
    max_pixels: int = MAX_PIXELS
    exact: bool = False

    def __post_init__(self) -> None:
        """Check every option now rather than at the first image."""
        mean, std = check_normalization(self.image_mean, self.image_std)
        object.__setattr__(self, "image_mean", mean)
        object.__setattr__(self, "image_std", std)
        object.__setattr__(self, "background", rgb_color("background", self.background))
        positive_int("max_pixels", self.max_pixels)
        for name in ("single_image_mode", "allow_upscale", "exact"):
            true_or_false(name, getattr(self, name))
        for name in ("max_img_size", "vit_patch_size", "pixel_shuffle_factor"):
            positive_int(name, getattr(self, name))
        self.geometry(1, 1)
        if not self.single_image_mode:
            self._check_split()

    def __call__(
        self,
        image: ImageSource,
        *,
        name: str | int | None = None,
        channels: Channels | None = None,
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """Process one image; `name` and `channels` are `load_image`'s."""
        from .pixels import load_pixels

        pixels = load_pixels(
            image,
            exact=self.exact,
            name=name,
            background=self.background,
            max_pixels=self.max_pixels,
            channels=channels,
        )
        if not self.single_image_mode:
            return self._split(pixels)
        size = self.geometry(*pixels.shape[1:])
        return self._normalized(pixels, size.height, size.width), size.token_grid

    def geometry(self, height: int, width: int) -> Geometry:
        """Size and grids of an upright image of height x width pixels in single-image mode."""
        return token_grid(
            height,
            width,
            max_img_size=self.max_img_size,
            patch_size=self.vit_patch_size,
            factor=self.pixel_shuffle_factor,
            allow_upscale=self.allow_upscale,
        )

    def tiles(self, height: int, width: int) -> TileGeometry:
        """Size and tiles of an upright image of height x width pixels in split mode.

        Raises:
            ValueError: there is no `splitted_image_size`.
        """
        if self.splitted_image_size is None:
            raise ValueError("splitted_image_size=None: there are no tiles without a tile size")
        return tile_grid(
            height,
            width,
            max_img_size=self.max_img_size,
            splitted_image_size=self.splitted_image_size,
            allow_upscale=self.allow_upscale,
        )

    def _check_split(self) -> None:
        side, unit = self.splitted_image_size, self.vit_patch_size * self.pixel_shuffle_factor
        if side is None:
            raise ValueError("splitted_image_size=None: single_image_mode=False needs a tile size")
        if positive_int("splitted_image_size", side) % unit:
            raise ValueError(
                f"splitted_image_size={side}: expected a multiple of vit_patch_size * "
                f"pixel_shuffle_factor = {self.vit_patch_size} * {self.pixel_shuffle_factor}"
            )
        self.tiles(1, 1)

    def _normalized(self, pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
        from .pixels import resize_pixels

        pixels = resize_pixels(pixels, height, width, exact=self.exact)
        return normalize(pixels, self.image_mean, self.image_std)

    def _split(self, pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        import torch

        size = self.tiles(*pixels.shape[1:])
        (n_h, n_w), side = size.tiles, size.height // size.tiles[0]
        whole = self._normalized(pixels, size.height, size.width)
        tiles = (
            whole.view(3, n_h, side, n_w, side).permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
        )
        if size.num_images > 1:
            tiles = torch.cat([self._normalized(pixels, side, side)[None], tiles])
        return tiles, size.tiles


get_image_processor = ImageProcessor  # nanoVLM's name


def check_normalization(mean: Sequence[float], std: Sequence[float]) -> Normalization:
    """Both as tuples of three floats.

    Raises:
        ValueError: not three finite numbers, or a std that is not above 0.
    """
    result = Normalization(_three("image_mean", mean), _three("image_std", std))
    if min(result.std) <= 0:
        raise ValueError(f"image_std={std!r}: expected three numbers greater than 0")
    return result


def _three(argument: str, values: Sequence[float]) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(v) for v in values)
    except (TypeError, ValueError):
        red = green = blue = math.nan
    if not all(map(math.isfinite, (red, green, blue))):
        raise ValueError(f"{argument}={values!r}: expected three finite numbers")
    return red, green, blue
