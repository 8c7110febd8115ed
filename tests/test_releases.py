"""The newest and oldest releases: their constraints, and what the README says of them."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests import releases

REPORT = """<testsuites><testsuite>
<testcase classname="a" name="one"/><testcase classname="a" name="two"><skipped/></testcase>
<testcase classname="b" name="three"><failure/></testcase>
<testcase classname="b" name="four"><error/></testcase>
</testsuite></testsuites>"""


def test_the_lowest_are_the_bounds_of_pyproject_with_the_tools_of_constraints():
    lines = [Requirement(line) for line in releases.lowest()]
    found = {canonicalize_name(line.name): line for line in lines}
    assert len(found) == len(lines)
    pins = [line for line in (releases.ROOT / "constraints.txt").read_text().splitlines() if line]
    pinned = [Requirement(line) for line in pins if not line.startswith("#")]
    extras = {canonicalize_name(name): version for name, version in releases.extras().items()}
    assert {"peft", "accelerate", "bitsandbytes", "ray", "pillow-heif", "pyarrow"} <= set(extras)
    assert set(found) == {canonicalize_name(pin.name) for pin in pinned} | set(extras)
    for bound in map(Requirement, releases.dependencies()):
        (spec,) = bound.specifier
        assert str(found.pop(canonicalize_name(bound.name)).specifier) == f"=={spec.version}"
    for name, version in extras.items():
        assert str(found.pop(name).specifier) == f"=={version}"
    assert all(line in pinned for line in found.values())


def test_two_bounds_of_one_extra_are_refused(monkeypatch, tmp_path):
    lists = 'a = ["peft>=1.0", "flash-attn>=2"]\nb = ["peft>=1.1"]'
    (tmp_path / "pyproject.toml").write_text(
        f"\n[project.optional-dependencies]\n{lists}\n[tool]\n"
    )
    monkeypatch.setattr(releases, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"peft>=1\.0 and >=1\.1"):
        releases.extras()


def test_what_is_installed_is_named():
    names = {Requirement(line).name for line in releases.dependencies()}
    assert set(releases.installed()) == names > {"torch", "numpy", "typer"}


def test_an_outcome_counts_and_names_failures(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    assert releases.outcome(tmp_path / "report.xml") == {
        "passed": 1, "failed": 2, "skipped": 1, "failures": ["b::three", "b::four"],
    }  # fmt: skip


def test_all_tests_are_kept_and_a_part_of_them_is_not(monkeypatch, tmp_path):
    shutil.copy2(releases.ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "README.md").write_text("before\n" + "old\n".join(releases.MARKS) + "after\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text("def test_a(): 0\n\ndef test_b(): 1 / 0\n")
    monkeypatch.setattr(releases, "ROOT", tmp_path)
    assert releases.main(["newest", "-q", "--", "-k", "test_a"]) == 0
    assert not (tmp_path / releases.RESULTS).exists()
    assert releases.main(["newest", "-q", "--"]) == 1
    name = f"newest-{sys.version_info[0]}.{sys.version_info[1]}.json"  # a row for each Python
    kept = json.loads((tmp_path / releases.RESULTS / name).read_text())
    assert (kept["passed"], kept["failed"]) == (1, 1) and "test_b" in kept["failures"][0]
    readme = (tmp_path / "README.md").read_text()
    assert kept["installed"]["transformers"] in readme and "old" not in readme
    assert readme.startswith("before\n<!--") and readme.endswith("-->\nafter\n")
    assert releases.with_table(readme) == readme and "| all |" in readme
    assert releases.main(["part", "python-3.13", "-q", "--", "tests/test_it.py::test_a"]) == 0
    kept = json.loads((tmp_path / releases.RESULTS / "python-3.13.json").read_text())
    assert kept["part"] == ["tests/test_it.py::test_a"] and kept["passed"] == 1
    assert "| some, of test_it | 1 | 0 | 0 |" in (tmp_path / "README.md").read_text()
    assert releases.main(["part", "python-3.13", "-q"]) == 2  # all would be no part


def test_make_installs_into_environments_of_their_own():
    for target, first in (("newest", "installed"), ("oldest", "lowest")):
        plan = subprocess.run(
            ["make", "-n", f"test-{target}"],
            cwd=releases.ROOT,
            env={name: os.environ[name] for name in ("PATH", "HOME")},  # not a make's around it
            capture_output=True,
            text=True,
        ).stdout
        where = f".venv-{target}"
        assert f"tests/releases.py {first} > {where}/core.txt" in plan
        assert f"-c {where}/core.txt -e '.[dev]'" in plan and "constraints.txt" not in plan
        assert f"{where}/bin/python tests/releases.py {target}" in plan


def test_the_readme_says_what_was_tried_last():
    readme = (releases.ROOT / "README.md").read_text()
    assert releases.with_table(readme) == readme


def test_exports_were_tried_as_a_whole():
    path = releases.ROOT / releases.RESULTS / "exports.json"
    if not path.exists():
        pytest.skip("no run of `make exports` is kept")
    kept = json.loads(path.read_text())
    plan = (releases.ROOT / "Makefile").read_text().partition("\nexports:")[2].partition("\n\n")[0]
    assert all(file in plan for file in kept["part"]) and len(kept["part"]) == 3
    assert kept["failures"] == [] and kept["skipped"] == 0 and kept["passed"] > 50


def test_every_lower_bound_was_tried():
    tried, with_extras = {}, False
    for path in (releases.ROOT / releases.RESULTS).glob("oldest*.json"):
        kept = json.loads(path.read_text())
        with_extras |= "extras" in kept  # older outcomes did not look at them
        for name, version in (kept["installed"] | kept.get("extras", {})).items():
            tried.setdefault(name, set()).add(Version(Version(version).public))  # without +cu130
    core = map(Requirement, releases.dependencies())
    bounds = {bound.name: next(iter(bound.specifier)).version for bound in core}
    bounds |= releases.extras() if with_extras else {}
    for name, bound in bounds.items():
        assert Version(bound) in tried[name], f"{name}>={bound}: tried was {tried[name]}"
