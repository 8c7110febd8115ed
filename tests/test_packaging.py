"""What is built and installed: two packages and nothing else, and the commands that set them up."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hrvlm

ROOT = Path(__file__).parents[1]
PACKAGES = {"hrvlm": ROOT / "hrvlm", "hrvlm_kernels": ROOT / "kernels" / "hrvlm_kernels"}
DIST_INFO = f"hrvlm-{hrvlm.__version__}.dist-info"
SETUP = ("Makefile", "constraints.txt", "pyproject.toml", "setup.py")

# An editable install of this checkout must not stand in for what is being tested.
NO_EDITABLE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
"""

USE = """
import importlib.util, os
import torch
import hrvlm, hrvlm_kernels

def home(path):
    return os.path.realpath(os.path.dirname(os.path.dirname(path)))

assert home(hrvlm.__file__) == os.path.realpath({hrvlm!r}), hrvlm.__file__
assert home(hrvlm_kernels.__file__) == os.path.realpath({kernels!r}), hrvlm_kernels.__file__
packed = hrvlm_kernels.PackedGrids.from_grids([(2, 4)])
q = torch.randn(8, 1, 16)
assert hrvlm_kernels.varlen_attention(q, q, q, packed).shape == (8, 1, 16)
assert hrvlm.token_grid(640, 960, max_img_size=960).token_grid == (10, 15)
spec = importlib.util.find_spec("kernels")
# A package of that name may be installed (it is another library); our folder must not be one.
assert spec is None or spec.origin is None or home(spec.origin) != os.path.realpath({hrvlm!r}), spec
"""


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def package_files():
    """Paths inside the wheel of every file of the two packages, data included."""
    return {
        (Path(name) / path.relative_to(folder)).as_posix()
        for name, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_changelog_begins_with_the_version_that_is_built():
    first = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert first[1] == project[1] == hrvlm.__version__


@pytest.mark.slow
def test_sdist_and_wheel_hold_two_packages_and_nothing_else(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    # A copy of all that git lists, so that building leaves nothing in the checkout.
    for name in run(["git", "ls-files", "-z"], cwd=ROOT).split("\0")[:-1]:
        copy = source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy)
    run([sys.executable, "-m", "build", "--outdir", tmp_path / "dist", source])

    sdist = next((tmp_path / "dist").glob("*.tar.gz"))  # the wheel was built from it
    with tarfile.open(sdist) as archive:
        names = [member.name.split("/")[1:] for member in archive.getmembers() if member.isfile()]
    assert {parts[0] for parts in names if len(parts) > 1} == {"hrvlm", "hrvlm.egg-info", "kernels"}
    assert {parts[1] for parts in names if parts[0] == "kernels"} == {"hrvlm_kernels"}
    wheel = zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl")))
    names = {name for name in wheel.namelist() if not name.startswith(f"{DIST_INFO}/")}
    assert names == package_files()
    check_metadata(wheel)

    wheel.extractall(site)
    code = NO_EDITABLE + f"sys.path.insert(0, {str(site)!r})\n"
    code += USE.format(hrvlm=str(site), kernels=str(site))
    run([sys.executable, "-I", "-c", code], cwd=tmp_path)


def test_development_packages_are_beside_the_kernels_and_never_in_the_wheel():
    code = (
        "import setuptools, distutils.core as core\n"
        "print(*core.run_setup('setup.py', stop_after='init').packages)"
    )
    names = run([sys.executable, "-c", code], cwd=ROOT).split()
    assert {name.partition(".")[0] for name in names} == set(PACKAGES)
    beside = {path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py")}
    assert {"pretended_gpu", "ptx_machine"} <= beside - set(PACKAGES)


def check_metadata(wheel):
    def text(name):
        return wheel.read(f"{DIST_INFO}/{name}").decode()

    metadata: Message = Parser().parsestr(text("METADATA"))
    assert metadata["Version"] == hrvlm.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    extras = {"dev", "export", "flash-attn", "heif", "hub", "lora", "scale", "serve", "train"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    assert "Apache License" in text("licenses/LICENSE")
    assert text("top_level.txt").split() == ["hrvlm", "hrvlm_kernels"]
    assert "hrvlm = hrvlm.cli:app" in text("entry_points.txt")
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    core = {r.name for r in required if r.marker is None}
    assert {"torch", "torchvision", "transformers", "Pillow", "numpy", "typer", "rich"} <= core
    (triton,) = (r for r in required if r.name == "triton")
    assert triton.marker.evaluate({"sys_platform": "linux"})
    assert not triton.marker.evaluate({"sys_platform": "darwin"})
    for requirement in required:
        assert all(s.operator == ">=" for s in requirement.specifier), requirement
        if requirement.marker is None or "extra" not in str(requirement.marker):
            assert requirement.specifier, f"{requirement.name}: no lower bound"


def test_the_version_is_the_one_of_the_package():
    import hrvlm

    assert f'version = "{hrvlm.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_a_bare_checkout_needs_two_paths_and_no_installation():
    code = NO_EDITABLE + USE.format(hrvlm=str(ROOT), kernels=str(ROOT / "kernels"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["kernels", "."])}
    run([sys.executable, "-c", code], cwd=ROOT, env=environment)


def declared(section):
    """Names in a list of pyproject.toml, read without a TOML parser: Python 3.10 has none."""
    text = (ROOT / "pyproject.toml").read_text()
    body = text[text.index(f"\n{section} = [") :].split("\n]", 1)[0]
    lines = [line.strip() for line in body.splitlines()[2:]]
    return {canonicalize_name(Requirement(line.strip('",')).name) for line in lines}


def test_what_ci_installs_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name) for pin in pins}
    assert declared("dependencies") | declared("dev") == pinned
    ranges = {pin.name for pin in pins if not str(pin.specifier).startswith("==")}
    assert ranges == {"numpy"}


def planned(folder, target):
    """The commands that make would run."""
    return run(["make", "-n", f"PYTHON={sys.executable}", target], cwd=folder)


def test_make_installs_once_and_again_when_its_inputs_change(tmp_path):
    for name in SETUP:
        shutil.copy2(ROOT / name, tmp_path / name)
    first = planned(tmp_path, "test")
    assert "-m venv .venv" in first and "-e '.[dev]'" in first and "-c constraints.txt" in first
    assert first.index("install") < first.index("hrvlm encode") < first.index("-m pytest")
    assert "-e ." in planned(tmp_path, "demo")

    stamps = [word for word in first.split() if word.startswith(".venv/.installed-")]
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in {".venv/bin/pip", *(s for s in stamps if not s.endswith("*"))}:
        (tmp_path / name).touch()
    for target in ("demo", "test", "lint"):
        again = planned(tmp_path, target)
        assert "venv .venv" not in again and "pip install" not in again, again

    (tmp_path / "constraints.txt").write_text("numpy<3\n")
    assert "pip install" in planned(tmp_path, "demo")
    assert "pip install" in planned(tmp_path, "test")


def test_make_gpu_installs_nothing_and_fails_without_a_gpu():
    assert "pip" not in planned(ROOT, "gpu")
    done = subprocess.run(
        ["make", "gpu", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "no torch that sees a GPU" in done.stderr


def test_ci_runs_the_checks_and_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    first, fuzz, last = script.read_text().splitlines()[-3:]
    assert (first, last) == ("make lint", "make test") and "benchmarks.hardening.fuzz" in fuzz
