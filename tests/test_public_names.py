"""The names of the package: each can be imported, and none is shadowed by a module."""

from importlib import import_module

import pytest

import hrvlm


@pytest.mark.parametrize("name", hrvlm.__all__)
def test_every_public_name_is_what_its_module_defines(name):
    value = getattr(hrvlm, name)
    assert getattr(import_module(f"hrvlm.{hrvlm._HOME[name]}"), name) is value
    assert name in dir(hrvlm)


def test_no_public_name_is_also_a_module():
    """Importing a module ``hrvlm.x`` binds ``x`` in the package, and would hide a function x."""
    modules = set(hrvlm._HOME.values())
    assert not modules & set(hrvlm.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'DINOv4Encoder'"):
        _ = hrvlm.DINOv4Encoder
