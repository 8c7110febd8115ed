"""YAML as people write it, with errors that name the file; files written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from PIL import Image


def json_fault(error: ValueError | RecursionError) -> str:
    """What is wrong with a line, by the error of reading it as JSON."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg}, column {error.colno})"
    return f"not valid JSON ({error})"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well.

    A kill leaves what was there before; a reader never sees half of it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def hexdigest(content: bytes) -> str:
    """Of 128 bits, in hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file by :func:`replacing`, making folders as needed."""
    with folder_for_results(path.parent), replacing(path) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text by :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_picture(path: Path, picture: Image.Image, kind: str, **options: Any) -> None:
    """Write a picture in a format of Pillow by :func:`write_bytes`.

    Pillow's own writing of a JPEG takes no notice of a disk that is full.
    """
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    write_bytes(path, stream.getvalue())


@contextmanager
def folder_for_results(directory: Path) -> Iterator[None]:
    """A folder to write into, made if need be with those above it.

    Those that are new and in which the block leaves nothing go again.

    Raises:
        OSError: it can't be made, or the block could not write; writers that are no Python raise
            errors of their own, which are this one's cause.
    """
    new = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except Exception as error:
        number = _number_of(error, directory)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(directory)) from error
    finally:
        for folder in new:
            with suppress(OSError):  # not empty, or never made
                folder.rmdir()


@contextmanager
def all_or_nothing(directory: Path) -> Iterator[Path]:
    """A hidden folder in `directory`, whose files move up into it when the block ends well.

    They get the mode that the user's umask says, config.json comes last, and weights that the new
    ones replace under other names (shards, an index) go.

    Raises:
        OSError: as :func:`folder_for_results`; nothing in `directory` has changed.
    """
    with (
        folder_for_results(directory),
        tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as name,
    ):
        folder = Path(name)
        yield folder
        files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        (sample := folder / ".mode").touch()
        mode = sample.stat().st_mode  # safetensors makes files that only their owner can read
        replaced = _replaced_weights(directory, {str(file) for file in files})
        for file in sorted(files, key=lambda file: file.name == "config.json"):
            (directory / file).parent.mkdir(exist_ok=True)
            (folder / file).chmod(mode)
            os.replace(folder / file, directory / file)
        for path in replaced:
            path.unlink()


def save_whole(
    save: Callable[..., Any], directory: str | PathLike[str], *args: Any, **kwargs: Any
) -> list[str]:
    """Call a ``save_pretrained`` of transformers by :func:`all_or_nothing`; what was written.

    Raises:
        OSError: the files can't be written.
    """
    directory = Path(directory)
    if kwargs.get("push_to_hub"):  # the repository is called as the directory
        kwargs.setdefault("repo_id", directory.name)
    with all_or_nothing(directory) as folder:
        written = save(str(folder), *args, **kwargs) or []
    return [str(directory / Path(path).relative_to(folder)) for path in written]


_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def _replaced_weights(directory: Path, new: set[str]) -> list[Path]:
    if not any(map(_WEIGHTS.fullmatch, new)):
        return []
    names = [path.name for path in directory.iterdir() if _WEIGHTS.fullmatch(path.name)]
    return [directory / name for name in names if name not in new]


_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as safetensors and tokenizers say it


def _number_of(error: Exception, directory: Path) -> int | None:
    """The number of the system's error behind one of a writer that is no Python; else None."""
    if isinstance(error, OSError):
        return None
    if found := _OS_ERROR.search(str(error)):
        return int(found[1])
    if isinstance(error, RuntimeError) and "inline_container" in str(error):  # torch.save
        full = shutil.disk_usage(directory).free < 2**20
        return errno.ENOSPC if full else errno.EIO
    return None


MAX_YAML_VALUES = 100_000  # in one text, each counted as often as aliases repeat it


class _Loader(yaml.SafeLoader):
    """1e-4 is a number (YAML 1.1 takes it, without a point, for text); a name stands only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.MarkedYAMLError(None, None, f"{twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), [*"-+0123456789"]
)


def parse_yaml(text: str, name: str) -> Any:
    """The value of a text.

    Raises:
        ValueError: it is no YAML, gives one name twice in a mapping, is nested deeper than Python's
            recursion goes, or has more than `MAX_YAML_VALUES` values (an alias inside what it
            stands for has no end of them); the message begins with `name`.
    """
    try:
        value = yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError:
        raise ValueError(f"{name}: no YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        # A scalar tagged as what it is not (!!int x) raises whatever its constructor met.
        raise ValueError(f"{name}: no YAML: {error}") from error
    waiting, count = [value], 1
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict | list | set | tuple):
            waiting.extend(item.values() if isinstance(item, dict) else item)
            count += len(item)
        if count > MAX_YAML_VALUES:
            raise ValueError(f"{name}: more than {MAX_YAML_VALUES} values, aliases counted in full")
    return value


def read_mapping(path: str | PathLike[str]) -> dict[str, Any]:
    """The names and values of a file.

    Raises:
        ValueError: it is no mapping, no YAML, or no text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no text: {error}") from error
    value = parse_yaml(text, str(path))
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: expected a mapping of names to values, got {value!r:.60}")
    return dict(value)


def as_mapping(value: Any, where: str) -> dict[str, Any]:
    """A section of a file.

    Raises:
        ValueError: it is no mapping; the message begins with `where`.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected names with values, got {value!r}")
    return dict(value)


def check_names(given: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raise ValueError, with the nearest known name, where a name is unknown."""
    for name in given:
        if name not in known:
            nearest = get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown name {where}{name}: did you mean {nearest!r}?")
