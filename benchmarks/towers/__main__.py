"""Towers of transformers, accelerated: how equal to stock, and what the host no longer waits for.

    PYTHONPATH=kernels:. python -m benchmarks.towers

writes benchmarks/results/towers.json and the README's table, between the lines
``<!-- towers:start -->`` and ``<!-- towers:end -->``. The errors are those of the Triton kernels in
the interpreter, in float32 (:mod:`.compared`); the counts come from a pretended GPU
(:mod:`.counted`). The only times are ratios on a CPU (:mod:`.timed`).
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
from benchmarks.towers.tiny import GRIDS, MIXED, TOWERS
from hrvlm.files import write_text

FILE = RESULTS / "towers.json"
README = Path(__file__).parents[2] / "README.md"
START, END = "<!-- towers:start -->\n", "<!-- towers:end -->"
TITLES = {
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL (windows)",
    "qwen3_vl": "Qwen3-VL",
    "glm4v": "GLM-4.xV",
    "glm_ocr": "GLM-OCR",
    "paddleocr_vl": "PaddleOCR-VL",
    "kimi_k25": "MoonViT (Kimi K2.5)",
    "pixtral": "Pixtral",
}


def measured() -> dict[str, Any]:
    """All that the table says."""
    compared = _in_own_process("compared", TRITON_INTERPRET="1")
    counted = _in_own_process("counted", TRITON_INTERPRET="0")
    ratios = _in_own_process("timed", TRITON_INTERPRET="0", OMP_NUM_THREADS="1")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    towers = {name: compared[name] | counted["towers"][name] for name in TOWERS}
    layers = counted["layers"]
    return {
        "versions": versions,
        "grids": GRIDS,
        "towers": towers,
        "mixed": MIXED,
        "layers": layers,
        "cpu": ratios,
    }


def _in_own_process(module: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.towers.{module}"]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def table(result: dict[str, Any]) -> str:
    """The README's table."""
    lines = [
        "| tower | output | gradients | host syncs in a forward, stock | accelerated | launches |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["towers"].items():
        syncs = f"{row['syncs_after']}, {row['syncs_grids_on_host']} with sizes on the host"
        launches = f"{row['launches_before']} -> {row['launches_after']}"
        lines.append(
            f"| {TITLES[name]}, {row['layers']} layers | {row['output']:.0e} | "
            f"{row['gradients']:.0e} | {row['syncs_before']} | {syncs} | {launches} |"
        )
    return "\n".join([*lines, *_layers(result)]) + "\n"


def _layers(result: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"One more layer, for {len(result['mixed'])} images of mixed sizes, bfloat16, at the width "
        "of the 7B and 8B models:",
        "",
        "| layer | host syncs | launches | passes over the tokens beside matrix products |",
        "|---|---|---|---|",
    ]
    for title, row in result["layers"].items():
        stock, mine = row["stock"], row["accelerated"]
        cells = [f"{stock[key]} -> {mine[key]}" for key in ("syncs", "launches", "passes")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    times = [f"{TITLES[name]} {ratio:.2f}" for name, ratio in result["cpu"].items()]
    return [
        *lines,
        "",
        "On a CPU, float32, these images, four narrow layers, a stock forward takes so many times "
        f"as long, taking turns in one process: {', '.join(times)}.",
    ]


def main() -> None:
    """Measure, and write the file and the table."""
    result = measured()
    write_text(FILE, json.dumps(result, indent=1) + "\n")
    before, _, rest = README.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    write_text(README, before + START + table(result) + END + after)
    print(table(result), end="")


if __name__ == "__main__":
    main()
