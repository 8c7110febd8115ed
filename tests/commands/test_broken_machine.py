"""The commands where much is missing: home, caches, compiler, network, and with a broken Triton."""

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
CODE = """
import json, sys
from tests.commands.helpers import run

image, out = sys.argv[1:]
found = {}
for name, arguments in {
    "encode": ["encode", image, "--max-img-size", "64", "--out", out],
    "doctor": ["doctor", "--json"],
    "triton": ["encode", image, "--max-img-size", "64", "--backend", "triton"],
    "hub": ["encode", image, "--model", "nobody/nothing"],
    "unwritable": ["encode", image, "--max-img-size", "64", "--out", "/dev/null/out"],
}.items():
    result = run(*arguments)
    found[name] = [result.exit_code, result.stdout, result.stderr]
print("FOUND" + json.dumps(found))
"""


def test_what_runs_runs_and_what_can_not_says_why(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    (tmp_path / "broken" / "triton").mkdir(parents=True)
    (tmp_path / "broken" / "triton" / "__init__.py").write_text(
        "raise ImportError('libtriton.so: undefined symbol')"
    )
    nowhere = "/dev/null/home"
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path / "broken", ROOT / "kernels", ROOT))),
        "HOME": nowhere,
        "XDG_CACHE_HOME": nowhere,
        "HF_HOME": nowhere,
        "TRITON_CACHE_DIR": nowhere,
        "PATH": "/dev/null",
        "HF_HUB_OFFLINE": "1",
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "a.png"), str(tmp_path / "out")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "FOUND" in done.stdout, done.stderr
    found = json.loads(done.stdout.partition("FOUND")[2])
    code, _, errors = found["encode"]
    assert code == 0, errors
    assert len(list((tmp_path / "out").iterdir())) == 2
    code, document, _ = found["doctor"]
    assert code == 1
    assert any("triton" in p and "undefined symbol" in p for p in json.loads(document)["problems"])
    code, _, errors = found["triton"]
    assert code and "Triton can't be imported" in errors and "hrvlm doctor" in errors
    for name in ("hub", "unwritable"):
        code, _, errors = found[name]
        assert code == 2 and errors.splitlines()[-1].startswith("error: "), errors
