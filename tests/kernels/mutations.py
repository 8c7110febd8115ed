"""Kernels with one seeded bug each, to show that the tests would notice."""

import importlib.util
import sys
from pathlib import Path

from hrvlm_kernels import triton_kernels


def plant(monkeypatch, tmp_path, name, old, new, *, users=()):
    """Replace module ``triton_kernels.<name>`` by one in which `old` reads `new`.

    `old` must occur exactly once. `users` are (module, attribute) pairs that hold the real module
    already.
    """
    source = source_of(name)
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {name}.py"
    path = tmp_path / f"{name}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"{triton_kernels.__name__}.{name}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.setattr(triton_kernels, name, module, raising=False)
    spec.loader.exec_module(module)
    for user, attribute in users:
        monkeypatch.setattr(user, attribute, module)
    return module


def source_of(name):
    """The text of a module of the kernels."""
    return (Path(triton_kernels.__file__).parent / f"{name}.py").read_text()


def caught(*checks):
    """Whether one of the checks fails by an assertion."""
    for check in checks:
        try:
            check()
        except AssertionError:
            return True
    return False
