"""Turn the result files into docs/benchmarks.md, its plots, and the README's table.

    python -m benchmarks.reporting
    python -m benchmarks.reporting --add DIR    # first take over the files of a run made elsewhere

Of each suite and device the newest file is taken, and cases that it lacks from those before, whose
commits are then named. A file that is added to one of the same name (suite, device, versions,
commit) replaces the cases that both have and keeps the others, so that a long suite can be run in
parts (``pytest -k``). The README's table goes between the lines
``<!-- benchmarks:start -->`` and ``<!-- benchmarks:end -->``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.case import RESULTS
from benchmarks.reporting import plots, scaling, tables
from benchmarks.suite import SCHEMA
from hrvlm.files import write_text

ROOT = Path(__file__).parents[2]
GPU_SUITES = {
    "encoder": "The encoder",
    "varlen_attention": "varlen_attention",
    "rope_2d": "rope_2d",
    "pixel_shuffle_linear": "pixel_shuffle_linear",
    "fused_ops": "Fused ops",
    "training": "A training step",
}
CPU_SUITES = {
    "cpu_encoder": "The encoder",
    "processing": "Image files to patches",
    "training": "A training step",
}

INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks.reporting` from the files in `benchmarks/results/`; nothing here is
typed by hand.

- A number of an op or of the encoder stands here only if it passed its check against float64
  (`hrvlm verify`) on that device, in the same process, and its result agreed with the peers' on the
  inputs that were timed. Images are compared with the peers' only; a training step is behind the
  encoder's check, and its loss, which padding changes, is not compared.
- Rivals take turns in one process, on random data. Times are medians, with the 20th and 80th
  percentile in brackets; ratios are medians over the rounds. On a GPU, device events give the time
  and the L2 cache is flushed before each run.
- FLOPs are useful ones: no padding, nothing computed twice. Percentages are of the ceilings that
  the same run measured: a large copy, and a large matrix product.
- Ratios above 1 say how many times longer the other took.

```bash
# needs a GPU for all but the suites cpu_encoder, processing and training
python -m pytest benchmarks           # about six minutes: what there is no time for is left out
python -m pytest benchmarks --full    # all models, sizes and peers, max-autotune: an hour or more
python -m benchmarks.reporting           # this page, its plots and the README's table
hrvlm bench                           # a short comparison on the machine at hand
```

The *mixed draw* is 64 images with longer sides of 224 to 1024 px and aspect ratios from 1:4 to 4:1
(`benchmarks/case.py`): 63 669 tokens, of which the longest image has 3 909, so a batch
padded to it would be 25 % full."""


ON_A_CPU = """Only the ratios are meant: a CPU is shared with other programs, and its speed changes
while a suite runs. Rivals that take turns share that fate; where the brackets of two overlap, their
order means little."""


def load(directory: Path) -> list[dict[str, Any]]:
    """The newest result of each suite and device, in the order of their names.

    A case that is in older ones alone is among them, with its "commit".

    Raises:
        ValueError: a file is of another version of the format.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in result_files(directory)]
    for path, result in zip(result_files(directory), found, strict=True):
        if result.get("schema") != SCHEMA:
            raise ValueError(f"{path}: schema {result.get('schema')!r}, expected {SCHEMA}")
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for result in sorted(found, key=lambda result: result["machine"]["date"]):
        if not result["settings"]["small"]:
            key = result["suite"], result["machine"]["device"]
            newest[key] = merged(_with_commits(newest[key]), result) if key in newest else result
    return [newest[key] for key in sorted(newest)]


def _with_commits(result: dict[str, Any]) -> dict[str, Any]:
    commit = result["machine"]["commit"]
    return result | {"cases": [{"commit": commit} | case for case in result["cases"]]}


def add(source: Path, directory: Path) -> None:
    """Take over the result files in `source`, merging those that `directory` has.

    Raises:
        ValueError: there are none.
    """
    paths = result_files(source)
    if not paths:
        raise ValueError(f"{source}: no result files")
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        known = directory / path.name
        if known.exists():
            result = merged(json.loads(known.read_text(encoding="utf-8")), result)
        write_text(known, json.dumps(result, indent=1) + "\n")


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` with the cases of `old` that it lacks or left out."""
    ran = {case["name"]: case for case in new["cases"] if case["status"] != "left out"}
    cases = [ran.pop(case["name"], case) for case in old["cases"]] + list(ran.values())
    seen = {case["name"] for case in cases}
    cases += [case for case in new["cases"] if case["name"] not in seen]
    gates = {(gate["op"], gate["dtype"]): gate for gate in (*old["gates"], *new["gates"])}
    return new | {"cases": cases, "gates": list(gates.values())}


