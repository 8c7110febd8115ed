"""Modules that take another class in place, keep all that they hold, and give the class back."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

from torch import nn

from hrvlm_kernels.backends import makes_graph

# What methods a class of modules gets instead of its own.
Methods = Callable[[type[nn.Module]], dict[str, Callable[..., Any]]]
_made: dict[tuple[Methods, type[nn.Module]], type[nn.Module]] = {}


def swapped_class(cls: type[nn.Module], methods: Methods) -> type[nn.Module]:
    """The one class like `cls` with the methods that `methods` makes for it.

    It has the same name, since transformers writes names into configs and compares them, and
    pickles as what it is made of; its source is that of `cls`, which Python finds by the names and,
    from 3.13 on, by the line. Calling it makes a module of `cls`, whose parts are not swapped; and
    in a graph for elsewhere the methods are those of `cls`, which need not know any lengths.
    """
    if (methods, cls) not in _made:
        kept = ("__module__", "__qualname__", "__doc__", "__firstlineno__")
        names = {name: getattr(cls, name) for name in kept if hasattr(cls, name)}
        own = {"__reduce_ex__": _reduce, "hrvlm_stock": cls, "hrvlm_methods": staticmethod(methods)}
        new = {n: _unless_exported(m, getattr(cls, n)) for n, m in methods(cls).items()}
        body = {**names, **new, "__init__": stock_init(cls), **own}
        _made[methods, cls] = cast("type[nn.Module]", type(cls.__name__, (cls,), body))
    return _made[methods, cls]


def stock_init(cls: type[nn.Module]) -> Callable[..., None]:
    """The ``__init__`` of a class that is swapped in for `cls`: what it makes is of `cls`."""

    @wraps(cls.__init__)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if "hrvlm_stock" in vars(type(self)):
            self.__class__ = cls
        cls.__init__(self, *args, **kwargs)

    return init


def _unless_exported(method: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def chosen(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (stock if makes_graph() else method)(self, *args, **kwargs)

    return chosen


def stock_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a swapped module was of; None for one that is not swapped.

    If fully_shard made a class of the swapped one since: that which it makes of the stock one.
    """
    cls = type(module)
    bases = tuple(vars(base).get("hrvlm_stock", base) for base in cls.__bases__)
    if "FSDPModule" in {base.__name__ for base in bases} and bases != cls.__bases__:
        body = {n: v for n, v in vars(cls).items() if n not in ("__dict__", "__weakref__")}
        return type(cls.__name__, bases, body)
    return vars(cls).get("hrvlm_stock")


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make `module` one of `cls`, also for the device hooks of Hugging Face's accelerate."""
    module.__class__ = cls
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = cls.forward.__get__(module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a forward on the instance, other than of a device hook, hides that of the class."""
    return "forward" in vars(module) and "_old_forward" not in vars(module)


def refuse_own_forward(name: str, module: nn.Module) -> None:
    """Raise ValueError for a module with such a forward: a change of its class would not matter."""
    if has_own_forward(module):
        raise ValueError(
            f"{name}: its forward was replaced on the instance, and would go on being called"
        )


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    _, _, *state = cast("tuple[Any, ...]", object.__reduce_ex__(self, protocol))
    return _unpickled, (self.hrvlm_stock, self.hrvlm_methods), *state


def _unpickled(cls: type[nn.Module], methods: Methods) -> nn.Module:
    made = swapped_class(cls, methods)
    return made.__new__(made)
