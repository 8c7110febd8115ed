"""Calls that were made before: made again without asking again.

    @replayed
    def swiglu(gate, up, *, backend="auto"): ...

What a call of the kernels does follows from the dtypes, shapes, strides, devices and alignment of
its tensors and from the values of its other arguments: the checks that it passes, what it
allocates, which compiled kernels it starts and with which numbers. The second call in which all of
these are the same is watched, and the ones after it replay what was seen: they allocate, and start
the kernels with the addresses of the day. Their memory comes from where Inductor's code has its
own, and a kernel is started by what Triton's launcher calls in the end.

Watched means that every operation of torch and every launch is seen. A call is only ever replayed
if it did nothing but allocate, take views and launch bound kernels (triton_kernels/bound.py) on the
current device, with aligned tensors that are arguments, views of them, or its own. Whatever else a
call does, the next ones are made as ever, and so are those that torch has to see: under
torch.compile, modes, autocast, transforms and profilers. Where a gradient is recorded, an op's
autograd function replays the op.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from copy import copy
from functools import partial, wraps
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled, _is_tracing
from torch._C._autograd import _profiler_enabled
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode
from torch.utils._pytree import tree_leaves

from .packed_grids import PackedGrids

Function = TypeVar("Function", bound=Callable[..., Any])

_MOST = 1024  # calls of a function that are kept
_ALIKE = 8  # likewise, of those that differ in dtypes, strides or devices alone
_ALIGNMENT = 128  # bytes, of what a call has for itself
STREAM = object()  # stands for that of the day in the arguments of a launch
_VALUES = {type(None), bool, int, float, str, torch.dtype}
_aten = torch.ops.aten
# Dynamo's and Inductor's own; where a release of torch lacks the first, nothing is replayed.
_guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_TensorGuards: Any = getattr(_guards, "TensorGuards", None)
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
        or _is_tracing()
    )


class _Known:
    """Calls with tensors of these dtypes, shapes, strides and devices.

    Args:
        tensors: Of one of them.
    """

    __slots__ = ("again", "fit", "is_refused", "want_gradient")

    def __init__(self, tensors: list[Tensor]):
        # Whether others are like them, for torch's dispatcher too: as it is in this thread, under a
        # transform, autocast or a trace, no tensor fits.
        self.fit = _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        self.want_gradient = any(a.requires_grad for a in tensors)
        self.again: _Replay | None = None  # what makes it again
        self.is_refused = False  # never to be made again


def replayed(function: Function, with_gradient: Callable[..., Any] | None = None) -> Function:
    """`function`, whose calls are replayed where they can be.

    Args:
        function: It takes tensors, layouts, numbers, names, None, and tuples of these, and returns
            tensors.
        with_gradient: Makes a call whose gradient is recorded. It takes the arguments, and behind
            them what replays the call without its gradient.
    """
    known: dict[tuple[Any, ...], list[_Known]] = {}
    _all_known.append(known)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_compiling() or place is None or _thread.watch is not None:
            return function(*args, **kwargs)
        here = place()
        if here is None or _profiler_enabled() or is_in_torch_dispatch_mode():
            return function(*args, **kwargs)
        driver, device, stream = here
        key: list[Any] = [driver, device]
        tensors: list[Tensor] = []
        if not _sort(args, key, tensors) or (kwargs and not _sort(kwargs.items(), key, tensors)):
            return function(*args, **kwargs)
        what = tuple(key)
        for found in known.get(what, ()):
            if found.fit(*tensors):
                break
        else:
            if not needs_torch() and not _is_any_autocast_enabled():
                _add(known, what, tensors)
            return function(*args, **kwargs)
        again, records = found.again, found.want_gradient and is_grad_enabled()
        if found.is_refused or (records and not (again and with_gradient)):
            return function(*args, **kwargs)
        bits, addresses = 0, []
        for a in tensors:
            address = a.data_ptr()
            bits |= address
            addresses.append(address)
        if bits & 15:
            return function(*args, **kwargs)
        if again is None:
            result, found.again = _watch(function, args, kwargs, tensors, device)
            found.is_refused = found.again is None
            return result
        if records and with_gradient:
            return with_gradient(*args, partial(again, tensors, addresses, stream))
        return again(tensors, addresses, stream)

    return cast(Function, call) if _TensorGuards else function


def _add(known: dict[tuple[Any, ...], list[_Known]], key: Any, tensors: list[Tensor]) -> None:
    if not tensors or len(set(map(id, tensors))) < len(tensors):  # the latter never fit
        return
    added = _Known(tensors)
    if added.want_gradient and is_grad_enabled():  # the same without it will come from there
        return
    if len(known) >= _MOST:
        known.clear()
    calls = known.setdefault(key, [])
    calls.append(added)
    del calls[:-_ALIKE]


def _sort(args: Iterable[Any], key: list[Any], tensors: list[Tensor]) -> bool:
    """Add the tensors, and to `key` what else decides; False for what is not told apart here."""
    for a in args:
        kind = type(a)
        if kind is Tensor or kind is Parameter:
            key.append(a.numel())
            tensors.append(a)
        elif kind in _VALUES:
            key += (kind, a)
        elif kind is PackedGrids:
            key += (kind, a.lengths)
            tensors += a.segments
        elif kind is not tuple:
            return False
        else:
            key += (kind, len(a))
            if not _sort(a, key, tensors):
                return False
    return True


def _watch(
    function: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor], device: int
) -> tuple[Any, _Replay | None]:
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
        self.launches: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
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

    def note(self, device: int, run: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """A launch by ``run(*args)``, with :data:`STREAM` among them."""
        self.is_simple &= device == self.device
        self.launches.append((run, args))

    def refuse(self) -> None:
        """A launch that can't be made again from here."""
        self.is_simple = False

    def replay(self, result: Any) -> _Replay | None:
        """What makes the call again, if anything does."""
        if not self.launches or not self.is_simple:
            return None
        results = result if isinstance(result, tuple) else (result,)
        try:
            returned = [self.sources[id(a)].tensor for a in results]
            wholes = [self.tensors[i] for i in returned]
            if all(map(_is_whole, results, wholes)):
                return _Replay(self, returned, isinstance(result, tuple))
        except LookupError:  # a tensor from elsewhere
            pass
        return None


