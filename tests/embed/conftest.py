"""A fixture of the commands' tests that is used here, too."""

from tests.commands.conftest import vlm  # noqa: F401
