"""Runs in parts, whose results are one JSON file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite import commit_here, now
from hrvlm.machine import describe_device


def add_part_options(parser: argparse.ArgumentParser, parts: Sequence[str]) -> None:
    """``--parts`` and ``--out``."""
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts, help="do these")
    parser.add_argument("--out", type=Path, help="write the result as JSON, or add the parts")


def made_by() -> dict[str, Any]:
    """What a part of a result comes from: commit, date, versions."""
    machine = describe_device(torch.device("cpu"))
    names = ("device", "python", "torch", "transformers", "pillow")
    return {"commit": commit_here(), "date": now()} | {name: machine[name] for name in names}


def show_and_add(parts: dict[str, Any], out: Path | None) -> None:
    """Print the parts, with those that `out` has besides, and write them there."""
    before = json.loads(out.read_text()) if out and out.exists() else {}
    told = before.pop("made_by", {}) | {name: made_by() for name in parts}
    result = {"made_by": told, **before, **parts}
    print(json.dumps(result, indent=1))
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