class _Replay:
    """A call that is made again.

    `values` of one are the addresses of arguments, of results and of what it has for itself, those
    of views, descriptors, the stream, and constants; a launch picks its arguments from there.
    """

    def __init__(self, watch: _Watch, returned: list[int], is_tuple: bool):
        self.is_tuple = is_tuple
        made = range(watch.inputs, len(watch.tensors))
        results, own = [i for i in made if i in returned], [i for i in made if i not in returned]
        order = [*range(watch.inputs), *results, *own]
        self.place_of = {tensor: i for i, tensor in enumerate(order)}
        self.returned = [self.place_of[i] for i in returned]
        self.results = [_allocation(_layout(watch.tensors[i]), watch.device) for i in results]
        self.own, size = [], 0
        for a in (watch.tensors[i] for i in own):
            self.own.append(size)
            size += -(-a.nbytes // _ALIGNMENT) * _ALIGNMENT
        if own:
            layout = (size,), (1,), torch.uint8, a.device
            self.allocate_own = _allocation(layout, watch.device)
        self.views: list[tuple[int, int]] = []
        self.descriptors: list[_Descriptor] = []
        constants: list[Any] = []
        picked = [
            [self._sort(a, watch.sources, constants) for a in args] for _, args in watch.launches
        ]
        first, end = {}, 0
        for kind, count in (
            ("tensor", len(order)), ("view", len(self.views)),
            ("descriptor", len(self.descriptors)), ("stream", 1), ("constant", 0),
        ):  # fmt: skip
            first[kind], end = end, end + count
        self.constants = constants
        self.launches = [
            (run, itemgetter(*(first[kind] + i for kind, i in places)))
            for (run, _), places in zip(watch.launches, picked, strict=True)
        ]

    def _sort(self, a: Any, sources: dict[int, _Source], constants: list[Any]) -> tuple[str, int]:
        """The part of `values` that an argument of a launch is in, and its place there."""
        if a is STREAM:
            return "stream", 0
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
        for allocate, layout in self.results:
            out = allocate(*layout)
            tensors.append(out)
            values.append(out.data_ptr())
        if self.own:
            allocate, layout = self.allocate_own
            own = allocate(*layout)
            address = own.data_ptr()
            values += [address + offset for offset in self.own]
        if self.views:
            values += [values[i] + offset for i, offset in self.views]
        if self.descriptors:
            values += [descriptor.at(values) for descriptor in self.descriptors]
        values.append(stream)
        values += self.constants
        for run, pick in self.launches:
            run(*pick(values))
        if self.is_tuple:
            return tuple([tensors[i] for i in self.returned])
        return tensors[self.returned[0]]


def _is_whole(a: Tensor, b: Tensor) -> bool:
    """Whether `a`, a view of `b` at least, is all of it; torch detaches what it allocates."""
    return a.data_ptr() == b.data_ptr() and _layout(a) == _layout(b)


def _layout(a: Tensor) -> tuple[Any, ...]:
    return tuple(a.shape), a.stride(), a.dtype, a.device


def _allocation(layout: tuple[Any, ...], current: int) -> tuple[Callable[..., Tensor], Any]:
    """What allocates, and its arguments: what Inductor's code calls, past torch's dispatcher.

    On a GPU that allocates on the current device.
    """
    *arguments, device = layout
    if device.type == "cpu" or (device.type == "cuda" and device.index == current):
        allocate = getattr(_guards, f"_empty_strided_{device.type}", None)
        if allocate is not None:
            return allocate, arguments
    return partial(torch.empty_strided, device=device), arguments


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
