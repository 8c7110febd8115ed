"""What makes a function a command: ``--json``, ``--debug``, errors in one line, exit codes.

Results go to stdout (with ``--json`` nothing but one JSON document), everything else to stderr.
Exit codes: 0 done, 1 a check failed or something broke, 2 the user can put it right.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from .console import note, print_json

USER_ERROR, FAILURE = 2, 1
_LIST = re.compile(r"\{(hrvlm[\w.]*)\.(\w+)\}")


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
        note(f"error: {message}")
        sys.exit(code)


class Command(TyperCommand):
    """A command whose help names choices where they are defined.

    ``{hrvlm.checkpoints.family.CONFIGS}`` in the help of an option becomes the names in that list.
    It is imported when the page is asked for: until then the command needs no torch.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page."""
        for parameter in self.params:
            if text := getattr(parameter, "help", None):
                parameter.help = _LIST.sub(_names, text)  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


def _names(listed: re.Match[str]) -> str:
    return ", ".join(getattr(importlib.import_module(listed[1]), listed[2]))


def describe(error: BaseException) -> str:
    """The message of an error in one line where it is short, else its own lines."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error).strip() or type(error).__name__


def _remember_debug(context: typer.Context, value: bool) -> bool:
    if value:
        context.find_root().command.debug = True  # type: ignore[attr-defined]
    return value


Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error.", callback=_remember_debug),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def command(
    *,
    show: Callable[[Any], None] | None = None,
    check: Callable[[Any], None] | None = None,
    **settings: Any,
) -> Callable[[Callable[..., Any]], Any]:
    """Make a command of a function that takes typer's parameters and returns its result.

    The result is plain data or has ``to_json()``; a function that returns None shows nothing. What
    it prints to stdout while it works goes to stderr under ``--json``.

    Args:
        show: Prints the result for people. Without it there is no ``--json``, unless the function
            has a parameter ``as_json`` of its own and prints as it goes.
        check: Called when the result is out; raises if that is not all well.
        **settings: For ``typer.Typer.command``; kept in the attribute ``settings``.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        function.__annotations__.pop("return", None)  # its module is not imported yet
        signature = inspect.signature(function, eval_str=True)
        own = signature.parameters
        added: dict[str, Any] = ({"as_json": Json} if show else {}) | {"debug": Debug}

        @functools.wraps(function)
        def run(*, as_json: bool = False, debug: bool = False, **values: Any) -> None:
            if "as_json" in own:
                values["as_json"] = as_json
            with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                result = function(**values)
            if result is None:
                return
            if as_json:
                print_json(result.to_json() if hasattr(result, "to_json") else result)
            elif show:
                show(result)
            if check:
                check(result)

        parameters = [*own.values()] + [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
            for name, kind in added.items()
            if name not in own
        ]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.settings = {"cls": Command} | settings  # type: ignore[attr-defined]
        return run

    return decorate
