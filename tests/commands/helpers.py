"""Running a command in the tests."""

from typer.testing import CliRunner

from hrvlm.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def error_of(result, code=2):
    """The one line on stderr of a command that refused."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0].removeprefix("error: ")
