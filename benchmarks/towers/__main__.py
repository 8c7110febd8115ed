"""Towers of transformers, accelerated: how equal to stock, and what the host no longer waits for.

    PYTHONPATH=kernels:. python -m benchmarks.towers

writes benchmarks/results/towers.json and the README's table, between the lines
``<!-- towers:start -->`` and ``<!-- towers:end -->``. With names it measures these towers alone,
those that another release of transformers has: ``python -m benchmarks.towers radio``.

The errors are those of the Triton kernels in the interpreter, in float32 (:mod:`.compared`); the
counts come from a pretended GPU (:mod:`.counted`). The only times are ratios on a CPU
(:mod:`.timed`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.case import RESULTS
from benchmarks.towers.tiny import ALL, GRIDS, MIXED, TOWERS
from hrvlm.files import write_text

FILE = RESULTS / "towers.json"
README = Path(__file__).parents[2] / "README.md"
START, END = "<!-- towers:start -->\n", "<!-- towers:end -->"


def measured() -> dict[str, Any]:
    """All that the table says; rows of towers that this release does not have are kept."""
    older = json.loads(FILE.read_text(encoding="utf-8"))["towers"]
    towers, layers = _rows()
    ratios = _in_own_process("timed", TRITON_INTERPRET="0", OMP_NUM_THREADS="1")
    return {
        "grids": GRIDS,
        "towers": {name: row for name, row in older.items() if name not in TOWERS} | towers,
        "mixed": MIXED,
        "layers": layers,
        "cpu": ratios,
    }


def _rows(*names: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of the towers of these names, or of all; and those of layers, if of all."""
    compared = _in_own_process("compared", *names, TRITON_INTERPRET="1")
    counted = _in_own_process("counted", *names, TRITON_INTERPRET="0")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    rows = {name: compared[name] | counted["towers"][name] | versions for name in compared}
    return rows, counted.get("layers", {})


def _in_own_process(module: str, *names: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.towers.{module}", *names]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def table(result: dict[str, Any]) -> str:
    """The README's table."""
    lines = [
        "| tower | output | gradients | host syncs in a forward, stock | accelerated | launches |",
        "|---|---|---|---|---|---|",
    ]
    for name, tiny in ALL.items():
        if name not in result["towers"]:
            continue
        row = result["towers"][name]
        syncs, on_host = f"{row['syncs_after']}", row["syncs_sizes_on_host"]
        syncs += "" if on_host is None else f", {on_host} with sizes on the host"
        launches = f"{row['launches_before']} -> {row['launches_after']}"
        lines.append(
            f"| {tiny.title}, {row['layers']} layers | {row['output']:.1e} | "
            f"{row['gradients']:.1e} | {row['syncs_before']} | {syncs} | {launches} |"
        )
    return "\n".join([*lines, *_layers(result)]) + "\n"


def _layers(result: dict[str, Any]) -> list[str]:
    patches = [frames * height * width for frames, height, width in result["mixed"]]
    lines = [
        "",
        f"One more layer, for {len(patches)} images of {min(patches)} to {max(patches)} patches, "
        "bfloat16, at the width of the 7B and 8B models:",
        "",
        "| layer | host syncs | launches | passes over the tokens beside matrix products |",
        "|---|---|---|---|",
    ]
    for title, row in result["layers"].items():
        stock, mine = row["stock"], row["accelerated"]
        cells = [f"{stock[key]} -> {mine[key]}" for key in ("syncs", "launches", "passes")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    times = [f"{ALL[name].title} {ratio:.2f}" for name, ratio in result["cpu"].items()]
    return [
        *lines,
        "",
        "On a CPU, float32, these images, four narrow layers, a stock forward takes so many times "
        f"as long, taking turns in one process: {', '.join(times)}.",
    ]


def main() -> None:
    """Measure, and write the file and the table."""
    if names := sys.argv[1:]:
        result = json.loads(FILE.read_text(encoding="utf-8"))
        result["towers"] |= _rows(*names)[0]
    else:
        result = measured()
    write_text(FILE, json.dumps(result, indent=1) + "\n")
    before, _, rest = README.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    write_text(README, before + START + table(result) + END + after)
    print(table(result), end="")


if __name__ == "__main__":
    main()
