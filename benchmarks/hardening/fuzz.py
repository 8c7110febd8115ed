"""A million inputs for what takes something from outside (`make fuzz`).

    python -m benchmarks.hardening.fuzz --cases 1000000 --out FILE   all targets, by their shares
    python -m benchmarks.hardening.fuzz --target rows --show 12345   one case again
    python -m benchmarks.hardening.fuzz --target yaml --atheris 60   guided by what code is reached

A case is made of its number and the seed alone, and one that takes more than `MEMORY` or `SECONDS`
is a find. What the targets are, and what they may do, is in
`targets.py`; the minimal inputs that cases begin with are in `corpus/`, and a find is added to them
and becomes a test.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.hardening.parts import made_by
from benchmarks.hardening.targets import TARGETS, Target, TooSlow, attempt

MILLION = sum(target.cases for target in TARGETS.values())
MOST = 5  # finds of a target that are told
MEMORY, SECONDS = 2 << 30, 10.0  # what a case may take: address space, and CPU time


def case(name: str, seed: int, number: int) -> Any:
    """The input of a case."""
    return TARGETS[name].draw(random.Random(f"{name} {seed} {number}"))


@contextmanager
def _limits() -> Iterator[None]:
    """Address space is limited, and the signal of a timer raises."""

    def stop(*_: Any) -> None:
        raise TooSlow(f"over {SECONDS} CPU seconds")

    space, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGPROF, stop)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, space[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, space)
        signal.signal(signal.SIGPROF, handler)


def _timed(target: Target, value: Any) -> str:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return attempt(target, value)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def run_cases(name: str, seed: int, numbers: range, seconds: float | None = None) -> dict[str, Any]:
    """Try the cases of a target, until the CPU seconds are over."""
    for value in TARGETS[name].seeds():  # and what it uses is imported
        attempt(TARGETS[name], value)
    with _limits():
        return _run_cases(name, seed, numbers, seconds)


def _run_cases(name: str, seed: int, numbers: range, seconds: float | None) -> dict[str, Any]:
    target, outcomes, finds = TARGETS[name], Counter[str](), []
    began, slowest, count = time.process_time(), (0.0, -1), 0
    for number in numbers:
        before = time.process_time()
        if seconds is not None and before - began > seconds:
            break
        value = case(name, seed, number)
        count += 1
        try:
            outcomes[_timed(target, value)] += 1
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # rust's panics are no Exception
            outcomes["FOUND"] += 1
            if len(finds) < MOST:
                where = traceback.extract_tb(error.__traceback__)[-1]
                finds.append(
                    {
                        "case": number,
                        "error": f"{type(error).__name__}: {error}"[:300],
                        "at": f"{Path(where.filename).name}:{where.lineno}",
                        "input": repr(value)[:500],
                    }
                )
        slowest = max(slowest, (time.process_time() - before, number))
    return {
        "cases": count,
        "outcomes": dict(outcomes.most_common()),
        "cpu_seconds": round(time.process_time() - began, 1),
        "slowest_case": {"case": slowest[1], "cpu_seconds": round(slowest[0], 3)},
        "finds": finds,
    }


def guided(name: str, seconds: int, folder: Path) -> None:
    """Atheris in place of the random source, for one target; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["hrvlm", "hrvlm_kernels"]):
        target = TARGETS[name]
        for value in target.seeds():  # imports what it uses
            attempt(target, value)

    class FromBytes(random.Random):
        def __init__(self, data: bytes):
            super().__init__(0)
            self._data = atheris.FuzzedDataProvider(data)

        def random(self) -> float:
            return float(self._data.ConsumeProbability()) % 1.0

        def getrandbits(self, k: int) -> int:
            return int(self._data.ConsumeUInt(-(-k // 8))) & ((1 << k) - 1)

    def once(data: bytes) -> None:
        attempt(target, target.draw(FromBytes(data)))

    folder.mkdir(parents=True, exist_ok=True)
    atheris.Setup(["fuzz", f"-max_total_time={seconds}", str(folder)], once)
    atheris.Fuzz()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=MILLION, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=TARGETS, action="append", help="only these")
    parser.add_argument("--seconds", type=float, help="CPU seconds of a target at most")
    parser.add_argument(
        "--out",
        type=Path,
        help="write the result as JSON, or add these targets to one of this seed",
    )
    parser.add_argument(
        "--show", type=int, metavar="CASE", help="print and try one case of a target"
    )
    parser.add_argument("--atheris", type=int, metavar="SECONDS", help="of one target")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = options.target or [*TARGETS]
    if options.show is not None:
        value = case(names[0], options.seed, options.show)
        print(repr(value))
        print(attempt(TARGETS[names[0]], value))
        return
    if options.atheris:
        guided(names[0], options.atheris, Path(".hypothesis", "atheris", names[0]))
    targets: dict[str, Any] = {}
    told: dict[str, Any] = {}
    if options.out and options.out.exists():
        before = json.loads(options.out.read_text())
        if before["seed"] != options.seed:
            parser.error(f"{options.out} is of --seed {before['seed']}")
        targets, told = before["targets"], before.get("made_by", {})
    for name in names:
        count = round(TARGETS[name].cases * options.cases / MILLION)
        targets[name] = run_cases(name, options.seed, range(count), options.seconds)
        told[name] = made_by()
        print(
            f"{name}: {json.dumps(targets[name] | {'finds': len(targets[name]['finds'])})}",
            flush=True,
        )
        for find in targets[name]["finds"]:
            print(f"  FOUND {json.dumps(find)}", flush=True)
    result = {
        "seed": options.seed,
        "cases": sum(t["cases"] for t in targets.values()),
        "found": sum(t["outcomes"].get("FOUND", 0) for t in targets.values()),
        "cpu_seconds": round(sum(t["cpu_seconds"] for t in targets.values())),
        "made_by": told,
        "targets": targets,
    }
    print(
        f"{result['cases']} cases in {result['cpu_seconds']} CPU seconds, {result['found']} finds"
    )
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if result["found"] else 0)


if __name__ == "__main__":
    main()
