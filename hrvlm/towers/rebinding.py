"""A function's own code with some of the names of its module bound to other objects.

An attention of transformers finds what computes its scores by a name of its module, at each call:
``ALL_ATTENTION_FUNCTIONS``. Bound to another object, that name makes the same code, whatever its
projections, norms and rotations are, run on other kernels, and nothing of the module changes for
anybody else.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import CellType, CodeType, FunctionType
from typing import Any

LOOKED_UP = "ALL_ATTENTION_FUNCTIONS"


def rebind(function: Callable[..., Any], names: Mapping[str, Any]) -> FunctionType:
    """A copy of `function` whose code finds `names` where it looks up globals of its module.

    Decorators that keep what they wrap (``functools.wraps``) are copied around it.

    Raises:
        TypeError: `function` is not made of Python functions.
    """
    if not isinstance(function, FunctionType):
        raise TypeError(f"{function!r} is no Python function")
    closure, namespace = function.__closure__, function.__globals__
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        used = {name: namespace[name] for name in global_names(function) if name in namespace}
        # Without __name__: torch.compile looks in the module of that name, not in this dict.
        namespace = {**used, **names, "__builtins__": builtins}
    else:
        inner = rebind(wrapped, names)
        closure = tuple(
            CellType(inner) if cell.cell_contents is wrapped else cell for cell in closure or ()
        )
    copy = FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, closure
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    vars(copy).update(vars(function))
    copy.__qualname__, copy.__doc__ = function.__qualname__, function.__doc__
    copy.__module__ = function.__module__
    copy.__annotations__ = function.__annotations__
    if wrapped is not None:
        vars(copy)["__wrapped__"] = inner
    return copy


def innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` without its decorators."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


@lru_cache(maxsize=512)
def global_names(function: Callable[..., Any]) -> frozenset[str]:
    """Names that the code of `function`, decorators left out, looks up: globals and attributes."""
    code = getattr(innermost(function), "__code__", None)
    return frozenset(name for part in _parts(code) for name in part.co_names)


@lru_cache(maxsize=512)
def strings(function: Callable[..., Any]) -> frozenset[str]:
    """Strings in the code of `function`, decorators left out: among them, its calls' keywords."""
    code = getattr(innermost(function), "__code__", None)
    return frozenset(
        text for part in _parts(code) for constant in part.co_consts for text in _texts(constant)
    )


def _parts(code: CodeType | None) -> Iterator[CodeType]:
    """A code object and those of its comprehensions and inner functions."""
    if code is not None:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _parts(constant)


def _texts(constant: object) -> Iterator[str]:
    if isinstance(constant, str):
        yield constant
    elif isinstance(constant, tuple):
        for part in constant:
            yield from _texts(part)
