"""Tensors with CPU data that say they are on cuda:0, and the mode that judges every op."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from .record import RECORD, Allocation, Op, Operand

DEVICE = torch.device("cuda", 0)

# What returns a size or a number to the host.
_SYNCING = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_dim",
}
# What takes tensors of both devices.
_MIXING = {
    "aten::_index_put_impl_",
    "aten::_to_copy",
    "aten::copy_",
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::lift_fresh",
    "aten::set_",
}

# Ops that run by a function here, instead of by their CPU kernel: name -> function.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


class _LooksOrdinary(type(torch.Tensor)):  # type: ignore[misc]
    """A class of tensors that passes for torch's own where its type is compared."""

    def __eq__(cls, other: object) -> bool:
        return other in (torch.Tensor, torch.nn.Parameter) or cls is other

    __hash__ = type.__hash__


class PretendedTensor(torch.Tensor, metaclass=_LooksOrdinary):
    """Made of the CPU tensor that holds the data."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendedTensor:
        """A tensor of the shape, strides and dtype of `inner`."""
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=inner.device,
        )
        made._inner = inner  # type: ignore[attr-defined]
        return made

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data_on_cpu(self) -> Tensor:
        """What it stands for."""
        return self._inner  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Judge the op where the mode is off: inside a custom op's own kernel."""
        with MODE:
            return func(*args, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PretendedTensor({self.data_on_cpu!r})"

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, as torch does for a tensor on a GPU."""
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    numpy = __array__

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) in memo:
            return memo[id(self)]
        with torch.no_grad():
            new = self.detach().clone()
        new.requires_grad_(self.requires_grad)
        if hasattr(self, "_is_param"):
            new._is_param = self._is_param
        if self.grad is not None:
            new.grad = copy.deepcopy(self.grad, memo)
        memo[id(self)] = new
        return new

    def tolist(self) -> Any:
        """As of any tensor; the host waits."""
        RECORD.sync("tolist")
        return self.data_on_cpu.detach().tolist()

    def data_ptr(self) -> int:
        """Of the data on the CPU."""
        return self.data_on_cpu.data_ptr()

    def get_device(self) -> int:
        """0."""
        return 0

    def new_tensor(  # type: ignore[override]
        self, data: Any, *, dtype: torch.dtype | None = None, **_: Any
    ) -> Tensor:
        """On this device; an upload."""
        return torch.tensor(data, dtype=dtype or self.dtype, device="cuda")

    def is_pinned(self, *_: Any) -> bool:
        """False."""
        return False

    def pin_memory(self, *_: Any) -> Tensor:
        """Refuse, as torch does."""
        raise RuntimeError(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")

    def record_stream(self, stream: object) -> None:
        """Nothing is freed early here."""


class PretendedMode(TorchDispatchMode):
    """Runs each op on the CPU data after it was judged as a GPU would."""

    def __init__(self) -> None:
        super().__init__()
        # Whether this thread is inside a `.to("cpu")`, which the op itself doesn't tell.
        self.moving = threading.local()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func`; what comes out is on the pretended device if what went in was."""
        kwargs = dict(kwargs or {})
        name = func._schema.name
        tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor)]
        here = [a for a in tensors if isinstance(a, PretendedTensor)]
        pinned = kwargs.pop("pin_memory", None)  # needs a driver
        if not here and not is_cuda(kwargs.get("device")):
            out = func(*args, **kwargs)
            if pinned:
                out.is_pretended_pinned = True
            return out
        if here and name in IMPLEMENTATIONS:
            _refuse_host_tensors(name, tensors, scalars=False)
            return IMPLEMENTATIONS[name](*args, **kwargs)
        if here and name not in _MIXING:
            _refuse_host_tensors(name, tensors, scalars=True)
        self._note_waits(func, name, args, kwargs, bool(here))
        inner_args, inner_kwargs = tree_map(inner, (args, kwargs))
        if inner_kwargs.get("device") is not None:
            inner_kwargs["device"] = torch.device("cpu")
        out = func(*inner_args, **inner_kwargs)
        RECORD.capture(lambda: _write(out, func(*inner_args, **inner_kwargs)))
        if RECORD.counts_ops:
            RECORD.ops.append(_described(func, name, (inner_args, inner_kwargs), out))
        if name == "aten::_to_copy" and getattr(self.moving, "to_cpu", False):
            return out
        if RECORD.counts_ops:
            RECORD.allocations += _allocations(name, here, out)
        if name == "aten::_to_copy" or not here:
            return tree_map(outer, out)
        # A view of an ordinary tensor is one too, under inference mode as well.
        ordinary = _is_view(func) and not all(a.is_inference() for a in here)
        with torch.inference_mode(False) if ordinary else nullcontext():
            return return_and_correct_aliasing(func, args, kwargs, tree_map(outer, out))

    def _note_waits(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], here: bool
    ) -> None:
        if name in _SYNCING:
            RECORD.sync(name)
        elif name == "aten::repeat_interleave":
            if func._overloadname == "Tensor" and kwargs.get("output_size") is None:
                RECORD.sync(name)
        elif name == "aten::copy_":
            to, source = args[:2]
            waits = not kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if isinstance(to, PretendedTensor) != isinstance(source, PretendedTensor):
                self._note_copy(source, waits)
        elif name == "aten::_to_copy" and not here:
            self._note_copy(args[0], not kwargs.get("non_blocking", False))
        elif name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_"):
            indices = [i for i in args[1] if i is not None]
            if any(not isinstance(i, PretendedTensor) for i in indices):
                RECORD.uploads.append(name)
                RECORD.sync(f"{name} with indices on the host")
            if any(i.dtype == torch.bool for i in indices):
                RECORD.sync(f"{name} with a mask")

    @staticmethod
    def _note_copy(source: Tensor, waits: bool) -> None:
        """A copy between the devices: from pageable memory it waits, whatever was asked for."""
        if not isinstance(source, PretendedTensor) and not is_pinned(source):
            RECORD.uploads.append(f"{source.dtype} {tuple(source.shape)}")
        if waits:
            RECORD.sync("copy between the devices")


