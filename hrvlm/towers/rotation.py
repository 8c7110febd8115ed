"""Which rotation a tower's own code is, found by trying it.

``varlen_attention`` rotates q and k as :func:`hrvlm_kernels.rope_2d` does: pairs of channels
``(j, D/2 + j)`` by ``y * f_j`` for the first D/4 of them, by ``x * f_j`` for the others. A tower's
rotation is this one if its channels can be put in that order, and if the frequencies of its axes
are proportional:

    Qwen, GLM, Ernie ...   is this one
    Pixtral                with x scaled by theta^(-2/D)
    MoonViT                with other channels: x and y in turn
    Inkling                with other channels: pairs side by side, x in front of y

No name says which. The attention's code runs on a few tokens, by its own weights: what it makes of
unit vectors at the positions (1, 0) and (0, 1) gives pairs and frequencies; and the q and k that it
hands on for tokens elsewhere have to be those of rope_2d.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hrvlm_kernels import rope_2d
from hrvlm_kernels.ops.rope_2d import rope_table
from hrvlm_kernels.ops.varlen_attention import reads_rope_table

from .rebinding import LOOKED_UP, global_names, innermost, rebind
from .swapping import stock_class

TABLES = "position_embeddings"
# Beside the two of unit vectors. Several are off both axes.
_POSITIONS = ((0, 0), (1, 1), (0, 5), (7, 0), (23, 4), (2, 41), (64, 63))
# The keyword that takes the positions past an attention's own code.
TO_KERNELS = "hrvlm_tables"
# Of the positions that a tower's layers are handed in a forward, for as long as these are alive.
_written = WeakTensorKeyDictionary()
_NOT_ONLY = "what it does to q and k is not a rotation of pairs by y and x alone"


class Rotation(NamedTuple):
    """Where rope_2d's channels are in a head: ``(first, step)`` of D/4 each.

    Attributes:
        pairs: D/4.
        first_y: The first of each pair that y turns, by falling frequency.
        first_x: The first of each pair that x turns.
        second_y: The second of each pair that y turns.
        second_x: The second of each pair that x turns.
    """

    pairs: int
    first_y: tuple[int, int]
    first_x: tuple[int, int]
    second_y: tuple[int, int]
    second_x: tuple[int, int]

    def ordered(self, a: Tensor) -> Tensor:
        """`a` ``[..., D]`` with its channels where rope_2d has them."""
        if self[1:] == tuple((i * self.pairs, 1) for i in range(4)):
            return a
        last = self.pairs - 1
        slices = [slice(at, at + step * last + 1, step) for at, step in self[1:]]
        return torch.cat([a[..., each] for each in slices], dim=-1)

    def rope(self, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        """``(coords, inv_freq)`` of rope_2d.

        Args:
            positions: ``[T, 2]`` (y, x) of any dtype.
            inv_freq: ``[D / 4]`` of both axes, or ``[D / 2]``, those of y and then of x.
        """
        # rope_2d multiplies by 2 pi in float32. A tensor divides with one rounding, a number may
        # with two; of 512 positions, 434 come back as they were, and their angles are the tower's.
        turns = inv_freq[0] / inv_freq[:: self.pairs] * (2 * math.pi)
        return positions.float() / turns, inv_freq[: self.pairs]


def as_tables(coords: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """What stands in the place of cos and sin: the bits of float32 as int32, a row for each token.

    Mixed precision casts every float tensor that it finds in a layer's inputs, and a position
    rounded to bfloat16 is another position.
    """
    bits = inv_freq.contiguous().view(torch.int32)
    return coords.view(torch.int32), bits.expand(len(coords), -1)


def is_folded(tables: object) -> bool:
    """Whether it is what :func:`as_tables` makes."""
    return isinstance(tables, tuple) and len(tables) == 2 and tables[0].dtype == torch.int32


def rope_of(tables: tuple[Tensor, Tensor], q: Tensor, backend: str) -> tuple[Tensor, ...] | None:
    """What ``varlen_attention`` of `q` takes as its `rope`; None for no tokens."""
    coords, inv_freq = tables
    if not len(coords):
        return None
    rope = coords.view(torch.float32), inv_freq[0].view(torch.float32)
    if reads_rope_table(q, q.shape[-1], backend):
        return *rope, _table_of(coords, *rope)
    return rope


@torch.compiler.disable
def _table_of(key: Tensor, coords: Tensor, inv_freq: Tensor) -> Tensor:
    """The kernels' table of cos and sin, written by the first layer that is handed `key`."""
    table = _written.get(key)
    if table is None:
        table = _written[key] = rope_table(coords, inv_freq)
    return table


