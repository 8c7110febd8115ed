"""Where the commands print: results on stdout, notes and progress on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_WIDE = 200  # columns of a table that goes to a file or a pipe, where nothing wraps


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))


def console(*, stderr: bool = False) -> Console:
    """A rich console; wide where the output is no terminal, so that nothing is cut."""
    from rich.console import Console

    out = Console(stderr=stderr, highlight=False)
    if not out.is_terminal:
        out.width = _WIDE
    return out


def printable(value: object) -> str:
    """Text that stdout can take: file names may hold bytes that are no characters."""
    encoding = sys.stdout.encoding or "utf-8"
    return str(value).encode(encoding, "backslashreplace").decode(encoding)


def note(message: str) -> None:
    """Print a line on stderr."""
    print(message, file=sys.stderr)


def note_left_out(skipped: Iterable[object], bad: Iterable[tuple[object, str]]) -> None:
    """Name what is no image by its name, what folders are not entered, and what can't be read."""
    for name in skipped:
        why = "a link to a folder" if Path(str(name)).is_dir() else "no image by its name"
        note(f"skipped {printable(name)}: {why}")
    for name, reason in bad:
        note(f"skipped {printable(name)}: {reason}")


@contextlib.contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, drawn only where that is a terminal.

    Yields:
        A function that is told how many steps were done since its last call.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    text = TextColumn("{task.description}")
    columns = text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    out = console(stderr=True)
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda steps: bar.advance(task, steps)
