"""Everything that needs a GPU, in a bounded time: what ``make gpu`` runs.

    python -m benchmarks.gpu_run --minutes 9.5 --results benchmarks/results

What counts most comes first: half a minute of `hrvlm verify`, the whole encoder at 1024 px, mixed,
768 and 224 px against torch.compile, and attention. Then the tests marked gpu, by file, on several
processes where pytest-xdist is there, since most of their time is compiling kernels; then the other
suites of benchmarks. Each step is a process of its own: a kernel that breaks the GPU's context
costs one step, and a hang ends with its step's time. :data:`SECONDS` has the time of each.

All is stored as it is made: a suite writes its results case by case, what a step prints goes into a
file beside them line by line (a line for each test), and how each ended into ``gpu_run.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from benchmarks.case import RESULTS
from benchmarks.suite import commit_here, now
from hrvlm.files import write_text

# The steps in their order, and the seconds of each: nine and a half minutes together. What a step
# leaves of its time goes to those behind it. About 20 s of a suite's go to imports, to what the
# device reaches at best and to the gates of its ops, and a compiled peer takes up to a minute.
SECONDS = {
    "gate": 30,
    "encoder": 215,
    "varlen_attention": 80,
    "tests": 120,
    "fused_ops": 40,
    "rope_2d": 25,
    "pixel_shuffle_linear": 25,
    "training": 35,
}
SUITES = tuple(name for name in SECONDS if name not in ("gate", "tests"))
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
TEST_TIMEOUT_S = 100
OVERRUN_S = 45.0  # what a suite begins within its budget may take after it


@dataclass(frozen=True)
class Step:
    """A command, and the seconds that it may take where those before it took all of theirs."""

    name: str
    command: tuple[str, ...]
    seconds: float
    budget: bool = False  # takes --budget, the seconds after which it begins nothing


class Ends:
    """How steps ended, in a file.

    Args:
        path: Of the file. What it has of other steps at the same commit is kept.
        commit: Of what ran.
    """

    def __init__(self, path: Path, commit: str):
        self.path, self.document = path, {"commit": commit, "steps": {}}
        before = json.loads(path.read_text()) if path.exists() else {}
        if before.get("commit") == commit:
            self.document = before

    def add(self, step: str, end: str, *, limit_s: float, took_s: float) -> None:
        """Write the file with one more: "done", "failed (exit status N)" or "ended after N s"."""
        self.document["steps"][step] = {
            "end": end,
            "date": now(),
            "limit_s": round(limit_s, 1),
            "took_s": round(took_s, 1),
        }
        write_text(self.path, json.dumps(self.document, indent=1) + "\n")


def main() -> None:
    """Run the tests and the suites; exit with 1 unless all of them did well."""
    parser = argparse.ArgumentParser(description=__doc__)
    minutes = sum(SECONDS.values()) / 60
    parser.add_argument("--minutes", type=float, default=minutes, help="For all steps together.")
    parser.add_argument("--only", nargs="+", choices=tuple(SECONDS), help="Of the steps.")
    parser.add_argument("--without", nargs="+", choices=tuple(SECONDS), help="Of the steps.")
    parser.add_argument("--small", action="store_true", help="Tiny inputs, to see that they run.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Directory of JSON files.")
    parser.add_argument("--commit", help="Commit to name in them, where there is no git.")
    args = parser.parse_args()
    steps = steps_of(args.results, args.commit, small=args.small)
    names = set(args.only or SECONDS) - set(args.without or ())
    wanted = [step for step in steps if step.name in names]
    kept = Ends(args.results / "gpu_run.json", args.commit or commit_here())
    ends = run_steps(wanted, 60 * args.minutes, kept)
    width = max(map(len, ends))
    print("\n" + "\n".join(f"{name:{width}}  {end}" for name, end in ends.items()))
    sys.exit(any(end != "done" for end in ends.values()))


def steps_of(results: Path, commit: str | None, *, small: bool = False) -> list[Step]:
    """All steps, in the order of :data:`SECONDS`."""
    pytest = (sys.executable, "-m", "pytest")
    options = []
    if find_spec("xdist"):
        options += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    if find_spec("pytest_timeout"):  # its signals do not reach a thread that waits for the device
        options += ["--timeout", str(TEST_TIMEOUT_S), "--timeout-method", "thread"]
    gate = (sys.executable, "-m", "hrvlm", "verify", "--device=cuda", "--dtype=bfloat16")
    ops = ("--backend=triton", "--op=varlen_attention", "--op=encoder")
    commands = {"gate": (*gate, *ops), "tests": (*pytest, "-v", *TESTS, "-m", "gpu", *options)}
    # With "=", or pytest takes a folder that exists for one of tests, and its settings from above.
    given = [f"--results={results}", *([f"--commit={commit}"] if commit else [])]
    given += ["--small", "--seconds=0.01"] if small else []
    for suite in SUITES:
        commands[suite] = (*pytest, f"benchmarks/bench_{suite}.py", *given)
    return [
        Step(name, commands[name], seconds, budget=name in SUITES)
        for name, seconds in SECONDS.items()
    ]


def run_steps(steps: Sequence[Step], seconds: float, kept: Ends) -> dict[str, str]:
    """Run commands one after the other.

    Args:
        steps: What to run. One that fails or takes too long does not keep back the others.
        seconds: For all of them, each in the proportion of its own.
        kept: Gets how they ended; what they print goes into files beside it.

    Returns:
        How each ended, as in the file.
    """
    folder, ends = kept.path.parent, {}
    folder.mkdir(parents=True, exist_ok=True)
    scale, deadline = seconds / sum(step.seconds for step in steps), time.monotonic()
    for step in steps:
        begun = time.monotonic()
        deadline += scale * step.seconds
        limit = deadline - begun
        print(f"--- {step.name}, at most {limit:.0f} s", flush=True)
        given = (f"--budget={limit - min(OVERRUN_S, limit / 2):.0f}",) if step.budget else ()
        log = folder / f"{kept.path.stem}-{step.name}.log"
        ends[step.name] = end = _run((*step.command, *given), limit, log)
        kept.add(step.name, end, limit_s=limit, took_s=time.monotonic() - begun)
    return ends


def _run(command: Sequence[str], seconds: float, log: Path) -> str:
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    printing = threading.Thread(target=_print_and_keep, args=(process.stdout, log), daemon=True)
    printing.start()
    try:
        status = process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return f"ended after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()
        printing.join(5)  # a process that left the group may hold the pipe for ever
    return "done" if status == 0 else f"failed (exit status {status})"


def _print_and_keep(output: BinaryIO, log: Path) -> None:
    with log.open("wb", buffering=0) as kept:
        while chunk := output.read1():
            kept.write(chunk)
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
