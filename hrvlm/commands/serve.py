"""``hrvlm serve``."""

from __future__ import annotations

import typer

from .command import command


# Arguments are another program's, --help included.
@command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def serve(context: typer.Context) -> None:
    """An OpenAI-compatible server with our models.

    It is `transformers serve`, and takes all its arguments; with --fetch it fetches images that are
    URLs, which clients may then make it do.
    """
    from ..inference.serve import serve as run
    from ..reader.model import refusal

    run(context.args, refusal)
