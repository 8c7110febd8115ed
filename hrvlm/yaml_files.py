"""YAML as people write it: 1e-4 is a number, and an error names the file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-4, without a point, for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), [*"-+0123456789"]
)


def parse_yaml(text: str, name: str) -> Any:
    """The value of a text.

    Raises:
        ValueError: it is no YAML; the message begins with `name`.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: no YAML: {error}") from error


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
