"""Towers of transformers, accelerated: how equal to stock, and what the host no longer waits for.

    PYTHONPATH=kernels:. python -m benchmarks.towers

writes benchmarks/results/towers.json and the README's table, between the lines
``<!-- towers:start -->`` and ``<!-- towers:end -->``. The errors are those of the Triton kernels in
the interpreter, in float32 (:mod:`.compared`); the counts come from a pretended GPU
(:mod:`.counted`). No times.
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
from benchmarks.towers.tiny import GRIDS, TOWERS
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
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    towers = {name: compared[name] | counted[name] for name in TOWERS}
    return {"versions": versions, "grids": GRIDS, "towers": towers}


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
    return "\n".join(lines) + "\n"


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
