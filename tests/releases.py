"""The newest and the oldest releases that the package allows: what they are, and how the tests go.

    python tests/releases.py lowest       # constraints: every lower bound of pyproject.toml
    python tests/releases.py installed    # constraints: what is installed of the dependencies
    python tests/releases.py newest [HOW TO RUN] [-- PYTEST ARGUMENTS]    # run the tests
    python tests/releases.py oldest [HOW TO RUN] [-- PYTEST ARGUMENTS]
    python tests/releases.py part NAME [HOW TO RUN] -- FILES    # run these; kept as a part
    python tests/releases.py readme       # the table, from the outcomes that are kept

`make test-newest` and `make test-oldest` call it. The outcome of a run of all tests (nothing
behind "--") goes into tests/tried/, a file for each Python (newest-3.13.json), and from there into
the table of the README. Needs only the standard library: it runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = "tests/tried"
COLUMNS = ("torch", "torchvision", "triton", "transformers", "numpy", "Pillow", "huggingface_hub")
MARKS = ("<!-- releases:start -->\n", "<!-- releases:end -->\n")
UNTRIED = ("flash-attn",)  # needs a GPU
_NAME = re.compile(r"[\w-]+")
_BOUND = re.compile(r'"([\w-]+)(?:\[[\w,]+\])?>=([\w.]+)')


def dependencies():
    """The core dependencies of pyproject.toml, without their markers (3.10 has no TOML parser)."""
    body = (ROOT / "pyproject.toml").read_text().split("\ndependencies = [\n", 1)[1]
    lines = [line.strip().strip('",') for line in body.split("\n]", 1)[0].splitlines()]
    return [line.partition(";")[0] for line in lines if not line.startswith("#")]


def extras():
    """The lower bounds of what is optional, by name, but for what is not tried."""
    body = (ROOT / "pyproject.toml").read_text().split("\n[project.optional-dependencies]\n", 1)[1]
    bounds = {}
    for name, bound in _BOUND.findall(body.split("\n[", 1)[0]):
        if bounds.setdefault(name, bound) != bound:
            raise ValueError(f"pyproject.toml: {name}>={bounds[name]} and >={bound}")
    return {name: bound for name, bound in bounds.items() if name not in UNTRIED}


def lowest():
    """Constraints: the dependencies at their lower bounds, and constraints.txt for all else."""
    bounds = [line.replace(">=", "==") for line in dependencies()]
    bounds += [f"{name}=={bound}" for name, bound in extras().items()]
    bounded = {_NAME.match(line)[0].lower() for line in bounds}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name = _NAME.match(line)
        if name and name[0].lower() not in bounded:
            yield line
    yield from bounds


def installed():
    """The dependencies that are installed here, and their versions."""
    names = [_NAME.match(line)[0] for line in dependencies()]
    return {name: importlib.metadata.version(name) for name in names}


def installed_extras():
    """The same of what is optional."""
    found = {}
    for name in extras():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def outcome(report):
    """Counts of a JUnit report, and the names of the tests that failed."""
    counts, failed = dict.fromkeys(("passed", "failed", "skipped"), 0), []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            counts["failed"] += 1
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        else:
            counts["skipped" if "skipped" in kinds else "passed"] += 1
    return {**counts, "failures": failed}


def commit():
    """The commit that was tested; "+" says that files were changed since."""
    run = ["git", "-C", str(ROOT)]
    head = subprocess.run([*run, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*run, "status", "--porcelain"], capture_output=True, text=True)
    return head.stdout.strip() + "+" * bool(changed.stdout.strip())


def try_out(which, arguments, part=None):
    """Run pytest; the outcome goes into the README if these were all tests, or a named part."""
    partial = "--" in arguments[:-1]
    arguments = [argument for argument in arguments if argument != "--"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "--benchmark-disable", f"--junitxml={report}"]
        at = {"date": datetime.date.today().isoformat(), "commit": commit()}
        done = subprocess.run([*command, *arguments], cwd=ROOT, env={"CI": "1"} | os.environ)
        if done.returncode in (0, 1) and (part or not partial):
            where = {"python": platform.python_version(), "platform": platform.system()}
            what = {"installed": installed(), "extras": installed_extras()}
            kept = at | where | ({"part": part} if part else {}) | what | outcome(report)
            results = ROOT / RESULTS
            results.mkdir(exist_ok=True, parents=True)
            name = which if part else f"{which}-{sys.version_info[0]}.{sys.version_info[1]}"
            (results / f"{name}.json").write_text(json.dumps(kept, indent=2) + "\n")
            write_readme()
    return done.returncode


def write_readme():
    """Put the table into the README."""
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text()))


def table():
    """The lines of the README's table: a row for each outcome kept."""
    if not list((ROOT / RESULTS).glob("*.json")):
        return
    yield "How that went the last time, in tests:"
    yield ""
    counted = ("passed", "failed", "skipped")
    titles = ("releases", "Python", *COLUMNS, "tests", *counted, "on", "commit")
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    for path in sorted((ROOT / RESULTS).glob("*.json")):
        kept = json.loads(path.read_text())
        versions = [kept["installed"][name].partition("+")[0] for name in COLUMNS]
        counts = [_tests_of(kept.get("part")), *(str(kept[name]) for name in counted)]
        name = f"[{path.stem}]({RESULTS}/{path.name})"
        when = kept["date"], kept["commit"]
        yield f"| {' | '.join((name, kept['python'], *versions, *counts, *when))} |"


def _tests_of(part):
    if part is None:
        return "all"
    rooms = sorted({path.partition("::")[0].split("/")[1].removesuffix(".py") for path in part})
    return f"some, of {', '.join(rooms)}"


def with_table(readme):
    """The text of the README with the table between its marks."""
    before, _, rest = readme.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return "".join((before, MARKS[0], *(f"{line}\n" for line in table()), MARKS[1], after))


def main(arguments):
    """What the module says."""
    what, *others = arguments
    if what == "lowest":
        print("\n".join(lowest()))
    elif what == "installed":
        print("\n".join(f"{name}=={version}" for name, version in installed().items()))
    elif what in ("newest", "oldest"):
        return try_out(what, others)
    elif what == "part" and "--" in others[1:-1]:
        return try_out(others[0], others[1:], part=others[others.index("--") + 1 :])
    elif what == "readme":
        write_readme()
    else:
        print(
            "releases: expected lowest, installed, newest, oldest, part or readme", file=sys.stderr
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
