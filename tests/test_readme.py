"""The documents name only what exists: snippets run, commands parse, links and names resolve.

Those of docs/ are followed from top to bottom: Python snippets in one namespace, and commands
(`hrvlm`, `python -m recipes...`) in one folder, each where it stands. A block that starts with the
comment "# needs ..." or "# runs until ..." is only looked at, as are the commands of the README.
"""

import dataclasses
import importlib
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from packaging.requirements import Requirement
from PIL import ExifTags, Image, ImageChops, ImageOps, ImageStat
from typer.testing import CliRunner

from hrvlm.cli import app
from hrvlm.training.config import TrainingConfig
from hrvlm.training.trainer import VLMTrainingArguments

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *GUIDES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(\w+=\S+ )*(bash|hrvlm|make|pip|python) ")
ONLY_SHOWN = re.compile(r"# (needs|runs until) ")
OTHERS = ("accelerate", "curl", "lmms-eval", "torchrun")  # what is said to them is theirs to check
WITHOUT_INPUTS = ("doctor", "plan")  # commands that can be run just as they are written


def fences(document, *languages):
    """(line number, content) of the fenced blocks in these languages."""
    text = document.read_text()
    return [
        (text.count("\n", 0, match.start()) + 2, match[2])
        for match in FENCE.finditer(text)
        if match[1] in languages
    ]


def spans(document):
    """The `code spans` outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", document.read_text()))


def of_readme(cases):
    return [pytest.param(*case, id=f"README.md:{case[0]}") for case in cases]


@pytest.mark.parametrize("line, source", of_readme(fences(README, "python")))
def test_snippet_runs(line, source, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")  # what a snippet may read
    monkeypatch.chdir(tmp_path)
    code = compile("\n" * (line - 1) + source, str(README), "exec")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_a_guide_can_be_followed(guide, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    text = guide.read_text()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in FENCE.finditer(text):
            line, source = text.count("\n", 0, block.start()) + 1, block[2]
            if ONLY_SHOWN.match(source):
                continue
            if block[1] == "python":
                exec(compile("\n" * line + source, str(guide), "exec"), namespace)
            elif block[1] == "bash":
                for words in lines_of(source):
                    if words[:2] == ["python", "-m"] and words[2].startswith("recipes."):
                        importlib.import_module(words[2]).main(words[3:])
                        continue
                    assert words[0] == "hrvlm", f"{guide.name}, line {line}: only hrvlm is run"
                    result = CliRunner().invoke(app, words[1:])
                    assert result.exit_code == 0, f"{words}:\n{result.output}"


def test_readme_shows_the_two_commands_first_and_then_snippets():
    (_, first), *_ = fences(README, "bash")
    assert [shlex.split(row, comments=True) for row in first.splitlines()] == [
        ["make", "demo"],
        ["make", "test"],
    ]
    assert len(fences(README, "python")) >= 3


def test_every_fence_has_a_language_that_is_tested():
    for document in DOCUMENTS:
        languages = {match[1] for match in FENCE.finditer(document.read_text())}
        assert languages <= {"python", "bash", "text"}, document.name


def lines_of(script):
    """The words of each command in it; quotes and backslashes may carry one over several lines."""
    found = []
    row = ""
    for part in script.splitlines():
        row += part + "\n"
        try:
            words = shlex.split(row.replace("\\\n", " "), comments=True)
        except ValueError:  # a quote is open
            continue
        if part.endswith("\\"):
            continue
        row = ""
        while words and re.fullmatch(r"\w+=.*", words[0]):
            del words[0]
        if words:
            found.append(words)
    return found


def commands():
    """(document, words) of every command line in the documents' bash blocks and code spans."""
    return [
        pytest.param(words, id=f"{document.name}: {' '.join(words)}")
        for document in DOCUMENTS
        for script in (
            *(block for _, block in fences(document, "bash")),
            *(span for span in spans(document) if COMMAND.match(span)),
        )
        for words in lines_of(script)
    ]


@pytest.mark.parametrize("words", commands())
def test_command_exists(words):
    program, *arguments = words
    if {"--no-python", "--no_python"} & set(arguments):  # a launcher's way to start a program
        program, arguments = "hrvlm", arguments[arguments.index("hrvlm") + 1 :]
    if program in OTHERS:
        return
    checks = {
        "bash": check_script,
        "hrvlm": check_hrvlm,
        "make": check_make,
        "pip": check_pip,
        "python": check_python,
    }
    assert program in checks, f"no check for the program {program!r}"
    checks[program](arguments)


def check_hrvlm(arguments):
    command = typer.main.get_command(app)
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
        assert name in command.commands, f"no command {name!r}"
        if not arguments and name not in WITHOUT_INPUTS:
            return  # a command that is spoken of
        command = command.commands[name]
        context = command.make_context(name, list(arguments))  # raises on unknown options
        if name == "train" and (config := context.params["config"]) and (ROOT / config).exists():
            check_training(ROOT / config, context.params["override"] or ())
        if name in WITHOUT_INPUTS:
            result = CliRunner().invoke(app, [name, *arguments])
            assert result.exit_code == 0, result.output
        return
    options = {name for parameter in command.params for name in parameter.opts}
    assert set(arguments) <= options | {"-h", "--help"}


