"""The result file of a chip: what ran as compiled for it on ptx_machine. There is no device."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.suite import commit_here
from hrvlm.files import write_text

FOLDER = Path(__file__).parents[1] / "results"
SCHEMA = 1
PACKAGES = ("torch", "triton", "transformers", "numpy")


def path_of(folder: Path, chip: int) -> Path:
    """Where the results of a chip stand."""
    return folder / f"compiled-sm_{chip}.json"


def read(folder: Path) -> list[dict[str, Any]]:
    """The documents of all chips, oldest chip first."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("compiled-sm_*.json"))]


def write(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A file for each chip; a row has "chip" and "kind" ("case" or "fault")."""
    rows = list(rows)
    for chip in sorted({row["chip"] for row in rows}):
        mine = [row for row in rows if row["chip"] == chip]
        document = {
            "schema": SCHEMA,
            "chip": f"sm_{chip}",
            "device": None,
            "versions": {name: metadata.version(name) for name in PACKAGES}
            | {"python": platform.python_version()},
            "commit": commit_here(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "cases": _sorted(mine, "case", ("op", "dtype", "configuration")),
            "faults": _sorted(mine, "fault", ("kernel", "fault", "number")),
        }
        write_text(path_of(folder, chip), json.dumps(document, indent=1) + "\n")


def _sorted(rows: list[dict[str, Any]], kind: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of this kind, in an order that the number of processes has no part in."""
    wanted = [row for row in rows if row["kind"] == kind]
    wanted.sort(key=lambda row: [row[key] for key in keys])
    return [{k: v for k, v in row.items() if k not in ("chip", "kind")} for row in wanted]
