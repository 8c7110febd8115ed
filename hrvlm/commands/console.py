"""What all commands share: errors in one line, JSON on stdout, tables and progress elsewhere."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from rich.console import Console

USER_ERROR, FAILURE = 2, 1
_WIDE = 200  # columns of a table that goes to a file or a pipe, where nothing wraps


class CommandGroup(TyperGroup):
    """Commands whose errors are one line, ``error: ...``, on stderr.

    Exit code 2 for what the user can put right (bad arguments, files that can't be read), 1 for the
    rest. ``--debug`` prints the traceback first.
    """

    debug = False

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command and end the process."""
        kwargs["standalone_mode"] = False  # else the parser would print and exit by itself
        try:
            code = super().main(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            self._fail(error)
        sys.exit(code if isinstance(code, int) else 0)

    def _fail(self, error: BaseException) -> NoReturn:
        if self.debug:
            traceback.print_exception(error)
        if isinstance(error, (typer.Abort, KeyboardInterrupt)):
            message, code = "interrupted", 130
        elif hasattr(error, "format_message"):  # the parser's own errors
            message, code = error.format_message(), USER_ERROR
        elif isinstance(error, (ValueError, OSError)):
            message, code = describe(error), USER_ERROR
        else:
            hint = "" if self.debug else " (--debug shows where)"
            message, code = f"{type(error).__name__}: {describe(error)}{hint}", FAILURE
        print(f"error: {message}", file=sys.stderr)
        sys.exit(code)


def describe(error: BaseException) -> str:
    """The message of an error in one line where it is short, else its own lines."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error).strip() or type(error).__name__


def remember_debug(context: typer.Context, value: bool) -> bool:
    """Option callback: have :class:`CommandGroup` show the traceback of an error."""
    if value:
        context.find_root().command.debug = True  # type: ignore[attr-defined]
    return value


@contextlib.contextmanager
def json_only(enabled: bool) -> Iterator[None]:
    """While `enabled`, send what anything prints to stdout to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if enabled else contextlib.nullcontext():
        yield


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


@contextlib.contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, drawn only where that is a terminal.

    Yields:
        A function that is told how many steps were done since its last call.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    out = console(stderr=True)
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda steps: bar.advance(task, steps)
