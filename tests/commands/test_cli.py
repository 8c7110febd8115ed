"""Help, errors, exit codes: what all commands share."""

import os
import subprocess
import sys

import pytest

import hrvlm
from tests.commands.helpers import error_of, run

COMMANDS = [
    "encode",
    "embed",
    "search",
    "plan",
    "merge",
    "generate",
    "evaluate",
    "bench",
    "bench-generate",
    "convert",
    "verify",
    "doctor",
]


def test_help_answers_at_once_and_without_torch():
    program = (
        "import sys, time; start = time.perf_counter()\n"
        "from hrvlm.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(time.perf_counter() - start, *sorted({'torch', 'transformers', 'PIL'} &"
        " set(sys.modules)))"
    )
    path = os.pathsep.join(["kernels", "."])
    out = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": path},
    ).stdout
    seconds, *heavy = out.splitlines()[-1].split()
    assert float(seconds) < 1 and not heavy
    assert all(f"\n  {command} " in out for command in COMMANDS)
    assert out.count("...") == 1  # of the usage; no description is cut short


def test_a_real_process_ends_with_the_exit_code_and_one_line(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", "from hrvlm.cli import app; app()", "plan", "1x1", "none.png"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(["kernels", "."])},
    )
    assert out.returncode == 2 and out.stdout == ""
    assert out.stderr == (
        "error: 'none.png' is neither HEIGHTxWIDTH (such as 1080x1920) nor a file\n"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = run(command, "--help")
    assert result.exit_code == 0 and "--json" in result.stdout and "--debug" in result.stdout


def test_the_package_runs_as_a_module():
    paths = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "hrvlm", "--version"]
    out = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert (out.returncode, out.stdout) == (0, f"hrvlm {hrvlm.__version__}\n"), out.stderr


def test_version_and_bare_call():
    assert run("--version").stdout == f"hrvlm {hrvlm.__version__}\n"
    bare = run()
    assert bare.exit_code == 0 and "Commands:" in bare.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode"], "Missing argument"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["plan", "8x8", "--bogus"], "No such option"),
        (["plan", "8x8", "--factor", "two"], "--factor"),
        (["plan", "8x8", "--model", "vit"], "model must be one of vitt16"),
        (["plan", "8x8", "--max-img-size", "63"], "max_img_size=63"),
        (["encode", "missing.png"], "missing.png: no such file"),
        (["encode", "tests/encoder"], "no images in this directory"),
        (["generate", "--prompt", "x"], "--image is needed"),
        (["generate", "--prompt", "x", "--model", "./no", "--num-beams", "0"], "num_beams"),
        (["convert", "missing.pth", "out"], "missing.pth"),
        (["verify", "--dtype", "int8"], "dtype must be one of"),
        (["verify", "--device", "quantum"], "device 'quantum' can't be used"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message):
    result = run(*arguments)
    assert message in error_of(result) and result.stdout == ""


@pytest.mark.parametrize("place", [0, 2])
def test_debug_shows_the_traceback(place):
    arguments = ["plan", "8x8", "--dtype", "int8"]
    plain = run(*arguments)
    assert "Traceback" not in plain.stderr
    arguments.insert(place, "--debug")
    result = run(*arguments)
    assert result.exit_code == 2 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == error_line(plain)


def error_line(result):
    return f"error: {error_of(result)}"


def test_a_bug_is_exit_code_1_and_says_how_to_see_more(monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("surprise")

    monkeypatch.setattr("hrvlm.encoder.cost.make_plan", broken)
    assert error_of(run("plan", "8x8"), 1) == "KeyError: 'surprise' (--debug shows where)"


def test_an_interrupt_is_one_line(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hrvlm.encoder.cost.make_plan", interrupted)
    result = run("plan", "8x8")
    assert result.exit_code == 130 and "Traceback" not in result.stderr
