"""What `make gpu` runs stays in its time, and one bad step does not cost the others."""

import json
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from benchmarks import bench_encoder
from benchmarks.case import Settings
from benchmarks.gpu_run import SECONDS, TESTS, Ends, Step, run_steps, steps_of

ROOT = Path(__file__).parents[2]


def step(name, code, seconds=10.0):
    return Step(name, (sys.executable, "-c", code), seconds)


def told_by(path):
    return {name: step["end"] for name, step in json.loads(path.read_text())["steps"].items()}


def test_a_step_that_fails_or_hangs_costs_no_other(tmp_path):
    """And what each printed is in a file, and how it ended, before the next one begins."""
    start = time.monotonic()
    # A child that would outlive its parent, as the workers of a test run do.
    hang = (
        "import subprocess, sys; print('begun', flush=True); "
        "subprocess.run([sys.executable, '-c', {!r}])"
    ).format(f"import time; time.sleep(2); open({str(tmp_path / 'late')!r}, 'w')")
    path = tmp_path / "results" / "ends.json"
    look = f"print(open({str(path)!r}).read())"
    ends = run_steps(
        [
            step("hung", hang, 1.0),
            step("failed", "raise SystemExit(3)", 4.5),
            step("done", look, 4.5),
        ],
        10.0,
        Ends(path, "abc"),
    )
    assert ends == told_by(path)
    assert ends == {
        "hung": "ended after 1 s",
        "failed": "failed (exit status 3)",
        "done": "done",
    }
    assert (path.parent / "ends-hung.log").read_text() == "begun\n"
    assert "failed (exit status 3)" in (path.parent / "ends-done.log").read_text()
    assert time.monotonic() - start < 10
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def test_what_is_known_of_other_steps_stays(tmp_path):
    path = tmp_path / "ends.json"
    for commit, name, code in [
        ("a", "failed", "raise SystemExit(3)"),
        ("a", "done", "print(1)"),
        ("b", "other", ""),
    ]:
        run_steps([step(name, code)], 10.0, Ends(path, commit))
        if name == "done":
            assert told_by(path) == {"failed": "failed (exit status 3)", "done": "done"}
    assert told_by(path) == {"other": "done"}
    assert (tmp_path / "ends-done.log").read_text() == "1\n"


def test_the_time_is_under_ten_minutes_and_what_is_left_is_handed_on(tmp_path):
    assert sum(SECONDS.values()) == 570 and SECONDS["gate"] == 30
    told = "import sys; print(*sys.argv[1:])"
    steps = [step("quick", "", 30.0), replace(step("suite", told, 60.0), budget=True)]
    path = tmp_path / "ends.json"
    run_steps(steps, 180.0, Ends(path, "abc"))
    limits = [step["limit_s"] for step in json.loads(path.read_text())["steps"].values()]
    assert limits[0] == 60 and 150 < limits[1] <= 180  # to a tenth
    budget = int((tmp_path / "ends-suite.log").read_text().removeprefix("--budget="))
    assert budget == round(limits[1] - 45)


def test_every_suite_of_the_gpu_is_a_step(tmp_path):
    gate, *steps = steps_of(tmp_path, "abc")
    assert gate.command[1:4] == ("-m", "hrvlm", "verify")
    assert [step.name for step in steps[:3]] == ["encoder", "varlen_attention", "tests"]
    suites = [step for step in steps if step.name != "tests"]
    modules = [Path(suite.command[3]) for suite in suites]
    assert all((ROOT / module).exists() for module in modules)
    there = {path.stem.removeprefix("bench_") for path in ROOT.glob("benchmarks/bench_*.py")}
    assert {suite.name for suite in suites} == there - {"cpu_encoder", "processing"}
    given = (f"--results={tmp_path}", "--commit=abc")
    assert all(suite.command[4:] == given and suite.budget for suite in suites)


def test_every_file_with_tests_for_the_gpu_is_named():
    named = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("tests/**/test_*.py")
        if "pytest.mark.gpu" in path.read_text() and path != Path(__file__)
    }
    assert set(TESTS) == named and len(TESTS) == len(named)


def test_the_headline_comes_first():
    """1024 px, mixed, 768 and 224 px, each against torch.compile, without --full."""
    first = list(bench_encoder._jobs())[:4]
    for job in first:
        short = [name for name in job.peers if name not in job.full_peers]
        assert [name for name in short if name in bench_encoder.HEADLINES]
    cases = bench_encoder.cases(Settings(torch.device("cuda")))
    assert [case.name for case in islice(cases, 4)] == [
        "ViT-L forward, 1024 px",
        "ViT-L mixed forward, mixed",
        "ViT-L forward, 768 px",
        "ViT-L forward, 224 px",
    ]
