"""What `make gpu` runs stays in its time, and one bad step does not cost the others."""

import sys
import time
from pathlib import Path

import torch

from benchmarks import bench_encoder
from benchmarks.case import Settings
from benchmarks.gpu_run import SUITES, TESTS, Step, run_steps, steps_of

ROOT = Path(__file__).parents[2]


def step(name, code, share=1.0):
    return Step(name, (sys.executable, "-c", code), share)


def test_a_step_that_fails_or_hangs_costs_no_other(tmp_path):
    start = time.monotonic()
    # A child that would outlive its parent, as the workers of a test run do.
    hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])".format(
        f"import time; time.sleep(2); open({str(tmp_path / 'late')!r}, 'w')"
    )
    ends = run_steps(
        [
            step("failed", "raise SystemExit(3)"),
            step("hung", hang, share=0.1),
            step("done", f"open({str(tmp_path / 'made')!r}, 'w')"),
        ],
        10.0,
    )
    assert ends == {
        "failed": "failed (exit status 3)",
        "hung": "ended after 1 s",
        "done": "done",
    }
    assert (tmp_path / "made").exists() and time.monotonic() - start < 10
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def test_no_step_is_begun_without_time_for_it():
    ends = run_steps([step("long", "import time; time.sleep(60)"), step("late", "")], 0.5)
    assert ends == {"long": "ended after 0 s", "late": "no time left"}


def test_every_suite_of_the_gpu_is_a_step(tmp_path):
    gate, *steps = steps_of(tmp_path, "abc")
    assert gate.command[1:4] == ("-m", "hrvlm", "verify") and 570 * gate.share == 30
    assert [step.name for step in steps[:3]] == ["encoder", "varlen_attention", "tests"]
    suites = [step for step in steps if step.name != "tests"]
    modules = [Path(suite.command[3]) for suite in suites]
    assert all((ROOT / module).exists() for module in modules)
    there = {path.stem.removeprefix("bench_") for path in ROOT.glob("benchmarks/bench_*.py")}
    assert set(SUITES) == there - {"cpu_encoder", "processing"}
    given = (f"--results={tmp_path}", "--commit=abc")
    assert all(suite.command[4:] == given for suite in suites)
    assert [suite.name for suite in suites if suite.budget] == ["encoder"]


def test_every_file_with_tests_for_the_gpu_is_named():
    named = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("tests/**/test_*.py")
        if "pytest.mark.gpu" in path.read_text() and path != Path(__file__)
    }
    assert set(TESTS) == named and len(TESTS) == len(named)


def test_the_headline_comes_first():
    """1024 px, mixed, 768 and 224 px, each against torch.compile."""
    first = [case.name for case in bench_encoder.cases(Settings(torch.device("cuda")))][:4]
    assert first == [
        "ViT-L forward, 1024 px",
        "ViT-L mixed forward, mixed",
        "ViT-L forward, 768 px",
        "ViT-L forward, 224 px",
    ]


def test_the_headline_is_told_what_time_is_left(tmp_path):
    told = f"import sys; open({str(tmp_path / 'told')!r}, 'w').write(' '.join(sys.argv[1:]))"
    last = Step("last", (sys.executable, "-c", told), budget=True)
    assert run_steps([last], 100.0) == {"last": "done"}
    assert (tmp_path / "told").read_text() == "--budget=55"
