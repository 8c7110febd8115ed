"""Runs in parts, whose results are one JSON file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hrvlm.machine import device_name


def add_part_options(parser: argparse.ArgumentParser, parts: Sequence[str]) -> None:
    """``--parts`` and ``--out``."""
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts, help="do these")
    parser.add_argument("--out", type=Path, help="write the result as JSON, or add the parts")


def new_result() -> dict[str, Any]:
    """A result without parts: where it was made."""
    return {"cpu": device_name(torch.device("cpu")), "torch": torch.__version__}


def show_and_add(result: dict[str, Any], out: Path | None) -> None:
    """Print the result, with the parts that `out` has besides, and write it there."""
    if out and out.exists():
        result = json.loads(out.read_text()) | result
    print(json.dumps(result, indent=1))
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
