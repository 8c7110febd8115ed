"""Encode images of any shapes in packed passes; write features and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hrvlm_kernels.backends import resolve

from ..encoder.cost import Architecture, forward_cost
from ..files import folder_for_results
from ..images.geometry import Geometry
from .encode_files import Kept, ResultWriter
from .loading import LoadedEncoder
from .passes import DEFAULT_MAX_TOKENS, LoadedImage, forward, passes
from .towers import LoadedTower

_SHOWN = 1200  # longest side of what is kept of an image for its picture, in pixels


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
    pooled: bool = False  # write CLS and the mean of the patches alone
    one_file: str | None = None  # one of FORMATS: the features of all images in one file
    names: Mapping[Path, str] = field(default_factory=dict)  # of files that are called otherwise


@dataclass
class EncodedImage:
    """One line of the result."""

    path: Path
    name: str  # what it is called in results
    size: tuple[int, int]  # (height, width), upright
    geometry: Geometry
    pass_index: int
    seconds: float  # of the pass, by the image's share of its FLOPs; of its patches in a tower
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
            "image": self.name,
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
    shared: str = "FLOPs"  # what the time of a pass is divided by
    images: list[EncodedImage] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    there: dict[str, Path] = field(default_factory=dict)  # done by an earlier run: their features
    skipped: list[str] = field(default_factory=list)  # files of folders, no images by their names
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
            "bad": [{"image": name, "error": error} for name, error in self.bad],
            "there": [{"image": n, "features": str(path)} for n, path in self.there.items()],
            "skipped": self.skipped,
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


def encode(
    paths: Sequence[Path],
    loaded: LoadedEncoder | LoadedTower,
    options: EncodeOptions | None = None,
    *,
    on_images: Callable[[int], None] | None = None,
) -> EncodeResult:
    """Encode image files, in as few packed passes as `max_tokens_per_pass` allows.

    If there is a directory to write to: features as safetensors, a file for each image (``cls``
    ``[C]``, ``registers`` ``[R, C]``, ``patches`` ``[hp, wp, C]``, in the model's dtype; names,
    sizes and grids in the metadata), or as `one_file`, and a picture for each image
    (:mod:`hrvlm.inference.pictures`). What an earlier run has written of the same files in the same
    way stays.

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
    with folder_for_results(options.out) if options.out else nullcontext():
        return _encode(paths, loaded, options, on_images)


def _encode(
    paths: Sequence[Path],
    loaded: LoadedEncoder | LoadedTower,
    options: EncodeOptions,
    on_images: Callable[[int], None] | None,
) -> EncodeResult:
    encoder = loaded.encoder
    writer = None
    if options.out:
        asked = f"{options.max_img_size} {options.allow_upscale} {encoder.batch_invariant}"
        kept = Kept(options.pooled, options.one_file, asked)
        writer = ResultWriter(loaded, paths, options.out, kept, options.names)
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
        "FLOPs" if isinstance(loaded, LoadedEncoder) else "patches",
    )
    if writer:
        joint = options.pictures and options.joint_pca
        there = writer.done(pictures=options.pictures, joint=joint)
        result.there = {_name(path, options): features for path, features in there.items()}
        if on_images and there:
            on_images(sum(path in there for path in paths))
        paths = [path for path in paths if path not in there]
    _warm_up(loaded)
    bad: list[tuple[Path, str]] = []
    read = passes(
        paths,
        loaded,
        max_img_size=options.max_img_size,
        allow_upscale=options.allow_upscale,
        max_tokens_per_pass=options.max_tokens_per_pass,
        shown_side=_SHOWN if writer and options.pictures else None,
        bad=bad if options.skip_bad else None,
        on_bad=on_images,
    )
    for batch in read:
        output, seconds = forward(loaded, [image.pixels for image in batch], layers=_layers(loaded))
        images = _account(batch, loaded, options, len(result.pass_seconds), seconds)
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
        writer.finish()
    result.bad += [(_name(path, options), error) for path, error in bad]
    return result


def _name(path: Path, options: EncodeOptions) -> str:
    return options.names.get(path, str(path))


def _warm_up(loaded: LoadedEncoder | LoadedTower) -> None:
    """Compile the kernels on one small image, which would else be counted as time of a pass."""
    encoder = loaded.encoder
    if encoder.device.type != "cpu":
        side = 4 * encoder.patch_size
        forward(loaded, [torch.zeros(3, side, side)], layers=_layers(loaded))


def _layers(loaded: LoadedEncoder | LoadedTower) -> list[int]:
    """The input of the last block, from which the attention of CLS is made."""
    return [-2] if isinstance(loaded, LoadedEncoder) else []


def _account(
    batch: list[LoadedImage],
    loaded: LoadedEncoder | LoadedTower,
    options: EncodeOptions,
    pass_index: int,
    seconds: float,
) -> list[EncodedImage]:
    """The pass's time divided among its images: inside a pass nobody can measure."""
    work = [image.geometry.num_patches for image in batch]
    if isinstance(loaded, LoadedEncoder):
        architecture = Architecture.from_config(loaded.encoder.config)
        work = [forward_cost(architecture, patches).total for patches in work]
    shares = [part / sum(work) for part in work]
    return [
        EncodedImage(
            image.path,
            _name(image.path, options),
            image.size,
            image.geometry,
            pass_index,
            share * seconds,
            share,
        )
        for image, share in zip(batch, shares, strict=True)
    ]
