"""Encode images of any shapes in packed passes; write features and pictures.

There is no projector, so an image's sides become multiples of the patch size and of no more.
Images are read in order and packed until a pass is full, so that memory does not grow with their
number. Nothing is padded or reshaped to a common size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from hrvlm_kernels.backends import resolve

from ..encoder.cost import Architecture, forward_cost
from ..images.geometry import Geometry, positive_int
from ..images.intake import load_image
from ..images.processor import get_image_processor
from ..machine import synchronize
from .encode_files import ResultWriter
from .loading import LoadedEncoder

if TYPE_CHECKING:
    from ..encoder.output import PackedEncoderOutput

DEFAULT_MAX_TOKENS = 32768
_PANEL = 720  # longest side of a picture's panels in pixels


@dataclass(frozen=True)
class EncodeOptions:
    """What `encode` does beside encoding."""

    max_img_size: int = 1024
    allow_upscale: bool = False
    max_tokens_per_pass: int = (
        DEFAULT_MAX_TOKENS  # patches and prefix tokens; one image always fits
    )
    out: Path | None = None  # directory of the results; None writes nothing
    pictures: bool = True
    joint_pca: bool = False  # one projection for the pictures of all images
    skip_bad: bool = False  # report unreadable images instead of raising


@dataclass
class EncodedImage:
    """One line of the result."""

    path: Path
    size: tuple[int, int]  # (height, width), upright
    geometry: Geometry
    pass_index: int
    seconds: float  # of the pass, by the image's share of its FLOPs
    share: float
    features: Path | None = None
    picture: Path | None = None

    @property
    def stretch(self) -> float:
        """See :meth:`Geometry.stretch`."""
        return self.geometry.stretch(*self.size)

    def to_json(self) -> dict[str, Any]:
        """Plain data; sizes and grids are (height, width)."""
        return {
            "image": str(self.path),
            "size": list(self.size),
            "resized": [self.geometry.height, self.geometry.width],
            "stretch": self.stretch,
            "patch_grid": list(self.geometry.patch_grid),
            "patches": self.geometry.num_patches,
            "pass": self.pass_index,
            "seconds": self.seconds,
            "share": self.share,
            "features": None if self.features is None else str(self.features),
            "picture": None if self.picture is None else str(self.picture),
        }


@dataclass
class EncodeResult:
    """Everything that `encode` did."""

    model: str
    random_weights: bool
    backend: str  # as asked for
    attention_backend: str  # what it came to
    device: str
    dtype: str
    images: list[EncodedImage] = field(default_factory=list)
    bad: list[tuple[Path, str]] = field(default_factory=list)
    pass_seconds: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "model": self.model,
            "weights": "random" if self.random_weights else "pretrained",
            "backend": self.backend,
            "attention_backend": self.attention_backend,
            "device": self.device,
            "dtype": self.dtype,
            "images": [image.to_json() for image in self.images],
            "bad": [{"image": str(path), "error": error} for path, error in self.bad],
            "passes": [
                {
                    "images": sum(image.pass_index == i for image in self.images),
                    "seconds": seconds,
                }
                for i, seconds in enumerate(self.pass_seconds)
            ],
            "patches": sum(image.geometry.num_patches for image in self.images),
            "seconds": sum(self.pass_seconds),
        }


@dataclass
class _Loaded:
    """An image that waits for its pass."""

    path: Path
    size: tuple[int, int]
    geometry: Geometry
    pixels: Tensor
    shown: Image.Image | None  # already of the size of its panel: originals may be huge


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files as they are given; of a directory the images in it, by their endings, sorted by name.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a directory without images.
    """
    Image.init()
    endings = {ending for ending, name in Image.EXTENSION.items() if name in Image.OPEN}
    found = []
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such file or directory")
            found.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in endings and p.is_file())
        if not inside:
            raise ValueError(f"{path}: no images in this directory")
        found += inside
    return found


