"""The package as a Hub kernel: laid out, loaded by `kernels`, living beside the installed one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import hrvlm_kernels
from tests.kernels.helpers import interpreter_only

# `make gpu` installs nothing; without the library our folder of that name is what Python finds.
kernels = pytest.importorskip("kernels")
if not hasattr(kernels, "Metadata"):
    pytest.skip("needs the extra `hub`", allow_module_level=True)

ROOT = Path(__file__).parents[2]
BACKENDS = ("cpu", "cuda", "rocm")

ALONE = """
import sys
from pathlib import Path

import torch
import kernels

assert Path(kernels.__file__).parent != Path("kernels").resolve(), "our folder shadows the library"
module = kernels.get_local_kernel(Path({layout!r}))
packed = module.PackedGrids.from_grids([(2, 4)], num_prefix_tokens=1)
q, k, v = torch.randn(9, 3, 1, 16).unbind(1)
q, k = module.rope_2d(q, k, packed.coords, torch.rand(4))
out = module.varlen_attention(q, k, v, packed)
assert module.pixel_shuffle_linear(out.flatten(1), packed, 2, torch.randn(5, 64)).shape == (2, 5)
imported = {{name.partition(".")[0] for name in sys.modules}}
assert imported.isdisjoint({{"hrvlm", "hrvlm_kernels", "triton"}}), imported
from transformers.utils import is_kernels_available
assert is_kernels_available("0.16", "1")  # whether of the series that this release takes or not
"""


def run(*command, **options):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)


def lay_out(*arguments, source=ROOT / "kernels"):
    return run(source / "layout.py", *arguments)


@pytest.fixture(scope="session")  # torch takes the ops of a build once in the life of a process
def layout(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "hrvlm-kernels"
    done = lay_out(out)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return out


@pytest.fixture(params=[None, "cpu"], ids=["default", "cpu"])
def hub(request, layout):
    """The build for this machine's torch, and the one for the CPU."""
    return kernels.get_local_kernel(layout, backend=request.param)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def inputs(package, rng):
    packed = package.PackedGrids.from_grids([(2, 4), (4, 2)], num_prefix_tokens=1)
    q, k, v = torch.randn(packed.total_tokens, 3, 2, 16, generator=rng).unbind(1)
    weight = torch.randn(5, 4 * 32, generator=rng)
    return packed, [q, k, v, torch.rand(4, generator=rng), weight]


def outputs(package, seed, *, op_backend, attention_backend):
    """Results and gradients of a chain through all three ops."""
    rng = torch.Generator().manual_seed(seed)
    packed, (q, k, v, inv_freq, weight) = inputs(package, rng)
    leaves = [a.detach().clone().requires_grad_() for a in (q, k, v, weight)]
    q, k = package.rope_2d(*leaves[:2], packed.coords, inv_freq, backend=op_backend)
    out = package.varlen_attention(q, k, leaves[2], packed, backend=attention_backend)
    tokens = package.pixel_shuffle_linear(out.flatten(1), packed, 2, leaves[3], backend=op_backend)
    cotangent = torch.randn(tokens.shape, generator=rng)
    return [q, k, out, tokens, *torch.autograd.grad(tokens, leaves, cotangent)]


def assert_same(package, backends):
    ours = outputs(package, 7, **backends)
    installed = outputs(hrvlm_kernels, 7, **backends)
    assert all(
        a.isfinite().all() and torch.equal(a, b) for a, b in zip(ours, installed, strict=True)
    )


def test_each_build_is_the_package_and_metadata_that_kernels_reads(layout):
    package = contents(ROOT / "kernels" / "hrvlm_kernels")
    package = {path: data for path, data in package.items() if "__pycache__" not in path.parts}
    build_toml = (ROOT / "kernels" / "build.toml").read_bytes()
    assert {p.name for p in layout.iterdir()} == {"build", "build.toml", "torch-ext"}
    assert (layout / "build.toml").read_bytes() == build_toml
    assert contents(layout / "torch-ext" / "hrvlm_kernels") == package
    ids = set()
    for backend in BACKENDS:
        build = layout / "build" / f"torch-{backend}"
        metadata = kernels.Metadata.read_from_file(build / "metadata.json")
        assert metadata.name.python_name == "hrvlm_kernels" and metadata.license == "Apache-2.0"
        kind = metadata.backend.backend_type
        assert kind == type(kind).from_str(backend)
        algorithm = metadata.digest.algorithm
        metadata.digest.validate(type(metadata.digest).hash_variant(algorithm, build))
        files = {p: data for p, data in contents(build).items() if "__pycache__" not in p.parts}
        assert files.pop(Path("metadata.json")) and files == package
        ids.add(metadata.id)
    assert len(ids) == len(BACKENDS) and all(name.isidentifier() for name in ids)
    assert {p.name for p in (layout / "build").iterdir()} == {f"torch-{b}" for b in BACKENDS}


