"""What `hrvlm encode` writes: features, in a file for each image or in one, and pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from .. import __version__
from ..files import write_bytes, write_picture
from .encode_formats import made_of, need_pyarrow, one_file, safetensors_bytes
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

    Args:
        loaded: The model, for captions and metadata.
        paths: All inputs of the run; results are named after them, numbered where stems are equal.
        directory: Is there.
        kept: What is written of the features.

    Raises:
        ValueError: a result would replace an input, or no package writes this format.
    """

    def __init__(
        self,
        loaded: LoadedEncoder | LoadedTower,
        paths: Sequence[Path],
        directory: Path,
        kept: Kept | None = None,
    ):
        self._loaded, self._directory, self._kept = loaded, directory, kept or Kept()
        if self._kept.one_file == "parquet":
            need_pyarrow()
        self._paths, self._names = [*dict.fromkeys(paths)], _names(paths)
        self._drawings: list[_Drawing] = []
        self._collected: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {}
        self._digests: dict[Path, str] = {}
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
        inputs = {path.resolve() for path in paths}
        for path in self._paths:
            for target in (self._features_of(path), self._picture_of(path)):
                if target.resolve() in inputs:
                    raise ValueError(f"{target} is an input and would be replaced")

    def _features_of(self, path: Path) -> Path:
        if self._kept.one_file:
            return self._directory / f"features.{self._kept.one_file}"
        return self._directory / f"{self._names[path]}{FEATURES_SUFFIX}"

    def _picture_of(self, path: Path) -> Path:
        return self._directory / f"{self._names[path]}{PICTURE_SUFFIX}"

    def done(self, *, pictures: bool, joint: bool) -> dict[Path, Path]:
        """Images whose results are there, made of the same file in the same way: their features.

        Args:
            pictures: Whether they need a picture.
            joint: Whether all need to be there for one to count.
        """
        found = {}
        for path in self._paths:
            features = self._features_of(path)
            wanted = self._made_of_all() if self._kept.one_file else self._made_of(path)
            drawn = not pictures or self._picture_of(path).exists()
            if features.exists() and drawn and wanted and made_of(features) == wanted:
                found[path] = features
        if (joint or self._kept.one_file) and len(found) < len(self._paths):
            return {}
        return found

    def _made_of(self, path: Path) -> str | None:
        """A digest of the file and of what is done with it; None where it can't be read."""
        if path not in self._digests:
            digest = hashlib.blake2b(self._run_digest.encode(), digest_size=16)
            try:
                with open(path, "rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
            except OSError:
                return None
            self._digests[path] = digest.hexdigest()
        return self._digests[path]

    def _made_of_all(self) -> str:
        every = [(self._names[path], self._made_of(path)) for path in self._paths]
        return hashlib.blake2b(repr(every).encode(), digest_size=16).hexdigest()

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
            image.features = self._features_of(image.path)
            if self._kept.one_file:
                self._collected[self._names[image.path]] = tensors, metadata
                continue
            metadata["made_of"] = self._made_of(image.path) or ""
            write_bytes(image.features, safetensors_bytes(tensors, metadata))

    def finish(self) -> None:
        """Write the one file, if there is to be one."""
        kind = self._kept.one_file
        if kind and self._collected:
            target = self._directory / f"features.{kind}"
            complete = len(self._collected) == len(self._paths)  # else it is made anew next time
            made_of_all = self._made_of_all() if complete else ""
            write_bytes(target, one_file(kind, self._collected, made_of_all))

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
        for drawing, color in zip(self._drawings, colors, strict=True):
            geometry = drawing.image.geometry
            page = sheet(
                drawing.shown,
                color,
                drawing.attention,
                title=_readable(drawing.image.name.rpartition("/")[2]),
                notes=self._caption(drawing.image),
                size=(geometry.height, geometry.width),
            )
            drawing.image.picture = self._picture_of(drawing.image.path)
            write_picture(drawing.image.picture, page, "PNG")
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
            "image": _readable(image.name.rpartition("/")[2]),
            "model": loaded.name,
            "weights": "random" if loaded.random_weights else "pretrained",
            "hrvlm_version": __version__,
        } | {name: json.dumps(value) for name, value in values.items()}


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """The base name of each file's results; "Photo" and "photo" are one on some file systems."""
    taken: set[str] = set()
    names: dict[Path, str] = {}
    for path in dict.fromkeys(paths):
        name, count = path.stem, 1
        while name.lower() in taken:
            count += 1
            name = f"{path.stem}-{count}"
        taken.add(name.lower())
        names[path] = name
    return names


def _readable(name: str) -> str:
    """A file's name without the bytes that are no characters."""
    return name.encode("utf-8", "replace").decode("utf-8")
