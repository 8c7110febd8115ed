"""Everything that needs a GPU, in a bounded time: what ``make gpu`` runs.

    python -m benchmarks.gpu_run --minutes 9.5 --results benchmarks/results

What counts most comes first: half a minute of `hrvlm verify`, the whole encoder at 1024 px, mixed,
768 and 224 px against torch.compile, and attention. Then the tests marked gpu, by file, on several
processes where pytest-xdist is there, since most of their time is compiling kernels; then the other
suites of benchmarks. Each step is a process of its own: a kernel that breaks the GPU's context
costs one step, and a hang ends with its step's time. A suite writes its results case by case: those
of a step that is ended are kept.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.case import RESULTS

HEADLINE = "encoder"
SUITES = (HEADLINE, "varlen_attention", "fused_ops", "rope_2d", "pixel_shuffle_linear", "training")
# All that have tests marked gpu.
TESTS = (
    "tests/encoder/test_vision_transformer_gpu.py",
    "tests/encoder/test_encoder_gpu.py",
    "tests/kernels/test_varlen_attention_gpu.py",
    "tests/encoder/test_fused_ops.py",
    "tests/encoder/test_cuda_graphs.py",
    "tests/encoder/test_graph_capacities.py",
    "tests/vlm/test_vision_language_model_gpu.py",
    "tests/kernels/test_rope_and_pixel_shuffle_gpu.py",
    "tests/kernels/test_residual_layer_norm.py",
    "tests/kernels/test_swiglu.py",
    "tests/kernels/test_normalize_patchify.py",
    "tests/kernels/test_sanitize.py",
    "tests/verification/test_verify.py",
    "tests/training/test_run.py",
    "tests/images/test_processor.py",
    "tests/benchmarks/test_tune.py",
)
# Of the time, at most.
SHARES = {"gate": 30 / 570, HEADLINE: 0.4, "varlen_attention": 0.15, "tests": 0.5}
TEST_TIMEOUT_S = 150
OVERRUN_S = 45.0  # of a suite's time goes to what its budget does not count
LEAST_S = 20.0  # with less left, a step is not begun


@dataclass(frozen=True)
class Step:
    """A command, and the share of the whole time that it may take at most."""

    name: str
    command: tuple[str, ...]
    share: float = 1.0
    budget: bool = False  # takes --budget, the seconds that are left


def main() -> None:
    """Run the tests and the suites; exit with 1 unless all of them did well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.5, help="For all steps together.")
    parser.add_argument(
        "--only", nargs="+", choices=("gate", "tests", *SUITES), help="Of the steps."
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="Directory of JSON files.")
    parser.add_argument("--commit", help="Commit to name in them, where there is no git.")
    args = parser.parse_args()
    steps = [step for step in steps_of(args.results, args.commit) if _wanted(step, args.only)]
    ends = run_steps(steps, 60 * args.minutes)
    width = max(map(len, ends))
    print("\n" + "\n".join(f"{name:{width}}  {end}" for name, end in ends.items()))
    sys.exit(any(end != "done" for end in ends.values()))


def steps_of(results: Path, commit: str | None) -> list[Step]:
    """The gate, the encoder, attention, the tests, then the other suites."""
    pytest = (sys.executable, "-m", "pytest")
    options = []
    if find_spec("xdist"):
        options += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    if find_spec("pytest_timeout"):  # its signals do not reach a thread that waits for the device
        options += ["--timeout", str(TEST_TIMEOUT_S), "--timeout-method", "thread"]
    tests = Step("tests", (*pytest, *TESTS, "-m", "gpu", *options), SHARES["tests"])
    gate = (sys.executable, "-m", "hrvlm", "verify", "--device=cuda", "--dtype=bfloat16")
    ops = ("--backend=triton", "--op=varlen_attention", "--op=encoder")
    # With "=", or pytest takes a folder that exists for one of tests, and its settings from above.
    given = [f"--results={results}", *([f"--commit={commit}"] if commit else [])]
    suites = [
        Step(
            suite,
            (*pytest, f"benchmarks/bench_{suite}.py", *given),
            SHARES.get(suite, 1.0),
            budget=suite == HEADLINE,
        )
        for suite in SUITES
    ]
    return [Step("gate", (*gate, *ops), SHARES["gate"]), *suites[:2], tests, *suites[2:]]


def run_steps(steps: Sequence[Step], seconds: float) -> dict[str, str]:
    """Run commands one after the other.

    Args:
        steps: What to run. One that fails or takes too long does not keep back the others.
        seconds: For all of them.

    Returns:
        How each ended: "done", "failed (exit status N)", "ended after N s" or "no time left".
    """
    deadline, ends = time.monotonic() + seconds, {}
    for step in steps:
        left = deadline - time.monotonic()
        limit = min(left, step.share * seconds)
        if left < min(LEAST_S, seconds / 10):
            ends[step.name] = "no time left"
            continue
        print(f"--- {step.name}, at most {limit:.0f} s", flush=True)
        # What is begun within its budget is finished after it: imports, ceilings, a last case.
        given = (f"--budget={max(limit - OVERRUN_S, 0):.0f}",) if step.budget else ()
        ends[step.name] = _run((*step.command, *given), limit)
    return ends


def _run(command: Sequence[str], seconds: float) -> str:
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too
        process.wait()
        return f"ended after {seconds:.0f} s"
    return "done" if status == 0 else f"failed (exit status {status})"


def _wanted(step: Step, only: Sequence[str] | None) -> bool:
    return only is None or step.name in only


if __name__ == "__main__":
    main()