def encode(
    paths: Sequence[Path],
    loaded: LoadedEncoder,
    options: EncodeOptions | None = None,
    *,
    on_images: Callable[[int], None] | None = None,
) -> EncodeResult:
    """Encode image files, in as few packed passes as `max_tokens_per_pass` allows.

    Per image and if there is a directory to write to: features as safetensors (``cls`` ``[C]``,
    ``registers`` ``[R, C]``, ``patches`` ``[hp, wp, C]``, in the model's dtype; names, sizes and
    grids in the metadata) and a picture (:mod:`hrvlm.inference.pictures`).

    Args:
        paths: Image files.
        loaded: The model.
        options: See :class:`EncodeOptions`.
        on_images: Told how many images are done, unreadable ones included, after each pass.

    Raises:
        ValueError: an image can't be read (its file is named), an option is out of range, or a
            result would replace an input.
        OSError: a file can't be opened or written.
    """
    options = options or EncodeOptions()
    encoder = loaded.encoder
    positive_int("max_tokens_per_pass", options.max_tokens_per_pass)
    writer = ResultWriter(loaded, paths, options.out) if options.out else None
    result = EncodeResult(
        loaded.name,
        loaded.random_weights,
        encoder.backend,
        resolve(
            "varlen_attention",
            encoder.backend,
            torch.empty(0, dtype=encoder.dtype, device=encoder.device),
        ),
        str(encoder.device),
        str(encoder.dtype).removeprefix("torch."),
    )
    _warm_up(loaded)
    for batch in _passes(paths, loaded, options, result.bad, on_images):
        output, seconds = _forward(loaded, [image.pixels for image in batch])
        images = _account(batch, loaded, len(result.pass_seconds), seconds)
        result.images += images
        result.pass_seconds.append(seconds)
        if writer:
            writer.write_features(images, output)
            if options.pictures:
                writer.collect(images, [image.shown for image in batch], output)
                if not options.joint_pca:
                    writer.draw()
        if on_images:
            on_images(len(batch))
    if writer:
        writer.draw(joint=True)
    return result


def _passes(
    paths: Sequence[Path],
    loaded: LoadedEncoder,
    options: EncodeOptions,
    bad: list[tuple[Path, str]],
    on_images: Callable[[int], None] | None,
) -> Iterator[list[_Loaded]]:
    """Lists of images whose tokens fill a pass; unreadable ones go to `bad` or raise."""
    processor = get_image_processor(
        options.max_img_size,
        vit_patch_size=loaded.encoder.patch_size,
        pixel_shuffle_factor=1,  # no projector: whole patches are enough
        allow_upscale=options.allow_upscale,
        image_mean=loaded.normalization.mean,
        image_std=loaded.normalization.std,
    )
    batch: list[_Loaded] = []
    total = 0
    for path in paths:
        try:
            image = load_image(path)
        except (ValueError, OSError) as error:
            if not options.skip_bad:
                raise
            bad.append((path, str(error)))
            if on_images:
                on_images(1)
            continue
        geometry = processor.geometry(image.height, image.width)
        tokens = geometry.num_patches + loaded.encoder.num_prefix_tokens
        if batch and total + tokens > options.max_tokens_per_pass:
            yield batch
            batch, total = [], 0
        wanted = options.out is not None and options.pictures
        shown = _thumbnail(image, geometry) if wanted else None
        size = image.height, image.width
        batch.append(_Loaded(path, size, geometry, processor(image)[0], shown))
        total += tokens
    if batch:
        yield batch


def _thumbnail(image: Image.Image, geometry: Geometry) -> Image.Image:
    scale = _PANEL / max(geometry.height, geometry.width)
    size = max(1, round(geometry.width * scale)), max(1, round(geometry.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def _forward(loaded: LoadedEncoder, pixels: list[Tensor]) -> tuple[PackedEncoderOutput, float]:
    """One packed pass, and its time without the copy to the device."""
    encoder = loaded.encoder
    on_device = [p.to(encoder.device) for p in pixels]
    try:
        with torch.inference_mode():
            synchronize(encoder.device)
            start = time.perf_counter()
            output = encoder(on_device, out_indices=[-2], apply_layernorm=False)
            synchronize(encoder.device)
            return output, time.perf_counter() - start
    except torch.OutOfMemoryError as error:
        area = sum(p.shape[1] * p.shape[2] for p in pixels) // encoder.patch_size**2
        raise MemoryError(
            f"a pass of {len(pixels)} images with {area} patches does not fit on "
            f"{encoder.device}: lower --max-tokens-per-pass or --max-img-size"
        ) from error


def _warm_up(loaded: LoadedEncoder) -> None:
    """Compile the kernels on one small image, which would else be counted as time of a pass."""
    encoder = loaded.encoder
    if encoder.device.type != "cpu":
        _forward(loaded, [torch.zeros(3, 4 * encoder.patch_size, 4 * encoder.patch_size)])


def _account(
    batch: list[_Loaded], loaded: LoadedEncoder, pass_index: int, seconds: float
) -> list[EncodedImage]:
    """The pass's time divided among its images by their FLOPs: inside a pass nobody can measure."""
    architecture = Architecture.from_config(loaded.encoder.config)
    flops = [forward_cost(architecture, image.geometry.num_patches).total for image in batch]
    shares = [part / sum(flops) for part in flops]
    return [
        EncodedImage(image.path, image.size, image.geometry, pass_index, share * seconds, share)
        for image, share in zip(batch, shares, strict=True)
    ]
