"""transformers' common tests, out of its source distribution; stand-ins for what is not in it."""

import importlib
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import types
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".conformance"
RELEASE = importlib.metadata.version("transformers")
PACKAGE = "transformers_tests"
_FILES = CACHE / RELEASE / PACKAGE


def fetch():
    """Have pip download the source distribution of the installed release, unless it was before."""
    if _FILES.is_dir():
        return
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    which = ["--no-deps", "--no-binary", "transformers", f"transformers=={RELEASE}"]
    subprocess.run([*pip, "download", *which, "--dest", str(CACHE)], check=True)
    archive = CACHE / f"transformers-{RELEASE}.tar.gz"
    unpacked = _FILES.with_name("unpacking")
    unpacked.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            folder, _, name = member.name.rpartition("/")
            if folder == f"transformers-{RELEASE}/tests" and name.endswith(".py"):
                (unpacked / name).write_bytes(tar.extractfile(member).read())
    unpacked.rename(_FILES)
    archive.unlink()


def module(name):
    """A module of the suite, as ``module("test_modeling_common")``."""
    if PACKAGE not in sys.modules:
        _prepare()
    return importlib.import_module(f"{PACKAGE}.{name}")


class ExportTesterMixin:
    """tests/exporters/test_export.py."""

    def test_exporters(self):
        self.skipTest(
            "tests/exporters is not in transformers' source distribution: see tests/export"
        )


class GenerationTesterMixin:
    """tests/generation/test_utils.py."""

    def test_generation(self):
        self.skipTest("tests/generation is not in transformers' source distribution: see tests/vlm")


def local_path(url):
    """A picture of ours instead of one of theirs; what is no picture stays where it is."""
    suffix = url.rpartition(".")[2]
    names = {"jpg": "photo.jpg", "png": "receipt.png"}
    return str(ROOT / "examples" / names[suffix]) if suffix in names else url


# Of tests/utils/test_configuration_utils.py: fields that every config takes.
COMMON_FIELDS = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}


def _prepare():
    """Make the suite importable as a package, and what it imports beside it."""
    import transformers

    from tests.conformance import pipelines

    if not _FILES.is_dir():
        raise FileNotFoundError(f"{_FILES}: run `python -m tests.conformance`, which fetches it")
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(_FILES)]
    sys.modules[PACKAGE] = package
    # Parts of it import the sources beside it, which are not those that are tested.
    transformers.utils.direct_transformers_import = lambda *_: transformers
    _stand_in("fetch_hub_objects_for_ci", url_to_local_path=local_path)
    _stand_in(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=ExportTesterMixin)
    _stand_in(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
    _stand_in(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs=COMMON_FIELDS)
    text = (_FILES / "test_pipeline_mixin.py").read_text()
    for parent in (PACKAGE, "tests"):  # releases before 5.24 import them by relative names
        for name in sorted(set(re.findall(r"pipelines\.(test_pipelines_\w+)", text))):
            _stand_in(f"{parent}.pipelines.{name}", **pipelines.TESTS.get(name, {}))


def _stand_in(name, **attributes):
    parent, _, own = name.rpartition(".")
    if parent and parent not in sys.modules:
        _stand_in(parent, __path__=[])
    made = _Empty(name)
    vars(made).update(attributes)
    sys.modules[name] = made
    if parent:
        setattr(sys.modules[parent], own, made)


class _Empty(types.ModuleType):
    """Has a class of any name that a test of pipelines might have."""

    def __getattr__(self, name):
        if name.endswith("PipelineTests"):
            return type(name, (), {})
        raise AttributeError(name)
