"""What `hrvlm encode` writes: features, in a file for each image or in one, and pictures."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .. import __version__
from ..files import hexdigest, write_bytes, write_picture
from ..images.fetch import is_url
from ..images.formats import ImageError
from ..images.intake import opened
from .encode_formats import (
    Stored,
    need_pyarrow,
    one_file,
    read_one_file,
    safetensors_bytes,
    told_by,
)
from .loading import LoadedEncoder, weights_digest
from .passes import cls_attention
from .pictures import pca_colors, sheet

if TYPE_CHECKING:
    from ..encoder.output import PackedEncoderOutput
    from .encode import EncodedImage
    from .towers import LoadedTower

FEATURES_SUFFIX, PICTURE_SUFFIX = ".features.safetensors", ".features.png"


@dataclass
class _Drawing:
    image: EncodedImage
    shown: Image.Image
    features: Tensor  # [C, hp, wp]
    attention: Tensor | None  # [hp, wp]; None without a CLS token


@dataclass(frozen=True)
class Kept:
    """What is kept of the features, and how.

    Attributes:
        pooled: CLS and the mean of the patches alone.
        one_file: One of `FORMATS` for a file ``features.*`` with all images; None for a safetensors
            file for each.
        asked: What else decides about the features, for the digest.
    """

    pooled: bool = False
    one_file: str | None = None
    asked: str = ""


class ResultWriter:
    """Writes the results of a run into a directory, each file complete or not at all.

    A result says which image it is of, and a digest of all that it is made of. Where another image
    has a name already, in this run or by an earlier one, the next number is taken.

    Args:
        loaded: The model, for captions and metadata.
        paths: All inputs of the run; results are named after them.
        directory: Is there.
        kept: What is written of the features.
        called: Inputs that lie in temporary files, and what they are called.

    Raises:
        ValueError: a result would replace an input, or a file that holds other images; no package
            writes this format.
    """

    def __init__(
        self,
        loaded: LoadedEncoder | LoadedTower,
        paths: Sequence[Path],
        directory: Path,
        kept: Kept | None = None,
        called: Mapping[Path, str] | None = None,
    ):
        self._loaded, self._directory, self._kept = loaded, directory, kept or Kept()
        if self._kept.one_file == "parquet":
            need_pyarrow()
        self._paths, self._called = [*dict.fromkeys(paths)], called or {}
        self._drawings: list[_Drawing] = []
        self._contents: dict[Path, str] = {}
        self._run_digest = json.dumps(
            [
                weights_digest(loaded.encoder),
                str(loaded.encoder.dtype),
                loaded.normalization,
                self._kept.pooled,
                self._kept.asked,
                __version__,
            ]
        )
        self._names = _names(self._paths, lambda path: path.stem, self._is_free)
        inputs = {os.path.realpath(path) for path in paths}
        for path in self._paths:
            for target in (self._features_of(path), self._picture_of(path)):
                if os.path.realpath(target) in inputs:
                    raise ValueError(f"{target} is an input and would be replaced")
        self._collected: dict[Path, Stored] = {}  # for the one file
        self._in_file: list[tuple[str, str, str]] = []
        self._parts = directory / f".features.{self._kept.one_file}.parts"
        if self._kept.one_file:
            self._collect_stored()

    def _features_of(self, path: Path) -> Path:
        if self._kept.one_file:
            return self._directory / f"features.{self._kept.one_file}"
        return self._directory / f"{self._names[path]}{FEATURES_SUFFIX}"

    def _picture_of(self, path: Path) -> Path:
        return self._directory / f"{self._names[path]}{PICTURE_SUFFIX}"

    def _is_free(self, path: Path, name: str) -> bool:
        """Whether no result of this name is of another image."""
        for suffix in (FEATURES_SUFFIX, PICTURE_SUFFIX):
            told = told_by(self._directory / f"{name}{suffix}")
            if "source" in told and not self._is_of(told, path):
                return False
        return True

    def _is_of(self, told: Mapping[str, str], path: Path) -> bool:
        """Whether a result is of this image; of an equal one of the same name, if it has moved."""
        return self._source(path) == told["source"] or self._made_of(path) == told.get("made_of")

    def _collect_stored(self) -> None:
        """What the one file has of these images, and what a run that was stopped has left."""
        stored: dict[str, Stored] = {}
        target = self._directory / f"features.{self._kept.one_file}"
        if target.exists() and not target.is_fifo():
            ours = {self._source(p) for p in self._paths} | {self._made_of(p) for p in self._paths}
            for name, (tensors, told) in read_one_file(target).items():
                self._in_file.append((name, told["made_of"], told["source"]))
                stored[told["made_of"]] = tensors, told
                if ours.isdisjoint(self._in_file[-1][1:]):
                    raise ValueError(
                        f"{target} holds the features of {told['image']!r}, which is none of these "
                        "images: give another --out, or delete the file"
                    )
        for path in self._paths:
            made_of = self._made_of(path)
            if made_of is None:
                continue
            if made_of not in stored and told_by(part := self._part(made_of)):
                stored[made_of] = safetensors.torch.load(part.read_bytes()), told_by(part)
            if made_of in stored:
                tensors, told = stored[made_of]
                self._collected[path] = tensors, told | {"source": self._source(path)}

    def _part(self, made_of: str) -> Path:
        return self._parts / f"{made_of}.safetensors"

    def done(self, *, pictures: bool, joint: bool) -> dict[Path, Path]:
        """Images whose results are there, made of the same file in the same way: their features.

        Args:
            pictures: Whether they need a picture.
            joint: Whether all pictures are to have one projection; then all need to be there for
                one to count.
        """
        found, together = {}, self._made_of_all() if joint else ""
        for path in self._paths:
            features, made_of = self._features_of(path), self._made_of(path)
            if self._kept.one_file:
                there = path in self._collected
            else:
                there = made_of is not None and told_by(features).get("made_of") == made_of
            if there and pictures:
                told = told_by(self._picture_of(path))
                there = (told.get("made_of"), told.get("joint")) == (made_of, together)
            if there:
                found[path] = features
        return {} if joint and len(found) < len(self._paths) else found

    def _title(self, path: Path) -> str:
        return _readable(self._called.get(path, str(path)).rpartition("/")[2])

    def _content(self, path: Path) -> str | None:
        """A digest of the file; None where it can't be read."""
        if path not in self._contents:
            digest = hashlib.blake2b(digest_size=16)
            try:
                with opened(path, str(path)) as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
            except (OSError, ImageError):
                return None
            self._contents[path] = digest.hexdigest()
        return self._contents[path]

    def _made_of(self, path: Path) -> str | None:
        """A digest of the file and of what is done with it; None where it can't be read."""
        content = self._content(path)
        return content and _digest(f"{self._run_digest} {self._title(path)} {content}")

    def _made_of_all(self) -> str:
        return _digest(repr([self._made_of(path) for path in self._paths]))

    def _source(self, path: Path) -> str:
        """A digest of where the image is, as seen from the results: both may move together."""
        place = self._called.get(path)
        if place is None:
            place = os.path.relpath(os.path.realpath(path), os.path.realpath(self._directory))
        elif not is_url(place):
            place = self._content(path) or place  # standard input is called so whatever it holds
        return _digest(place)

    def write_features(self, images: Sequence[EncodedImage], output: PackedEncoderOutput) -> None:
        """Write or collect the features of a pass.

        ``cls`` ``[C]``, ``registers`` ``[R, C]`` and ``patches`` ``[hp, wp, C]``; or, pooled,
        ``cls`` and ``mean`` ``[C]`` of the patches, in float32. Without a CLS token, the patches or
        their mean alone.
        """
        maps, prefix = output.to_maps(), output.packed.num_prefix_tokens
        cls, registers = (output.cls.cpu(), output.registers.cpu()) if prefix else ((), ())
        for i, image in enumerate(images):
            tensors = {"cls": cls[i].clone()} if prefix else {}
            if self._kept.pooled:
                tensors["mean"] = maps[i].flatten(1).float().mean(1).cpu()
            else:
                if prefix:
                    tensors["registers"] = registers[i].clone()
                tensors["patches"] = maps[i].permute(1, 2, 0).cpu().clone().contiguous()
            metadata = self._metadata(image)
            image.features = target = self._features_of(image.path)
            if self._kept.one_file:
                self._collected[image.path] = tensors, metadata
                target = self._part(metadata["made_of"])  # until the one file is written
            write_bytes(target, safetensors_bytes(tensors, metadata))

    def finish(self) -> None:
        """Write the one file, if there is to be one that is not there already."""
        kind = self._kept.one_file
        if kind is None or not self._collected:
            return
        names = _names(self._paths, lambda path: _readable(path.stem))
        images = {names[p]: self._collected[p] for p in self._paths if p in self._collected}
        rows = [(name, told["made_of"], told["source"]) for name, (_, told) in images.items()]
        if rows != self._in_file:
            write_bytes(self._directory / f"features.{kind}", one_file(kind, images))
        shutil.rmtree(self._parts, ignore_errors=True)

    def collect(
        self,
        images: Sequence[EncodedImage],
        shown: Sequence[Image.Image | None],
        output: PackedEncoderOutput,
    ) -> None:
        """Keep what the pictures of a pass need, on the CPU, until :meth:`draw`.

        Args:
            images: The images of the pass.
            shown: What each of them looks like.
            output: Its `packed_selected_hidden_states` end with the input of the last block, if it
                has a CLS token.
        """
        attentions: list[Tensor | None] = [None] * len(images)
        if output.packed.num_prefix_tokens:
            last = (output.packed_selected_hidden_states or ())[-1]
            attentions[:] = cls_attention(self._loaded, output, last)
        for image, picture, features, attention in zip(
            images, shown, output.to_maps(), attentions, strict=True
        ):
            if picture is not None:
                self._drawings.append(_Drawing(image, picture, features.float().cpu(), attention))

    def draw(self, *, joint: bool = False) -> None:
        """Draw the pictures collected so far; `joint` gives them one projection to colours."""
        colors = pca_colors([d.features for d in self._drawings], joint=joint)
        together = self._made_of_all() if joint else ""
        for drawing, color in zip(self._drawings, colors, strict=True):
            geometry = drawing.image.geometry
            page = sheet(
                drawing.shown,
                color,
                drawing.attention,
                title=self._title(drawing.image.path),
                notes=self._caption(drawing.image),
                size=(geometry.height, geometry.width),
            )
            drawing.image.picture = self._picture_of(drawing.image.path)
            told = self._told(drawing.image.path) | {"joint": together}
            write_picture(drawing.image.picture, page, "PNG", pnginfo=_png_info(told))
        self._drawings.clear()

    def _caption(self, image: EncodedImage) -> str:
        geometry = image.geometry
        (height, width), (hp, wp) = image.size, geometry.patch_grid
        return (
            f"{height}x{width} px (height x width) encoded at {geometry.height}x{geometry.width} "
            f"(stretch {image.stretch:.2f}x), "
            f"patch grid {hp}x{wp}, {geometry.num_patches} patches\n"
            f"{self._loaded.name}"
        )

    def _metadata(self, image: EncodedImage) -> dict[str, str]:
        """Safetensors takes strings only: what is no string is written as JSON."""
        loaded, geometry = self._loaded, image.geometry
        values: dict[str, Any] = {
            "size": image.size,
            "resized": (geometry.height, geometry.width),
            "patch_grid": geometry.patch_grid,
            "patch_size": loaded.encoder.patch_size,
            "num_prefix_tokens": loaded.encoder.num_prefix_tokens,
            "image_mean": loaded.normalization.mean,
            "image_std": loaded.normalization.std,
        }
        return {
            "format": "pt",
            "image": self._title(image.path),
            "model": loaded.name,
            "weights": "random" if loaded.random_weights else "pretrained",
            "hrvlm_version": __version__,
            **self._told(image.path),
            **{name: json.dumps(value) for name, value in values.items()},
        }

    def _told(self, path: Path) -> dict[str, str]:
        return {"source": self._source(path), "made_of": self._made_of(path) or ""}


def _names(
    paths: Sequence[Path],
    stem: Callable[[Path], str],
    is_free: Callable[[Path, str], bool] = lambda path, name: True,
) -> dict[Path, str]:
    """The base name of each file's results; "Photo" and "photo" are one on some file systems."""
    taken: set[str] = set()
    names: dict[Path, str] = {}
    for path in paths:
        name, count = stem(path), 1
        while name.lower() in taken or not is_free(path, name):
            count += 1
            name = f"{stem(path)}-{count}"
        taken.add(name.lower())
        names[path] = name
    return names


def _readable(name: str) -> str:
    """A file's name without the bytes that are no characters."""
    return name.encode("utf-8", "replace").decode("utf-8")


def _digest(text: str) -> str:
    return hexdigest(text.encode("utf-8", "surrogateescape"))


def _png_info(told: Mapping[str, str]) -> PngInfo:
    info = PngInfo()
    for key, text in told.items():
        info.add_text(key, text)
    return info
