"""Calls that were made before: made again without asking again.

    @replayed
    def swiglu(gate, up, *, backend="auto"): ...

What a call of the kernels does follows from the dtypes, shapes, strides, devices and alignment of
its tensors and from the values of its other arguments: the checks that it passes, what it
allocates, which compiled kernels it starts and with which numbers. The second call in which all of
these are the same is watched, and the ones after it replay what was seen: they allocate, and start
the kernels with the addresses of the day.

Watched means that every operation of torch and every launch is seen. A call is only ever replayed
if it did nothing but allocate, take views and launch bound kernels (triton_kernels/bound.py) on the
current device, with tensors that are arguments, views of them, or its own. Whatever else a call
does, the next ones are made as ever, and so are those that torch has to see: under torch.compile,
modes, autocast, transforms, profilers, and where gradients are recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from copy import copy
from functools import wraps
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, empty_strided, is_grad_enabled
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _is_any_autocast_enabled
from torch._C._autograd import _profiler_enabled
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode
from torch.utils._pytree import tree_leaves

from .packed_grids import PackedGrids

Function = TypeVar("Function", bound=Callable[..., Any])

_MOST = 1024  # calls of a function that are kept
_ALIGNMENT = 128  # bytes, of what a call has for itself
_VALUES = {type(None), bool, int, float, str, torch.dtype}
_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
}

# Driver, device and stream of the next launch, or None while someone wants to see the launches
# themselves. Set by triton_kernels/bound.py: before it is imported, there is nothing to replay.
place: Callable[[], tuple[Any, int, int] | None] | None = None

_all_known: list[dict[tuple[Any, ...], Any]] = []


class _Thread(threading.local):
    watch: _Watch | None = None


_thread = _Thread()


def watched() -> _Watch | None:
    """Who watches the call that runs in this thread."""
    return _thread.watch


def forget() -> None:
    """Drop all that was seen: what chooses tile sizes has changed, say."""
    for known in _all_known:
        known.clear()


def needs_torch() -> bool:
    """Whether torch has to see the operations themselves, gradients apart."""
    return (
        is_in_torch_dispatch_mode()
        or _are_functorch_transforms_active()
        or _profiler_enabled()
        or _get_tracing_state() is not None
    )


def replayed(function: Function) -> Function:
    """`function`, whose calls are replayed where they can be.

    It takes tensors, layouts, numbers, names, None, and tuples of these, and returns tensors.
    """
    known: dict[tuple[Any, ...], _Replay | bool] = {}  # True: seen once; False: never to be
    _all_known.append(known)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_compiling() or place is None or _thread.watch is not None:
            return function(*args, **kwargs)
        here = place()
        if here is None or needs_torch() or _is_any_autocast_enabled():
            return function(*args, **kwargs)
        driver, device, stream = here
        key: list[Any] = [driver, device, *kwargs]
        tensors: list[Tensor] = []
        addresses: list[Any] = []
        records = is_grad_enabled()
        for part in (args, kwargs.values()) if kwargs else (args,):
            if not _describe(part, key, tensors, addresses, records):
                return function(*args, **kwargs)
        what = tuple(key)
        found = known.get(what)
        if found is None or found is False:
            if len(known) >= _MOST:
                known.clear()
            known[what] = found is None
            return function(*args, **kwargs)
        if found is True:
            if len(set(map(id, tensors))) < len(tensors):  # which of them would a launch mean?
                return function(*args, **kwargs)
            result, known[what] = _watch(function, args, kwargs, tensors, device)
            return result
        return found(tensors, addresses, stream)

    return cast(Function, call)


def _describe(
    args: Iterable[Any], key: list[Any], tensors: list[Tensor], addresses: list[Any], records: bool
) -> bool:
    """Add all that decides to `key`, and the tensors; False for what is not told apart here."""
    for a in args:
        kind = type(a)
        if kind is Tensor or kind is Parameter:
            has_gradient, address = a.requires_grad, a.data_ptr()
            if records and has_gradient:
                return False
            key += (a.dtype, a.shape, a.stride(), a.device, has_gradient, address & 15)
            tensors.append(a)
            addresses.append(address)
        elif kind in _VALUES:
            key += (kind, a)
        elif kind is PackedGrids:
            key += (a.lengths, a.device)
            tensors += (segments := a.segments)
            addresses += [table.data_ptr() for table in segments]
        elif kind is not tuple:
            return False
        else:
            key.append(len(a))
            if not _describe(a, key, tensors, addresses, records):
                return False
    return True


def _watch(
    function: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor], device: int
) -> tuple[Any, _Replay | bool]:
    watch = _thread.watch = _Watch(tensors, device)
    try:
        with watch:
            result = function(*args, **kwargs)
    finally:
        _thread.watch = None
    return result, watch.replay(result)


class _Source(NamedTuple):
    tensor: int  # of the arguments, then of the allocations
    offset: int  # in bytes


class _Watch(TorchDispatchMode):
    """Sees one call.

    Args:
        tensors: Its arguments.
        device: The current one.
    """

    def __init__(self, tensors: list[Tensor], device: int):
        super().__init__()
        self.device = device
        self.inputs = len(tensors)
        self.tensors: list[Tensor] = []  # the arguments, then what is allocated
        self.views: list[Tensor] = []  # kept, so that an id stands for one
        self.sources: dict[int, _Source] = {}
        self.launches: list[tuple[Any, ...]] = []
        self.is_simple = True
        for a in tensors:
            self._know(a)

    def _know(self, a: Tensor) -> None:
        self.sources[id(a)] = _Source(len(self.tensors), 0)
        self.tensors.append(a)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func`, and note what it was."""
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and not (kwargs or {}).get("pin_memory"):
            self._know(out)
        elif func.is_view and id(args[0]) in self.sources:
            base, offset = self.sources[id(args[0])]
            start = args[0].storage_offset() * args[0].itemsize
            for a in tree_leaves(out):
                self.views.append(a)
                there = a.storage_offset() * a.itemsize
                self.sources[id(a)] = _Source(base, offset + there - start)
        else:
            self.is_simple = False
        return out

    def note(self, device: int, grid: tuple[int, ...], start: tuple[Any, ...], args: Any) -> None:
        """A launch by ``start[0](*grid, stream, *start[1:], None, None, None, *args)``."""
        self.is_simple &= device == self.device
        self.launches.append((start, grid, args))

    def refuse(self) -> None:
        """A launch that can't be made again from here."""
        self.is_simple = False

    def replay(self, result: Any) -> _Replay | bool:
        """What makes the call again; False if there is none."""
        if not self.launches or not self.is_simple:
            return False
        results = result if isinstance(result, tuple) else (result,)
        try:
            returned = [self.sources[id(a)].tensor for a in results]
            wholes = [self.tensors[i] for i in returned]
            if all(map(_is_whole, results, wholes)):
                return _Replay(self, returned, isinstance(result, tuple))
        except LookupError:  # a tensor from elsewhere
            pass
        return False


