"""Which file of a checkpoint is damaged, where loading it has failed.

Loaders raise whatever comes to them (KeyError, struct.error, a tokenizer's bare Exception) and
seldom say where. Nothing is checked in advance: an error is looked into when it is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .files import check_file, read_json, summary

# What transformers reads of a directory; other files in it may be of any kind.
_DOCUMENTS = (
    "config.json",
    "*.index.json",
    "generation_config.json",
    "*processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "adapter_config.json",
    "*.jinja",
)
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*")


@contextmanager
def naming_damaged_files(
    source: str | os.PathLike[str] | None,
    options: Mapping[str, Any] | None = None,
    model_class: Any = None,
    *,
    all_errors: bool = False,
) -> Iterator[None]:
    """Load a checkpoint; an error that comes of a damaged file names the file.

    Args:
        source: Hub id or directory.
        options: Of ``from_pretrained``: config, subfolder, revision and cache_dir are looked at.
        model_class: What is made of the config.json, if it is to be checked for that.
        all_errors: Name `source` in errors whose file is not found, too.

    Raises:
        ValueError: a file is damaged; the loader's own error is its cause.
    """
    options = options or {}
    try:
        yield
    except Exception as error:
        directory = _directory_of(source, options)
        damage = None
        if directory is not None:
            damage = find_damage(directory)
            if damage is None and options.get("config") is None:
                damage = _config_fault(directory, model_class)
        if damage is None and all_errors and not _tells_why(error, source):
            damage = f"{source}: can't be loaded ({summary(error)})"
        if damage is None:
            raise
        raise ValueError(damage) from error


def check_generation_config(
    source: str | os.PathLike[str] | None, options: Mapping[str, Any]
) -> None:
    """Read the generation_config.json, in whose place transformers takes defaults if it can't.

    Raises:
        ValueError: it is damaged.
    """
    directory = _directory_of(source, options)
    if directory is not None:
        read_json(directory / "generation_config.json")


def find_damage(directory: Path) -> str | None:
    """What is wrong with the first damaged file in `directory`, None if none is."""
    for pattern in (*_DOCUMENTS, *_WEIGHTS):
        for path in sorted(path for path in directory.glob(pattern) if path.is_file()):
            try:
                check_file(path)
                if path.name == "tokenizer.json":
                    _check_tokenizer(path)
            except (ValueError, OSError) as error:
                return str(error)
    return None


def _check_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"{path}: no tokenizer ({summary(error)})") from error


def _tells_why(error: Exception, source: str | os.PathLike[str] | None) -> bool:
    machine = (OSError, ImportError, MemoryError, torch.OutOfMemoryError)
    return source is None or isinstance(error, machine) or str(source) in str(error)


def _config_fault(directory: Path, model_class: Any) -> str | None:
    """What hinders a `model_class` from being made of the config, None if nothing does."""
    config_class = getattr(model_class, "config_class", None)
    if config_class is None or not (directory / "config.json").is_file():
        return None
    try:
        with torch.device("meta"):
            model_class(config_class.from_pretrained(directory))
    except Exception as error:
        return (
            f"{directory / 'config.json'}: no {model_class.__name__} can be made of it "
            f"({summary(error)})"
        )
    return None


def _directory_of(source: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> Path | None:
    if source is None:
        return None
    directory = Path(source, options.get("subfolder") or "")
    if directory.is_dir():
        return directory
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(
            str(source),
            str(Path(options.get("subfolder") or "", "config.json")),
            cache_dir=options.get("cache_dir"),
            revision=options.get("revision"),
        )
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None