def unless_folded(rotate: Callable[..., Any]) -> Callable[..., Any]:
    """`rotate` of ``(q, k, cos, sin, ...)``, left out where the kernels do it."""

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if cos.dtype == torch.int32:
            return q, k
        return rotate(q, k, cos, sin, *args, **kwargs)

    return rotated


def rotation_names(cls: type[nn.Module]) -> list[str]:
    """Functions of ``(q, k, cos, sin, ...)`` of its module that the forward of `cls` looks up."""
    namespace = getattr(innermost(cls.forward), "__globals__", {})
    return [name for name in global_names(cls.forward) if _is_rotation(namespace.get(name))]


def _is_rotation(value: object) -> bool:
    if isinstance(value, nn.Module):  # the `kernels` package makes one around a function
        cells = getattr(type(value).forward, "__closure__", None) or ()
        return any(_is_rotation(cell.cell_contents) for cell in cells)
    code = getattr(innermost(value), "__code__", None) if inspect.isfunction(value) else None
    return code is not None and code.co_varnames[:4] == ("q", "k", "cos", "sin")


@torch.no_grad()
def find_rotation(
    attention: nn.Module, rotary: nn.Module, names: Mapping[str, Any]
) -> Rotation | str:
    """The rotation of `attention` by the tables of `rotary`, or why it is not one of rope_2d's.

    Args:
        attention: Accelerated or not; its weights are used where they are.
        rotary: What makes the tables of cos and sin in its tower, from ``(x, position_ids)``.
        names: What an accelerated attention's code finds in place of its module's names.
    """
    weight, inv_freq = _weight(attention), rotary.get_buffer("inv_freq")
    if weight.is_meta or inv_freq.is_meta:
        return "nothing can be tried on the meta device"
    cls, stock_rotary = (stock_class(m) or type(m) for m in (attention, rotary))
    rotating = rotation_names(cls)
    if len(rotating) != 1:
        return f"it looks up {len(rotating)} functions of (q, k, cos, sin)"
    tables = partial(stock_rotary.forward, rotary, inv_freq.new_zeros(1).float())
    channels = tables(torch.zeros(1, 2, device=inv_freq.device))[0].shape[-1]
    positions = [(1, 0)] * channels + [(0, 1)] * channels + [*_POSITIONS]
    ids = torch.tensor(positions, device=inv_freq.device)
    cos_sin = tuple(table.to(weight.device) for table in tables(ids))
    rotate = _Rotate(innermost(cls.forward).__globals__[rotating[0]], channels)

    def handed_on(function: Callable[..., Any], given: Any, **options: Any) -> _Caught:
        forward = rebind(cls.forward, {**names, LOOKED_UP: _Catcher(), rotating[0]: function})
        return _handed_on(forward, attention, len(ids), {TABLES: given, **options})

    rotated = handed_on(rotate, cos_sin)
    if rotated.q.shape[-1] != channels or channels % 4:
        return "it turns some of a head's channels only"
    by_y, by_x, _ = rotate.units.split([channels, channels, len(_POSITIONS)])
    found = _structure(by_y, by_x, inv_freq.cpu().float())
    if found is None:
        return _NOT_ONLY
    coords, frequencies = found.rope(ids.to(weight.device), inv_freq.float().to(weight.device))
    bits = as_tables(coords, frequencies)
    plain = handed_on(unless_folded(rotate), bits, **{TO_KERNELS: bits})
    if plain.kwargs.get(TO_KERNELS) is not bits:
        return "it does not hand on what it is given to its attention function"
    q, k = (found.ordered(a).float() for a in (plain.q, plain.k))
    mine = rope_2d(q, k, coords, frequencies, backend="eager")
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
    equal = (
        (a - found.ordered(b)).abs().max() <= tolerance * b.abs().max()
        for a, b in zip(mine, (rotated.q, rotated.k), strict=True)
    )
    return found if all(equal) else _NOT_ONLY


