"""What importing pulls in, that optional packages may be missing, and who may import whom."""

import ast
import json
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.fresh_processes import FIRST, run, run_each

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "hrvlm_kernels"
KERNEL_MODULES = set((KERNELS / "triton_kernels").glob("*.py"))  # all that may need Triton
OTHER_MODULES = set(KERNELS.rglob("*.py")) - KERNEL_MODULES
OPTIONAL = ("triton", "flash_attn", "torchvision")

# Folders and top modules, lowest first: each imports from lines above its own only.
RANKS = (
    "files machine charts",
    "images drawn_text",
    "checkpoints",
    "encoder",
    "towers",
    "vlm data",
    "verification",
    "inference export auto_classes",
    "training measuring",
    "explore reader",
    "embed",
    "commands",
    "cli",
    "__main__",
)
KERNEL_RANKS = (
    "backends merge_orders",
    "packed_tables",
    "packed_grids attention_problem",
    "traced_grids replay",
    "reference",
    "cpu_rope",
    "cpu_products",
    "cpu_attention",
    "triton_kernels",
    "ops",
    "flash_attn_interface qkv_attention",
)

# Hidden packages look as if they were not installed: nothing finds them, and they have no metadata.
HIDE = """
import sys
from importlib.machinery import PathFinder

class PathFinderWithout(PathFinder):
    hidden = set({hidden!r})

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in cls.hidden:
            return None
        return super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, context):
        if context.name is not None and context.name.replace("-", "_") in cls.hidden:
            return iter(())
        return super().find_distributions(context)

sys.meta_path[:] = [PathFinderWithout if f is PathFinder else f for f in sys.meta_path]

from importlib.util import find_spec
assert not any(map(find_spec, PathFinderWithout.hidden))
assert PathFinderWithout.hidden.isdisjoint(sys.modules)
"""

LOADED = """
import json, sys
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""

NO_DEVICE = """
import torch
assert not torch.cuda.is_initialized(), "importing set up CUDA"
"""

EVERYTHING = """
import importlib
import hrvlm, hrvlm_kernels

for name in {modules!r}:
    importlib.import_module(name)
for package in (hrvlm, hrvlm_kernels):
    for name in package.__all__:
        getattr(package, name)
"""

OPS = """
import torch
from hrvlm_kernels import PackedGrids, pixel_shuffle_linear, rope_2d, varlen_attention

packed = PackedGrids.from_grids([(2, 4), (4, 2)], num_prefix_tokens=1)
q, k, v = torch.randn(packed.total_tokens, 3, 2, 16).unbind(1)
q, k = rope_2d(q, k, packed.coords, torch.rand(4))
out = varlen_attention(q, k, v, packed)
tokens = pixel_shuffle_linear(out.flatten(1), packed, 2, torch.randn(5, 4 * 32))
assert tokens.shape == (4, 5) and tokens.isfinite().all()
"""

CHOOSING_TRITON = """
import torch
from hrvlm_kernels import PackedGrids, varlen_attention
q = torch.randn(3, 1, 16)
try:
    varlen_attention(q, q, q, PackedGrids.from_lengths([3]), backend="triton")
except RuntimeError as error:
    assert "Triton is not installed" in str(error), error
else:
    raise SystemExit("backend='triton' ran without Triton")