def is_pinned(a: Tensor) -> bool:
    """Whether a CPU tensor, or what it is a view of, was asked to be pinned."""
    base = a if a._base is None else a._base
    return getattr(a, "is_pretended_pinned", getattr(base, "is_pretended_pinned", False))


def is_cuda(device: Any) -> bool:
    """Whether `device`, as torch's functions take it, is a GPU."""
    return device is not None and torch.device(device).type == "cuda"


def inner(a: Any) -> Any:
    """The CPU tensor of a pretended one; anything else as it is."""
    return a.data_on_cpu if isinstance(a, PretendedTensor) else a


def _write(outs: Any, anew: Any) -> None:
    """Into the results of an op those of the same op; what it wrote in place is there already."""
    for out, new in zip(tree_flatten(outs)[0], tree_flatten(anew)[0], strict=True):
        if isinstance(out, Tensor) and out.data_ptr() != new.data_ptr():
            out.copy_(new)


def outer(a: Any) -> Any:
    """A tensor as one on the pretended GPU; anything else as it is."""
    plain = isinstance(a, Tensor) and not isinstance(a, PretendedTensor)
    return PretendedTensor(a) if plain else a


def operands(tree: Any) -> tuple[Operand, ...]:
    """All tensors in `tree`; an expanded dimension is one element."""
    leaves = tree_flatten(tree)[0]
    return tuple(operand(inner(a)) for a in leaves if isinstance(a, Tensor))


def operand(a: Tensor) -> Operand:
    """What is read or written of `a`."""
    sizes = zip(a.shape, a.stride(), strict=True)
    elements = prod(size for size, step in sizes if step or not size)
    return Operand(tuple(a.shape), elements * a.element_size())


def _refuse_host_tensors(name: str, tensors: list[Tensor], *, scalars: bool) -> None:
    """Raise as torch does where a CPU tensor stands among those of the GPU."""
    for a in tensors:
        on_host = not isinstance(a, PretendedTensor) and a.device.type == "cpu"
        if on_host and not (scalars and a.dim() == 0):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({name}: a {tuple(a.shape)} tensor is on the CPU)"
            )


def _described(func: Any, name: str, inputs: Any, out: Any) -> Op:
    return Op(name, _is_view(func), operands(inputs), operands(out))


def _allocations(name: str, arguments: list[PretendedTensor], out: Any) -> list[Allocation]:
    def memory(a: Tensor) -> torch.UntypedStorage:
        return inner(a).untyped_storage()

    there = {memory(a).data_ptr() for a in arguments}
    return [
        Allocation(name, memory(a).nbytes())
        for a in tree_flatten(out)[0]
        if isinstance(a, Tensor) and a.numel() and memory(a).data_ptr() not in there
    ]


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


MODE = PretendedMode()


def install() -> None:
    """Judge every op from here on, in this thread and in those that are started."""
    MODE.__enter__()
    run = threading.Thread.run

    def run_judged(self: threading.Thread) -> None:
        with MODE:
            run(self)

    threading.Thread.run = run_judged  # type: ignore[method-assign]
