"""RoPE in the kernels, where a tower's own rotation is one that they know.

A tower makes tables of cos and sin once a forward, and each of its layers rotates q and k by them:
a dozen launches and as many passes over q and k. Where :mod:`.rotation` finds that rotation to be
the kernels', an accelerated tower's tables are positions and frequencies instead,

    rotary(x, position_ids) -> coords [T, 2], inv_freq [T, D / 4]      where cos and sin were
                                  |  handed on, rows put in other orders, as cos and sin are
    attention: q, k, v, unrotated -> varlen_attention(..., rope=(coords, inv_freq))

That the tables are only handed on is read in the source of the tower and of the modules between.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from hrvlm_kernels.backends import choose_backend

from .rebinding import innermost
from .rotation import TABLES, Rotation, as_tables, find_rotation
from .swapping import has_own_forward, set_class, stock_class, swapped_class

# What accelerated modules have beyond the stock ones: an attention its backend, it and what makes
# its tables their rotation, and the latter all attention that reads them and its own options when
# they were tried.
OPTION = "hrvlm_backend"
ROTATION = "hrvlm_rotation"
READERS = "hrvlm_readers"
TRIED = "hrvlm_tried"


def fold(
    model: nn.Module, swapped: list[nn.Module], names: Mapping[str, Any]
) -> dict[nn.Module, str]:
    """Let the kernels rotate in each tower of `model` whose rotation they know.

    Args:
        model: Changed in place.
        swapped: Its accelerated attention.
        names: What the code of accelerated attention finds in place of its module's names.

    Returns:
        For each of `swapped` that is given tables, whether the kernels rotate, and why if not.
    """
    notes: dict[nn.Module, str] = {}
    for tower in reversed(list(model.modules())):  # the innermost first
        rotaries = {name: m for name, m in tower.named_children() if _makes_tables(m)}
        inside = set(tower.modules())
        readers = [m for m in swapped if m in inside and m not in notes and _takes_tables(m)]
        if not rotaries or not readers:
            continue
        found = _found(model, tower, rotaries, readers, names)
        is_own = isinstance(found, str)
        note = f"its own RoPE since {found}" if is_own else "RoPE in the kernels"
        notes |= dict.fromkeys(readers, note)
        for rotary in rotaries.values():
            _set(rotary, tuple(readers), found)
    for reader in filter(_takes_tables, swapped):
        is_own = not hasattr(reader, ROTATION)
        alone = "its own RoPE since what makes its tables is outside of the model"
        notes.setdefault(reader, alone if is_own else "RoPE in the kernels")
    return notes


def unfold(module: nn.Module) -> None:
    """Forget what :func:`fold` noted on `module`."""
    for name in (ROTATION, READERS, TRIED):
        vars(module).pop(name, None)


def _set(rotary: nn.Module, readers: tuple[nn.Module, ...], found: Rotation | str) -> None:
    for module in (rotary, *readers):
        unfold(module)
    stock = stock_class(rotary) or type(rotary)
    if isinstance(found, str):
        set_class(rotary, stock)
        return
    set_class(rotary, swapped_class(stock, rotary_methods))
    setattr(rotary, READERS, readers)
    setattr(rotary, TRIED, _options(rotary))
    for module in (rotary, *readers):
        setattr(module, ROTATION, found)


def _options(rotary: nn.Module) -> tuple[tuple[str, Any], ...]:
    """What its tables may depend on beside frequencies: a factor of cos and sin, say."""
    plain = {n: v for n, v in vars(rotary).items() if isinstance(v, bool | int | float | str)}
    return tuple((n, v) for n, v in plain.items() if n != "training" and not n.startswith("_"))


def _found(
    model: nn.Module,
    tower: nn.Module,
    rotaries: dict[str, nn.Module],
    readers: list[nn.Module],
    names: Mapping[str, Any],
) -> Rotation | str:
    if len(rotaries) != 1:
        return f"its tower has {len(rotaries)} modules that make tables"
    ((name, rotary),) = rotaries.items()
    if sum(rotary in set(module.children()) for module in model.modules()) > 1:
        return "what makes its tables is part of more than one module"
    if has_own_forward(rotary):
        return "the forward of what makes its tables was replaced on the instance"
    if not hands_on((stock_class(tower) or type(tower)).forward, name):
        return f"{type(tower).__name__} does more with the tables than to hand them on"
    for module in tower.modules():
        cls = stock_class(module) or type(module)
        is_other = module is not tower and module not in readers and _takes_tables(module)
        if is_other and not hands_on(cls.forward, None):
            return f"{cls.__name__} reads the tables, too"
    known: Rotation | None = vars(rotary).get(ROTATION)
    is_offloaded = any(weight.is_meta for m in readers for weight in m.parameters())
    if known and is_offloaded and all(vars(m).get(ROTATION) == known for m in readers):
        return known
    first: dict[type[nn.Module], Rotation | str] = {}
    for reader in readers:
        if type(reader) not in first:
            try:
                first[type(reader)] = find_rotation(reader, rotary, names)
            except Exception as error:  # whatever a class that is not known may raise
                return f"its rotation could not be tried: {type(error).__name__}: {error}"
    reasons = [found for found in first.values() if isinstance(found, str)]
    if reasons or len(set(first.values())) != 1:
        return reasons[0] if reasons else "its layers rotate differently"
    return next(iter(first.values()))


def _makes_tables(module: nn.Module) -> bool:
    """Whether it has frequencies, and a forward of x and positions."""
    cls = stock_class(module) or type(module)
    names = list(inspect.signature(innermost(cls.forward)).parameters)
    return names == ["self", "x", "position_ids"] and "inv_freq" in dict(
        module.named_buffers(recurse=False)
    )


def _takes_tables(module: nn.Module) -> bool:
    cls = stock_class(module) or type(module)
    return TABLES in inspect.signature(innermost(cls.forward)).parameters


@lru_cache(maxsize=512)
def hands_on(forward: Callable[..., Any], rotary: str | None) -> bool:
    """Whether `forward` only hands tables on, as keywords of that name.

    A tower, which makes them by ``self.<rotary>(...)``, may also put the rows of each in another
    order by a method of its own: ``tuple(self.method(table, ...) for table in tables)``.
    """
    try:
        source = textwrap.dedent(inspect.getsource(innermost(forward)))
    except (OSError, TypeError):
        return False
    tree = ast.parse(source)
    made = {TABLES} if rotary is None else set(_assigned_from(tree, rotary))
    if len(made) != 1 or "" in made:
        return False
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in made]
    uses = [n for n in uses if isinstance(n.ctx, ast.Load)]
    allowed = {
        id(k.value) for k in ast.walk(tree) if isinstance(k, ast.keyword) and k.arg == TABLES
    }
    if rotary is not None:
        allowed |= {id(use) for use in _reordered(tree)}
    return all(id(use) in allowed for use in uses)


def _assigned_from(tree: ast.AST, rotary: str) -> Iterator[str]:
    """Names that are assigned what ``self.<rotary>(...)`` returns; "" for other uses of it."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == rotary]
    assigned = [n for n in ast.walk(tree) if isinstance(n, ast.Assign)]
    for call in calls:
        names = [
            target.id
            for each in assigned
            if isinstance(each.value, ast.Call) and each.value.func is call
            for target in each.targets
            if isinstance(target, ast.Name)
        ]
        yield names[0] if len(names) == 1 else ""


