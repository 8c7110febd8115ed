"""The result files of a chip: what ran as compiled for it on ptx_machine. There is no device."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.suite import commit_here
from hrvlm.files import write_text

FOLDER = Path(__file__).parents[1] / "results"
SCHEMA = 1
TESTS = "compiled-tests-{}.json"
PACKAGES = ("torch", "triton", "transformers", "numpy")


KINDS = {  # of rows: the file's name, and what its rows are sorted by
    "case": ("compiled-sm_{}.json", ("op", "dtype", "configuration")),
    "fault": ("compiled-faults-sm_{}.json", ("kernel", "fault", "number")),
}


def read(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The documents of all chips, oldest chip first."""
    paths = sorted(folder.glob(KINDS[kind][0].format("*")))
    return [json.loads(path.read_text()) for path in paths]


def read_tests(folder: Path) -> list[dict[str, Any]]:
    """The documents of :func:`write_tests`, oldest chip first."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(TESTS.format("*")))]


def write(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A file for each chip and kind of row that there is: a row has "chip" and "kind"."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        kept = {name: value for name, value in row.items() if name not in ("chip", "kind")}
        groups.setdefault((row["kind"], row["chip"]), []).append(kept)
    for (kind, chip), kept in groups.items():
        name, keys = KINDS[kind]
        kept.sort(
            key=lambda row, keys=keys: [row[key] for key in keys]
        )  # whatever process was first
        document = _origin(f"sm_{chip}") | {"rows": kept}
        write_text(folder / name.format(chip), json.dumps(document, indent=1) + "\n")


def write_tests(folder: Path, chip: str, outcomes: Mapping[str, int]) -> None:
    """How many of the kernels' own tests passed, failed and were skipped as compiled for a chip."""
    document = _origin(chip) | {"tests": dict(sorted(outcomes.items()))}
    write_text(folder / TESTS.format(chip), json.dumps(document, indent=1) + "\n")


def _origin(chip: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "chip": chip,
        "device": None,
        "versions": {name: metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "commit": commit_here(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
