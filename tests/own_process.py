"""Test files that need Triton without its interpreter, or a Ray cluster, in a process of their own.

Triton decides when it is imported whether kernels are compiled or interpreted, and the kernels'
tests want the interpreter where there is no GPU. And a cluster is started once, not by each worker
of the run. So a file in one of the folders that ``conftest.py`` names is one item of the run, which
starts a pytest of its own on it with ``TRITON_INTERPRET=0``; in that process, the folder's fixtures
install :mod:`ptx_machine`. The files of a folder in `TOGETHER` share a process, and with it what
importing costs. By hand, test by test::

    TRITON_INTERPRET=0 python -m pytest tests/ptx_machine/compiled/test_small_kernels.py -k matmul
"""

import os
import subprocess
import sys

import pytest

TOGETHER = ("tests/ptx_machine/compiled",)
ITEMS = pytest.StashKey[dict]()


class FailedInOwnProcess(Exception):
    """The other pytest's output."""


class OwnProcessFile(pytest.File):
    """A test file that this process does not import."""

    def collect(self):
        folder = self.path.parent
        items = self.session.stash.setdefault(ITEMS, {})
        if folder in items:
            items[folder].paths.append(str(self.path))
            return
        item = OwnProcess.from_parent(self, name="all")
        if folder.relative_to(self.config.rootpath).as_posix() in TOGETHER:
            items[folder] = item
        yield item


class OwnProcess(pytest.Item):
    """All tests of the file, and of those that share its process, in another process."""

    def __init__(self, **options):
        super().__init__(**options)
        self.paths = [str(self.path)]

    def runtest(self):
        options = ["-q", "--no-header", "--benchmark-disable", "-p", "no:cacheprovider"]
        if self.config.option.markexpr:
            options += ["-m", self.config.option.markexpr]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *self.paths],
            cwd=self.config.rootpath,
            env=environment | {"TRITON_INTERPRET": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
            pytest.skip("the marks leave no test in this file")
        if done.returncode:
            raise FailedInOwnProcess(done.stdout)
        self.add_report_section("call", "stdout", done.stdout)

    def repr_failure(self, excinfo, style=None):
        if isinstance(excinfo.value, FailedInOwnProcess):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self):
        return self.path, None, f"{self.path.name} in a process of its own"
