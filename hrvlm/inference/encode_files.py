"""What `hrvlm encode` writes: features as safetensors, and a picture per image."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from .. import __version__
from ..files import replacing
from .loading import LoadedEncoder
from .passes import cls_attention
from .pictures import pca_colors, sheet

if TYPE_CHECKING:
    from ..encoder.output import PackedEncoderOutput
    from .encode import EncodedImage

FEATURES_SUFFIX, PICTURE_SUFFIX = ".features.safetensors", ".features.png"


@dataclass
class _Drawing:
    image: EncodedImage
    shown: Image.Image
    features: Tensor  # [C, hp, wp]
    attention: Tensor  # [hp, wp]


class ResultWriter:
    """Writes the results of a run into a directory, each file complete or not at all.

    Args:
        loaded: The model, for captions and metadata.
        paths: All inputs of the run; results are named after them, numbered where stems are equal.
        directory: Is there.

    Raises:
        ValueError: a result would replace an input.
    """

    def __init__(self, loaded: LoadedEncoder, paths: Sequence[Path], directory: Path):
        self._loaded, self._directory = loaded, directory
        self._names = _names(paths)
        self._drawings: list[_Drawing] = []
        inputs = {path.resolve() for path in paths}
        for name in self._names.values():
            for suffix in (FEATURES_SUFFIX, PICTURE_SUFFIX):
                target = directory / f"{name}{suffix}"
                if target.resolve() in inputs:
                    raise ValueError(f"{target} is an input and would be replaced")

    def write_features(self, images: Sequence[EncodedImage], output: PackedEncoderOutput) -> None:
        """Write ``cls`` ``[C]``, ``registers`` ``[R, C]`` and ``patches`` ``[hp, wp, C]``."""
        from safetensors.torch import save

        maps, cls, registers = output.to_maps(), output.cls.cpu(), output.registers.cpu()
        for i, image in enumerate(images):
            tensors = {
                "cls": cls[i].clone(),
                "registers": registers[i].clone(),
                "patches": maps[i].permute(1, 2, 0).cpu().clone().contiguous(),
            }
            # Not save_file, which makes files that only their owner can read.
            content = save(tensors, metadata=self._metadata(image))
            write = partial(Path.write_bytes, data=content)
            image.features = self._write(image, FEATURES_SUFFIX, write)

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
            output: Its `packed_selected_hidden_states` end with the input of the last block.
        """
        last = (output.packed_selected_hidden_states or ())[-1]
        attentions = cls_attention(self._loaded, output, last)
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
                title=_readable(drawing.image.path.name),
                notes=self._caption(drawing.image),
                size=(geometry.height, geometry.width),
            )
            save = partial(page.save, format="PNG")
            drawing.image.picture = self._write(drawing.image, PICTURE_SUFFIX, save)
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
            "image": _readable(image.path.name),
            "model": loaded.name,
            "weights": "random" if loaded.random_weights else "pretrained",
            "hrvlm_version": __version__,
        } | {name: json.dumps(value) for name, value in values.items()}

    def _write(self, image: EncodedImage, suffix: str, save: Callable[[Path], Any]) -> Path:
        target = self._directory / f"{self._names[image.path]}{suffix}"
        with replacing(target) as temporary:
            save(temporary)
        return target


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