def check_training(path, overrides):
    known = {field.name for field in dataclasses.fields(VLMTrainingArguments)}
    assert set(TrainingConfig.from_yaml(path, overrides).training) <= known


def check_make(arguments):
    text = (ROOT / "Makefile").read_text()
    targets = {
        name for names in re.findall(r"^\.PHONY: (.*)$", text, re.M) for name in names.split()
    }
    variables = set(re.findall(r"^(\w+) \?=", text, re.M))
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        assert name in (variables if equals else targets), argument


def check_pip(arguments):
    assert arguments[0] == "install"
    extras = set(re.findall(r'^([\w-]+) = \["', (ROOT / "pyproject.toml").read_text(), re.M)) | {
        "dev"
    }
    for before, argument in itertools.pairwise(arguments):
        if argument.startswith("-"):
            assert argument in ("-e", "--editable", "--no-deps", "-r"), argument
            continue
        if before == "-r":
            assert (ROOT / argument).exists(), argument
            continue
        local = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", argument)
        if local:
            assert set((local[1] or "dev").split(",")) <= extras, argument
        else:
            Requirement(argument)


def check_python(arguments):
    if arguments[0] == "-m":
        module = arguments[1]
        paths = [root.joinpath(*module.split(".")) for root in (ROOT, ROOT / "kernels")]
        files = [file for p in paths for file in (p.with_suffix(".py"), p / "__main__.py")]
        assert module == "pytest" or any(file.exists() for file in files), module
    else:
        assert (ROOT / arguments[0]).exists(), arguments[0]


def check_script(arguments):
    assert (ROOT / arguments[0]).exists(), arguments[0]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(document):
    text = document.read_text()
    links = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if not t.startswith(("http", "mailto"))]
    for link in links:
        assert (document.parent / link).exists(), link
    ours = [entry.name for entry in ROOT.iterdir() if entry.is_dir()]
    for span in spans(document):
        if re.fullmatch(r"[\w.-]+(/[\w.-]*)+", span) and span.partition("/")[0] in ours:
            generated = span.startswith(("demo/", ".venv/"))
            assert generated or (ROOT / span).exists(), span


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_dotted_names_exist(document):
    for span in spans(document):
        for dotted in re.findall(r"\b(hrvlm(?:_kernels)?(?:\.\w+)+)", span):
            value: object = importlib.import_module(dotted.partition(".")[0])
            at = dotted.partition(".")[0]
            for name in dotted.split(".")[1:]:
                at += f".{name}"
                if isinstance(value, ModuleType) and not hasattr(value, name):
                    value = importlib.import_module(at)
                else:
                    value = getattr(value, name)


def folders_of_tree():
    """Paths of all lines of the README's tree, by their indentation."""
    (tree,) = (block for _, block in fences(README, "text") if "hrvlm_kernels/" in block)
    above, found = [], []
    for line in tree.splitlines():
        name, _, says = line.strip().partition("/")
        depth = (len(line) - len(line.lstrip())) // 2
        above[depth:] = [name]
        assert says.strip(), f"{name}/: nothing is said of it"
        found.append("/".join(above))
    return found


def test_the_tree_is_the_folders_that_git_lists():
    """All at the top, and below them those with Python files, outside of tests/, and the assets."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [Path(line) for line in listed.stdout.splitlines()]
    folders = {path.parts[0] for path in files if len(path.parts) > 1 and path.parts[0] != ".ci"}
    folders |= {str(p.parent) for p in files if p.suffix == ".py" and p.parts[0] != "tests"} - {"."}
    assert folders_of_tree() == sorted(folders | {"hrvlm/assets"})


EXAMPLES = ROOT / "examples"


def test_examples_are_listed_and_small():
    pictures = [path for path in EXAMPLES.iterdir() if path.suffix in (".png", ".jpg")]
    assert len(pictures) >= 4
    assert sum(path.stat().st_size for path in pictures) < 1_500_000
    listed = spans(EXAMPLES / "README.md")
    assert all(path.name in listed for path in pictures)


def test_the_photograph_lies_on_its_side():
    with Image.open(EXAMPLES / "photo.jpg") as photo:
        assert photo.getexif()[ExifTags.Base.Orientation] == 6
        assert ImageOps.exif_transpose(photo).size == photo.size[::-1]


def test_the_drawings_can_be_drawn_again(tmp_path):
    shutil.copy(EXAMPLES / "draw.py", tmp_path)
    subprocess.run([sys.executable, "draw.py"], cwd=tmp_path, check=True)
    drawn = sorted(tmp_path.glob("*.png"))
    assert [path.name for path in drawn] == sorted(path.name for path in EXAMPLES.glob("*.png"))
    for path in drawn:
        with Image.open(path) as again, Image.open(EXAMPLES / path.name) as kept:
            assert again.size == kept.size
            # Pillow's versions differ a little in how they draw text.
            difference = ImageChops.difference(again.convert("RGB"), kept.convert("RGB"))
            assert max(ImageStat.Stat(difference).mean) < 1