class _Replay:
    """A call that is made again.

    `values` of one are the addresses of arguments, of results and of what it has for itself, those
    of views, descriptors, and constants; a launch picks its arguments from there.
    """

    def __init__(self, watch: _Watch, returned: list[int], is_tuple: bool):
        self.is_tuple = is_tuple
        made = range(watch.inputs, len(watch.tensors))
        results, own = [i for i in made if i in returned], [i for i in made if i not in returned]
        order = [*range(watch.inputs), *results, *own]
        self.place_of = {tensor: i for i, tensor in enumerate(order)}
        self.returned = [self.place_of[i] for i in returned]
        self.results = [_layout(watch.tensors[i]) for i in results]
        self.own, self.size, self.device = [], 0, None
        for a in (watch.tensors[i] for i in own):
            self.own.append(self.size)
            self.size += -(-a.nbytes // _ALIGNMENT) * _ALIGNMENT
            self.device = a.device
        self.views: list[tuple[int, int]] = []
        self.descriptors: list[_Descriptor] = []
        constants: list[Any] = []
        picked = [
            [self._sort(a, watch.sources, constants) for a in args] for _, _, args in watch.launches
        ]
        ends = [len(order), len(self.views), len(self.descriptors)]
        first = {"tensor": 0, "view": ends[0], "descriptor": sum(ends[:2]), "constant": sum(ends)}
        self.constants = constants
        self.launches = [
            (start[0], grid, start[1:], itemgetter(*(first[kind] + i for kind, i in places)))
            for (start, grid, _), places in zip(watch.launches, picked, strict=True)
        ]

    def _sort(self, a: Any, sources: dict[int, _Source], constants: list[Any]) -> tuple[str, int]:
        """The part of `values` that an argument of a launch is in, and its place there."""
        if isinstance(a, Tensor) and a.numel():
            tensor, offset = sources[id(a)]
            if not offset:
                return "tensor", self.place_of[tensor]
            self.views.append((self.place_of[tensor], offset))
            return "view", len(self.views) - 1
        if hasattr(a, "block_shape"):
            base, offset = sources[id(a.base)]
            self.descriptors.append(_Descriptor(a, self.place_of[base], offset))
            return "descriptor", len(self.descriptors) - 1
        constants.append(0 if isinstance(a, Tensor) else a)
        return "constant", len(constants) - 1

    def __call__(self, tensors: list[Tensor], values: list[Any], stream: int) -> Any:
        """The results; `values` are the addresses of `tensors`."""
        for shape, strides, dtype, device in self.results:
            out = empty_strided(shape, strides, dtype=dtype, device=device)
            tensors.append(out)
            values.append(out.data_ptr())
        if self.own:
            own = torch.empty(self.size, dtype=torch.uint8, device=self.device)
            address = own.data_ptr()
            values += [address + offset for offset in self.own]
        if self.views:
            values += [values[i] + offset for i, offset in self.views]
        if self.descriptors:
            values += [descriptor.at(values) for descriptor in self.descriptors]
        values += self.constants
        for run, grid, start, pick in self.launches:
            run(*grid, stream, *start, None, None, None, *pick(values))
        if self.is_tuple:
            return tuple([tensors[i] for i in self.returned])
        return tensors[self.returned[0]]


def _is_whole(a: Tensor, b: Tensor) -> bool:
    """Whether `a`, a view of `b` at least, is all of it; torch detaches what it allocates."""
    return a.data_ptr() == b.data_ptr() and _layout(a) == _layout(b)


def _layout(a: Tensor) -> tuple[Any, ...]:
    return a.shape, a.stride(), a.dtype, a.device


class _Address:
    """A tensor, as far as a launcher looks at one."""

    def __init__(self, address: int):
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class _Descriptor:
    """Triton's descriptor of a tensor, for whatever address that has."""

    def __init__(self, descriptor: Any, tensor: int, offset: int):
        self.descriptor, self.tensor, self.offset = copy(descriptor), tensor, offset
        self.descriptor.base = None  # which it would keep in memory
        self.known: dict[int, Any] = {}

    def at(self, values: list[Any]) -> Any:
        address = values[self.tensor] + self.offset
        found = self.known.get(address)
        if found is None:
            if len(self.known) >= _MOST:
                self.known.clear()
            found = self.known[address] = copy(self.descriptor)
            found.base = _Address(address)
        return found