def result_files(directory: Path) -> list[Path]:
    """The files of all suites in a directory."""
    suites = GPU_SUITES | CPU_SUITES
    return sorted(path for suite in suites for path in directory.glob(f"{suite}-*.json"))


def page(results: Sequence[dict[str, Any]], charts: dict[str, str]) -> str:
    """The Markdown of docs/benchmarks.md."""
    parts = [INTRODUCTION, "## On a GPU"]
    for suite, title in GPU_SUITES.items():
        missing = [tables.compared(suite), f"**{tables.NOT_YET.replace('not', 'Not', 1)}.**"]
        parts += [f"### {title}", *(_sections(results, suite, "cuda", charts) or missing)]
    parts += ["## Scaling", *_scaling(results), "## On a CPU", ON_A_CPU]
    for suite, title in CPU_SUITES.items():
        missing = [tables.compared(suite), "Not yet measured."]
        parts += [f"### {title}", *(_sections(results, suite, "cpu", charts) or missing)]
    return "\n\n".join(parts) + "\n"


def _sections(
    results: Sequence[dict[str, Any]], suite: str, device: str, charts: dict[str, str]
) -> list[str]:
    found = [r for r in results if r["suite"] == suite and r["machine"]["type"] == device]
    return [part for result in found for part in tables.suite_section(result, charts)]


def _scaling(results: Sequence[dict[str, Any]]) -> list[str]:
    parts = [
        "From 224 to 1024 px an image has 20.9 times the patches. The matrix products grow with "
        "them, attention with their square. GFLOPs of a forward of one image, and the share of "
        "attention in brackets:",
        "\n".join(scaling.flops_table()),
        tables.picture("flops", "FLOPs of a ViT-L against the size of the image"),
    ]
    measured = tables.measured_scaling(results)
    parts += measured or [f"Times and memory against size: {tables.NOT_YET}."]
    return parts


def readme_table(results: Sequence[dict[str, Any]]) -> str:
    """The table between the README's markers."""
    rows = tables.headlines(results)
    lines = ["| hrvlm against | where | it takes so many times as long |", "|---|---|---|"]
    lines += [f"| {what} | {where} | {ratio} |" for what, where, ratio in rows]
    link = "[docs/benchmarks.md](docs/benchmarks.md)"
    return "\n".join(
        [*lines, "", f"All numbers, how and at which commit they were taken, and plots: {link}."]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page, the plots and, where it has the markers, the README's table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reporting", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--add", type=Path, metavar="DIR", help="take over its result files first")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args(arguments)
    if args.add is not None:
        add(args.add, args.results)
    results = load(args.results)
    charts = plots.all_charts(results)
    for name, chart in charts.items():
        write_text(args.docs / "plots" / f"{name}.svg", chart)
    for stale in (args.docs / "plots").glob("*.svg"):
        if stale.stem not in charts:
            stale.unlink()
    write_text(args.docs / "benchmarks.md", page(results, charts))
    try:
        write_text(
            args.readme, tables.fill(args.readme.read_text(encoding="utf-8"), readme_table(results))
        )
    except ValueError as error:
        print(f"{args.readme}: not filled in: {error}", file=sys.stderr)
    print(f"{len(results)} result files, {len(charts)} plots: {args.docs / 'benchmarks.md'}")


if __name__ == "__main__":
    main()
