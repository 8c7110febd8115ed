"""What `make gpu` runs stays in its time, and one bad step does not cost the others."""

import sys
import time
from pathlib import Path

from benchmarks.gpu_run import SUITES, Step, run_steps, steps_of

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
    tests, *suites = steps_of(tmp_path, "abc")
    assert tests.command[3:6] == ("tests", "-m", "gpu")
    modules = [Path(suite.command[3]) for suite in suites]
    assert all((ROOT / module).exists() for module in modules)
    there = {path.stem.removeprefix("bench_") for path in ROOT.glob("benchmarks/bench_*.py")}
    assert set(SUITES) == there - {"cpu_encoder", "processing"}
    given = (f"--results={tmp_path}", "--commit=abc")
    assert all(suite.command[4:] == given for suite in suites)
    assert [suite.name for suite in suites if suite.budget] == ["encoder"]


def test_the_last_suite_is_told_what_time_is_left(tmp_path):
    told = f"import sys; open({str(tmp_path / 'told')!r}, 'w').write(' '.join(sys.argv[1:]))"
    last = Step("last", (sys.executable, "-c", told), budget=True)
    assert run_steps([last], 100.0) == {"last": "done"}
    assert (tmp_path / "told").read_text() == "--budget=55"
