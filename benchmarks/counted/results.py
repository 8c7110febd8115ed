"""The result files of counted work, which grow row by row."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.counted import page
from hrvlm.files import write_text

SCHEMA = 2  # rows have a commit and a date of their own


def others(path: Path, again: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of a file whose ops are not counted again."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in old if not row["op"].startswith(again)]


def name_of(row: dict[str, Any]) -> tuple[str, ...]:
    """What tells a row from others."""
    return row["op"], row["size"], row["variant"]


def write(path: Path, chip: str, found: list[dict[str, Any]], missing: list[str]) -> None:
    """A result file."""
    document = {
        "schema": SCHEMA,
        "chip": chip,
        "device": None,
        "versions": {name: metadata.version(name) for name in ("torch", "triton", "numpy")},
        "missing": missing,
        "rows": found,
    }
    write_text(path, json.dumps(page.rounded(document), indent=1) + "\n")
