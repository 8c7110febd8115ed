"""Images that are named on a command line: files, folders, standard input, addresses."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..images.fetch import fetch_image, is_data_uri, is_url, shortened
from ..images.formats import image_endings

STDIN = "-"


@dataclass
class Inputs:
    """Files to be read.

    Attributes:
        paths: In the order in which they were named.
        names: What those are called that lie in a temporary folder.
        skipped: Files inside folders that are no images by their names, and links to folders.
        bad: Addresses that could not be fetched (or data URIs that could not be read), and why.
    """

    paths: list[Path] = field(default_factory=list)
    names: dict[Path, str] = field(default_factory=dict)
    skipped: list[Path] = field(default_factory=list)
    bad: list[tuple[Path, str]] = field(default_factory=list)

    def name(self, path: Path) -> str:
        """What a file is called in results."""
        return self.names.get(path, str(path))


@contextmanager
def gathered(
    images: Sequence[str], *, fetch: bool = False, skip_bad: bool = False
) -> Iterator[Inputs]:
    """The files behind the names; those that had to be fetched go when the block ends.

    Args:
        images: Files; folders, whose images are taken at any depth, sorted by name; ``-`` for an
            image on standard input; addresses (http, https); data URIs.
        fetch: Whether addresses are fetched.
        skip_bad: Collect addresses that can't be fetched instead of raising.

    Raises:
        ValueError: an address, which is not fetched; one that can't be; a folder without images;
            standard input twice.
        FileNotFoundError: a file does not exist.
    """
    inputs = Inputs()
    if list(images).count(STDIN) > 1:
        raise ValueError(f"{STDIN}: standard input has one image, and is named more than once")
    with tempfile.TemporaryDirectory(prefix="hrvlm-") as folder:
        for image in images:
            if image == STDIN:
                _keep(inputs, Path(folder, "stdin"), image, sys.stdin.buffer.read())
            elif is_url(image) or is_data_uri(image):
                if is_url(image) and not fetch:
                    raise ValueError(f"{image}: addresses are fetched only with --fetch")
                _fetch(inputs, Path(folder), image, skip_bad=skip_bad)
            else:
                inputs.paths += find_images([Path(image)], inputs.skipped)
        yield inputs


def _fetch(inputs: Inputs, folder: Path, address: str, *, skip_bad: bool) -> None:
    place = "" if is_data_uri(address) else urlsplit(address).path
    name, address, source = Path(unquote(place)).name or "image", shortened(address), address
    path = folder / str(len(inputs.paths)) / name
    try:
        content = fetch_image(source, address)
    except ValueError as error:
        if not skip_bad:
            raise
        inputs.names[path] = address
        inputs.bad.append((path, str(error)))
        return
    path.parent.mkdir()
    _keep(inputs, path, address, content)


def _keep(inputs: Inputs, path: Path, name: str, content: bytes) -> None:
    path.write_bytes(content)
    inputs.paths.append(path)
    inputs.names[path] = name


def find_images(paths: Sequence[Path], skipped: list[Path] | None = None) -> list[Path]:
    """Files as they are given; of a folder the images at any depth, by their endings, sorted.

    Args:
        paths: Files and folders.
        skipped: Takes what else is in the folders: other files, and links to folders.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder without images.
    """
    endings, images = image_endings(), []
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such file or directory")
            images.append(path)
            continue
        # Links to nothing are files that can't be read; folders behind links are not entered.
        files = sorted(p for p in path.rglob("*") if p.is_symlink() or not p.is_dir())
        found = [p for p in files if p.suffix.lower() in endings and not p.is_dir()]
        if not found:
            raise ValueError(f"{path}: no images in this directory")
        images += found
        if skipped is not None:
            skipped += sorted(set(files) - set(found))
    return images
