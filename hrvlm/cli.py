"""The entry point ``hrvlm``; each command is a file of its name in ``commands``.

torch and the rest are imported inside the commands, so that ``hrvlm --help`` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from . import __version__
from .commands.bench import bench
from .commands.bench_generate import bench_generate
from .commands.command import CommandGroup, Debug
from .commands.convert import convert
from .commands.doctor import doctor
from .commands.embed import embed
from .commands.encode import encode
from .commands.evaluate import evaluate
from .commands.explore import explore
from .commands.export import export
from .commands.generate import generate
from .commands.merge import merge
from .commands.plan import plan
from .commands.search import search
from .commands.serve import serve
from .commands.train import train
from .commands.verify import verify

app = typer.Typer(
    cls=CommandGroup,
    help="High-resolution vision encoders for images as they are: any size, many at once.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# In the order of the help page.
COMMANDS = (
    encode,
    embed,
    search,
    explore,
    plan,
    train,
    merge,
    generate,
    evaluate,
    bench,
    bench_generate,
    serve,
    convert,
    export,
    verify,
    doctor,
)
for _command in COMMANDS:
    app.command(**_command.settings)(_command)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"hrvlm {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
    debug: Debug = False,
) -> None:
    """High-resolution vision encoders for images as they are: any size, many at once."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