class _Rotate:
    """A tower's function of ``(q, k, cos, sin, ...)``, which also rotates unit vectors.

    Attributes:
        units: ``[T, D]`` on the host: token t has unit vector ``t mod D``.
    """

    units: Tensor

    def __init__(self, stock: Callable[..., Any], channels: int):
        self.stock = stock
        self.channels = channels

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        tokens = len(cos)
        units = torch.eye(self.channels, device=q.device)
        units = units.repeat(tokens // self.channels + 1, 1)[:tokens]
        # Tokens are the one axis of q that is as long as they are, channels are the last.
        shaped = units.reshape(*(n if n == tokens else 1 for n in q.shape[:-1]), self.channels)
        turned, _ = self.stock(shaped, shaped, cos, sin, *args, **kwargs)
        self.units = turned.reshape(tokens, self.channels).cpu()
        return self.stock(q, k, cos, sin, *args, **kwargs)


class _Caught(Exception):
    """What an attention function is given: q and k ``[T, H, D]``, and its keywords."""

    def __init__(self, q: Tensor, k: Tensor, kwargs: dict[str, Any]):
        super().__init__()
        self.q, self.k, self.kwargs = q, k, kwargs


class _Catcher:
    """Stands for transformers' table of attention functions; what it has ends the forward."""

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """A function that raises :class:`_Caught`, if its q and k are ``[1, H, T, D]``."""

        def catch(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> None:
            raise _Caught(query[0].transpose(0, 1), key[0].transpose(0, 1), kwargs)

        return catch


def _handed_on(
    forward: Callable[..., Any], attention: nn.Module, tokens: int, given: dict[str, Any]
) -> _Caught:
    """What `forward` gives its attention function, of random tokens in one segment."""
    weight = _weight(attention)
    sizes: list[Any] = [m.in_features for m in attention.modules() if hasattr(m, "in_features")]
    size = sizes[0] if sizes else weight.shape[-1]
    hidden = torch.randn(tokens, size, generator=torch.Generator().manual_seed(0)).to(weight)
    if "cu_seqlens" in inspect.signature(innermost(forward)).parameters:
        lengths = torch.tensor([0, tokens], dtype=torch.int32, device=weight.device)
        given = given | {"cu_seqlens": lengths}
    first: Exception = TypeError("its forward hands on no q and k of [1, H, T, D]")
    for states in (hidden, hidden[None]):
        try:
            # Adapters may have dropout: each trial starts from the same state, and leaves it.
            with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
                forward(attention, hidden_states=states, **given)
        except _Caught as caught:
            if caught.q.ndim == caught.k.ndim == 3 and len(caught.q) == len(caught.k) == tokens:
                return caught
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            first = first if states is not hidden else error
    raise first


def _weight(attention: nn.Module) -> Tensor:
    """Its first matrix of floating-point numbers, or its first of any such tensor."""
    tensors = [a for a in (*attention.parameters(), *attention.buffers()) if a.is_floating_point()]
    found = next((a for a in tensors if a.ndim == 2), next(iter(tensors), None))
    if found is None:
        raise TypeError("it has no weights of floating-point numbers")
    return found


def _structure(by_y: Tensor, by_x: Tensor, inv_freq: Tensor) -> Rotation | None:
    """From what a step of 1 along each axis makes of each unit vector, in rows."""
    pairs = len(by_y) // 4
    places, frequencies = [], []
    for turned, expected in ((by_y, inv_freq[:pairs]), (by_x, inv_freq[-pairs:])):
        first, second = torch.where(turned * (1 - torch.eye(len(turned))) > 1e-9)
        if len(first) != pairs or len(expected) != pairs:
            return None
        angles = torch.atan2(turned[first, second], turned[first, first])
        order = angles.argsort(descending=True)
        places.append((_progression(first[order]), _progression(second[order])))
        frequencies.append(angles[order])
        if not torch.allclose(frequencies[-1], expected, rtol=1e-4, atol=0.0):
            return None
    ratio = frequencies[1] / frequencies[0]
    (first_y, second_y), (first_x, second_x) = places
    if not torch.allclose(ratio, ratio[:1], rtol=1e-4, atol=0.0):
        return None
    if first_y and first_x and second_y and second_x:
        return Rotation(pairs, first_y, first_x, second_y, second_x)
    return None


def _progression(places: Tensor) -> tuple[int, int] | None:
    """(first, step) of numbers that rise by equal steps."""
    numbers = places.tolist()
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    expected = list(range(numbers[0], numbers[0] + step * len(numbers), step)) if step > 0 else []
    return (numbers[0], step) if numbers == expected else None