"""


def modules():
    """Dotted names of all modules of both packages that must do without Triton."""
    names = []
    for package in (ROOT / "hrvlm", KERNELS):
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            if path.stem != "__main__" and path not in KERNEL_MODULES:
                names.append(".".join(parts).removesuffix(".__init__"))
    return names


def everything():
    return EVERYTHING.format(modules=modules())


def loaded(steps, *flags):
    """The top-level modules in memory after each of the steps, run in one interpreter."""
    lines = run("".join(step + LOADED for step in steps), *flags).splitlines()
    assert len(lines) == len(steps), f"importing printed something: {lines}"
    return [set(json.loads(line)) for line in lines]


def test_importing_loads_torch_alone_without_a_warning():
    steps = ["import torch", "import hrvlm_kernels", "import hrvlm", NO_DEVICE]
    before, kernels, both, _ = loaded(steps, "-W", "error")
    assert kernels - before - sys.stdlib_module_names == {"hrvlm_kernels"}
    assert both - kernels - sys.stdlib_module_names == {"hrvlm"}
    assert both.isdisjoint(OPTIONAL)


def test_works_where_optional_packages_are_missing():
    """And names of transformers are found after importing us."""
    names = "import hrvlm\nfrom transformers import DINOv3ViTConfig, DINOv3ViTBackbone, AutoConfig"
    scripts = {(): names}
    for hidden in (*((name,) for name in OPTIONAL), OPTIONAL):
        scripts[hidden] = HIDE.format(hidden=hidden) + everything() + OPS + NO_DEVICE
        if "triton" in hidden:
            scripts[hidden] += CHOOSING_TRITON
    for hidden, (code, output) in zip(scripts, run_each([*scripts.values()], FIRST), strict=True):
        assert code == 0, f"without {hidden}: {output}"


def imports(path):
    """(level, module, names, inside a function) of every import statement of a file."""
    tree = ast.parse(path.read_text())
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside |= {id(child) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name, [], id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [a.name for a in node.names], id(node) in inside


def arrows(root):
    """Module of a package to the modules of it that it imports, wherever in the file.

    What is imported for a type checker alone does not count.
    """
    files = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = path
    found = {}
    for name, path in files.items():
        package = name.split(".")[: None if path.name == "__init__.py" else -1]
        targets, tree = set(), ast.parse(path.read_text())
        blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If)]
        typing = {
            id(child)
            for block in blocks
            if ast.unparse(block.test) == "TYPE_CHECKING"
            for child in ast.walk(block)
        }
        for node in ast.walk(tree):
            if id(node) in typing or not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
                continue
            base = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{home}.{alias.name}"
                targets.add(whole if whole in files else home)
        found[name] = (targets & files.keys()) - {root.name}  # from the package: __version__
    return found


PACKAGES = {ROOT / "hrvlm": RANKS, KERNELS: KERNEL_RANKS}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_imports_go_down_only(package):
    rank = {room: i for i, line in enumerate(PACKAGES[package]) for room in line.split()}
    for module, targets in arrows(package).items():
        for target in targets if module != package.name else ():
            room, other = (name.split(".")[1] for name in (module, target))
            assert room == other or rank[room] > rank[other], f"{module} imports {target}"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_no_modules_import_each_other_in_a_circle(package):
    TopologicalSorter(arrows(package)).prepare()


def each(paths):
    return pytest.mark.parametrize("path", sorted(paths), ids=lambda p: p.stem)


def test_no_package_of_ours_is_called_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@each(KERNEL_MODULES | OTHER_MODULES)
def test_kernel_files_import_torch_triton_and_each_other_only(path):
    allowed = {"torch", "triton", "flash_attn"} | sys.stdlib_module_names
    depth = len(path.relative_to(KERNELS).parts)
    for level, module, names, _ in imports(path):
        if level == 0:
            assert module.partition(".")[0] in allowed, f"import {module}"
        else:
            assert level <= depth, f"from {'.' * level}{module} import {names} leaves the package"


@each(OTHER_MODULES | set((ROOT / "hrvlm").rglob("*.py")))
def test_optional_packages_and_kernels_are_imported_only_when_used(path):
    for level, module, names, in_function in imports(path):
        if level == 0:
            assert in_function or module.partition(".")[0] not in OPTIONAL
        else:
            assert in_function or "triton_kernels" not in [*module.split("."), *names]


@each(KERNEL_MODULES)
def test_kernels_do_not_use_the_reference(path):
    for level, module, names, _ in imports(path):
        if level:
            assert "reference" not in [module, *names]


# What each folder at the top may not import: rooms above it, and what is for development alone.
FORBIDDEN = {
    "hrvlm": {"benchmarks", "recipes", "tests", "kernels", "ptx_machine", "pretended_gpu"},
    "kernels/ptx_machine": {"hrvlm", "hrvlm_kernels", "benchmarks", "recipes", "tests"},
    "kernels/pretended_gpu": {"benchmarks", "recipes", "tests", "ptx_machine"},
    "benchmarks": {"recipes", "tests"},
    "recipes": {"tests"},
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_folders_at_the_top_import_none_above_them(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for level, module, _, _ in imports(path):
            top = module.partition(".")[0]
            assert level or top not in FORBIDDEN[folder], f"{path.relative_to(ROOT)}: {module}"


@each((ROOT / "kernels" / "ptx_machine").rglob("*.py"))
def test_the_ptx_machine_knows_none_of_what_it_runs(path):
    allowed = {"numpy", "torch", "triton", "ptx_machine"} | sys.stdlib_module_names
    for level, module, _, _ in imports(path):
        assert level or module.partition(".")[0] in allowed, f"import {module}"


def test_every_op_has_its_kernels_and_its_test_under_one_name():
    """Kernels of <op> are in triton_kernels/<op>.py, and in <op>_<which>.py if they are several."""
    ops = {path.stem for path in (KERNELS / "ops").glob("*.py")} - {"__init__", "torch_op"}
    with_kernels = {path.stem for path in KERNEL_MODULES if "\ndef forward(" in path.read_text()}
    assert ops and ops <= {path.stem for path in KERNEL_MODULES}
    assert all(any(name.startswith(op) for op in ops) for name in with_kernels)
    for op in ops:
        assert (ROOT / "tests" / "kernels" / f"test_{op}.py").exists(), op


@each((KERNELS / "triton_kernels").glob("varlen_attention*.py"))
def test_kernels_of_attention_share_tiles_and_none_of_each_other(path):
    """The forward's launcher alone starts the kernel for short images, too."""
    others = {module for level, module, _, _ in imports(path) if module.startswith("varlen_att")}
    assert others <= ({"varlen_attention_short"} if path.stem == "varlen_attention" else set())


@each(KERNEL_MODULES)
def test_every_kernel_is_named_after_its_op(path):
    """A profile shows the names of kernels alone."""
    ops = {path.stem for path in (KERNELS / "ops").glob("*.py")}
    for started in re.findall(r"\b(\w+)\[\(", path.read_text()):
        assert any(started.startswith(op) for op in ops), started