def test_the_id_changes_with_the_files_and_only_with_them(layout, tmp_path):
    def build_id(folder):
        return json.loads((folder / "build" / "torch-cpu" / "metadata.json").read_text())["id"]

    source = tmp_path / "source"
    shutil.copytree(ROOT / "kernels", source, ignore=shutil.ignore_patterns("__pycache__"))
    assert lay_out(tmp_path / "same", source=source).returncode == 0
    with (source / "hrvlm_kernels" / "reference.py").open("a") as file:
        file.write("\n")
    assert lay_out(tmp_path / "other", source=source).returncode == 0
    assert build_id(tmp_path / "same") == build_id(layout) != build_id(tmp_path / "other")


def test_the_loaded_module_is_a_copy_of_its_own(layout, hub):
    assert Path(hub.__file__).is_relative_to(layout)
    assert hub.__all__ == hrvlm_kernels.__all__
    assert hub.PackedGrids is not hrvlm_kernels.PackedGrids
    assert hub.__name__ in {loaded.metadata.id for loaded in kernels.get_loaded_kernels()}


@pytest.mark.parametrize("attention_backend", ["eager", "sdpa"])
def test_results_equal_those_of_the_installed_package(hub, attention_backend):
    assert_same(hub, {"op_backend": "eager", "attention_backend": attention_backend})


@interpreter_only
def test_kernels_of_several_copies_run_in_one_process(hub):
    class Namespaces(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.add(func.namespace)
            return func(*args, **(kwargs or {}))

    backends = {"op_backend": "triton", "attention_backend": "triton"}
    assert_same(hub, backends)
    for package in (hub, hrvlm_kernels):
        with Namespaces() as mode:
            outputs(package, 7, **backends)
        assert mode.seen - {"aten", "prim"} == {package.__name__}


def test_each_copy_registers_its_own_pytree_node(hub):
    for package in (hub, hrvlm_kernels):
        packed = package.PackedGrids.from_grids([(2, 4)], num_prefix_tokens=1)
        leaves, spec = pytree.tree_flatten(packed)
        stored = pytree.treespec_loads(pytree.treespec_dumps(spec))
        assert type(pytree.tree_unflatten(leaves, stored)) is package.PackedGrids


def test_a_build_needs_neither_of_our_packages_nor_triton(layout):
    # As a bare checkout runs, so that a folder `kernels` of ours is on the path, twice.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["kernels", "."])}
    done = run("-c", ALONE.format(layout=str(layout)), cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr


def test_nothing_is_replaced_unless_asked_and_only_layouts_are(tmp_path):
    out = tmp_path / "out"
    assert lay_out(out).returncode == 0
    (out / "build.toml").write_text("")
    before = contents(out)

    done = lay_out(out)
    assert done.returncode == 1 and f"{out} exists" in done.stderr
    assert contents(out) == before
    assert lay_out(out, "--overwrite").returncode == 0
    assert (out / "build.toml").read_bytes() == (ROOT / "kernels" / "build.toml").read_bytes()

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    done = lay_out(precious, "--overwrite")
    assert done.returncode == 1 and "is not a layout" in done.stderr
    assert [p.name for p in precious.iterdir()] == ["thesis.tex"]

    done = lay_out(tmp_path / "no" / "such")
    assert done.returncode == 1 and "is not a folder" in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"out", "precious"}


def test_a_failure_on_the_way_leaves_what_was_there(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(ROOT / "kernels", source, ignore=shutil.ignore_patterns("__pycache__"))
    assert lay_out(out, source=source).returncode == 0
    before = contents(out)
    text = (source / "build.toml").read_text()
    (source / "build.toml").write_text(text.replace('license = "Apache-2.0"\n', ""))
    assert lay_out(out, "--overwrite", source=source).returncode != 0
    assert contents(out) == before
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out"}
