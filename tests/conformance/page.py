"""docs/conformance.md: how transformers' tests went, and which of them do not apply."""

import json

from tests.conformance.suite import HERE, ROOT

OUTCOMES = HERE / "outcomes"
LIST = HERE / "not_applicable.json"
PAGE = ROOT / "docs" / "conformance.md"
COUNTS = ("passed", "failed", "does not apply", "skipped")
INTRODUCTION = """\
# transformers' own tests

transformers tests its models, backbones, image processors, processors and pipelines by common test
classes. `make conformance` has pip download them with transformers' source distribution, for the
release that is installed, and runs them on the classes of this package; nothing of them is kept
here. This page is written by it.

Two parts of those tests are not in the source distribution: generation (`tests/vlm` has ours) and
exporters (`tests/export`). The pipelines' own questions are not either, and are asked by
`tests/conformance/pipelines.py`. Skipped are tests that skip themselves: those for several GPUs,
flash-attn, videos, sounds, other kinds of models.
"""
APPLY = """
## What does not apply

Each of these fails, and has to: one that passes, or that is skipped, fails the run
(`tests/conformance/not_applicable.json`).
"""


def text():
    """The whole page."""
    lines = [INTRODUCTION]
    for path in sorted(OUTCOMES.glob("*.json")):
        kept = json.loads(path.read_text())
        versions = ", ".join(f"{name} {kept[name]}" for name in ("transformers", "torch", "Python"))
        lines += [f"## {versions}, {kept['date']}\n"]
        lines += [f"| class | {' | '.join(COUNTS)} |", "|---" * (1 + len(COUNTS)) + "|"]
        for name, counts in kept["classes"].items():
            cells = " | ".join(str(counts.get(count, 0)) for count in COUNTS)
            lines.append(f"| {name} | {cells} |")
        lines += [f"\nFailed: {', '.join(kept['failed']) or 'none'}.\n"]
    listed = json.loads(LIST.read_text())
    lines += [APPLY.lstrip("\n"), "| tests | why | transformers' own |", "|---|---|---|"]
    for key, reason in listed["reasons"].items():
        tests = [t for part in ("tests", "newest") for t, k in listed[part].items() if k == key]
        names = ", ".join(f"`{name}`" for name in tests)
        lines.append(f"| {names} | {reason['why']} | {reason['elsewhere']} |")
    return "\n".join(lines) + "\n"


def write():
    """Write the page."""
    PAGE.write_text(text())