def _reordered(tree: ast.AST) -> Iterator[ast.expr]:
    """The tables of each ``self.method(table, ...) for table in tables``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.GeneratorExp | ast.ListComp) and isinstance(node.elt, ast.Call):
            each, call = node.generators[0], node.elt
            is_method = isinstance(call.func, ast.Attribute) and len(node.generators) == 1
            given = [ast.unparse(argument) for argument in call.args[:1]]
            if is_method and not each.ifs and given == [ast.unparse(each.target)]:
                yield each.iter


def rotary_methods(cls: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """What an accelerated tower's rotary has of its own: positions for tables."""
    stock: Callable[..., Any] = cls.forward

    @wraps(stock)
    def positions(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if not _is_left_to_kernels(self, x):
            return stock(self, x, position_ids)
        rope = getattr(self, ROTATION).rope(position_ids, self.inv_freq.detach().float())
        return as_tables(*rope)

    return {"forward": positions}


def _is_left_to_kernels(rotary: nn.Module, x: Tensor) -> bool:
    """Whether all that read its tables would leave the rotation to a kernel, with x's dtype."""
    readers = getattr(rotary, READERS)
    if not all(hasattr(m, ROTATION) and not has_own_forward(m) for m in readers):
        return False
    if any(getattr(rotary, name, None) != value for name, value in getattr(rotary, TRIED)):
        return False
    inv_freq = rotary.get_buffer("inv_freq")
    # Where x has frequencies of its own, rounded ones are no longer proportional to those of y.
    is_exact = len(inv_freq) == getattr(rotary, ROTATION).pairs or inv_freq.dtype == torch.float32
    return is_exact and choose_backend("rope_2d", getattr(readers[0], OPTION), x) == "triton"
