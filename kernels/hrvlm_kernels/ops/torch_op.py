"""How the torch ops are made, and their namespace: ``torch.ops.hrvlm_kernels`` if installed.

A process may hold several copies of the package: the installed one, and builds loaded from the
Hugging Face Hub, each under a module name of its own. torch refuses to define an op twice, so the
namespace is the name under which this copy was imported, as Hub kernels must have it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..replay import needs_torch, replayed, watched

_package = __name__.rpartition(".ops.")[0] or "hrvlm_kernels"
NAMESPACE = _package.replace(".", "_")  # torch takes no dots
_lib = torch.library.Library(NAMESPACE, "FRAGMENT")
_TENSORS = (Tensor, torch.nn.Parameter)


class _Ops:
    """The ops of this package by name, as ``torch.ops.<namespace>`` has them.

    A call that torch's dispatcher would do nothing with but hand it on, or record its gradient
    (no tracing, no modes, no subclass of a tensor), goes to the kernels directly, in a tenth of the
    time.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(getattr(torch.ops, NAMESPACE), name)


ops: Any = _Ops()


def _call_directly(
    name: str, run: Callable[..., Any], with_gradient: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """The op `name`: `run`, or the same with a gradient, where torch has nothing else to do."""
    op = getattr(getattr(torch.ops, NAMESPACE), name)

    def call(*args: Any) -> Any:
        route = _route(args)
        if route == "kernels":
            return run(*args)
        if route == "gradient" and with_gradient is not None:
            return with_gradient(*args, None)
        return op(*args)

    return call


def _route(args: tuple[Any, ...]) -> str:
    """Who takes a call: "kernels", "gradient" for the kernels with their gradient, or "torch"."""
    if torch.compiler.is_compiling():
        return "torch"
    if watched() is not None:  # whoever watches has asked the rest
        return "kernels"
    if needs_torch():
        return "torch"
    records, route = torch.is_grad_enabled(), "kernels"
    for a in args:
        if isinstance(a, Tensor):
            if type(a) not in _TENSORS:
                return "torch"
            if records and a.requires_grad:
                route = "gradient"
    return route


def _differentiable(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """The op as what ``torch.library.register_autograd`` makes of it, without the dispatcher.

    It takes one more argument, the last: what runs the op, or None.
    """

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            run, args = args[-1], args[:-1]
            output = getattr(ops, name)(*args) if run is None else run()
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            gradients = backward(ctx, *grads)
            return (*gradients, None) if isinstance(gradients, tuple) else (gradients, None)

    Op.__name__ = f"{name}_"
    # Function.apply without what it does for transforms, under which nobody comes here.
    return super(torch.autograd.Function, Op).apply


def run_directly(name: str, run: Callable[..., Any]) -> None:
    """Call `run`, instead of the op `name`, where torch's dispatcher has nothing to do."""
    vars(ops)[name] = _call_directly(name, run)


def add_op_namespace_prefix(name: str) -> str:
    """``<namespace>::<name>``; kernel-builder looks for decorators that go without it."""
    return f"{NAMESPACE}::{name}"


def register(
    name: str,
    schema: str,
    launcher: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    arguments: Callable[..., tuple[Any, ...]] | None = None,
) -> None:
    """Define the op `name`: its kernel, the shapes of its outputs, and its gradient.

    A call allocates the outputs as `fake` does, imports the launcher, which needs Triton, and lets
    it write them.

    Args:
        name: Without the namespace.
        schema: Arguments and results, ``"(Tensor x) -> Tensor"``.
        launcher: ``"module:function"`` in triton_kernels/; takes the arguments, then the outputs.
        fake: Empty outputs for the arguments, fake tensors or real ones.
        setup_context: What `backward` needs, as ``torch.library.register_autograd`` takes it.
        backward: The gradient formula.
        arguments: What the launcher gets of the op's arguments; default: all of them.
    """
    module, _, function = launcher.partition(":")

    path = f"{_package}.triton_kernels.{module}"

    def run(*args: Any) -> Any:
        outputs = fake(*args)
        try:
            kernels = import_module(path)  # waits where another thread does it
        except ImportError as error:
            raise RuntimeError(
                f"{name}: Triton can't be imported ({error}): run `hrvlm doctor`, or choose "
                'backend="sdpa"'
            ) from error
        start = getattr(kernels, function)
        start(
            *(args if arguments is None else arguments(*args)),
            *(outputs if isinstance(outputs, tuple) else (outputs,)),
        )
        return outputs

    _lib.define(name + schema)
    by_dispatcher = replayed(run)  # Inductor's code goes through it
    for device in ("CPU", "CUDA"):
        _lib.impl(name, by_dispatcher, device)
    full_name = add_op_namespace_prefix(name)
    torch.library.register_fake(full_name, fake, lib=_lib)
    torch.library.register_autograd(full_name, backward, setup_context=setup_context, lib=_lib)
    with_gradient = _differentiable(name, setup_context, backward)
    vars(ops)[name] = replayed(_call_directly(name, run, with_gradient), with_gradient)


def register_backward(
    name: str,
    schema: str,
    launcher: str,
    *,
    fake: Callable[..., Any],
    arguments: Callable[..., tuple[Any, ...]] | None = None,
) -> None:
    """Define an op that computes a gradient; a gradient of the gradient raises."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{name}: the Triton kernels have no double backward; "
            'use backend="eager" for second derivatives'
        )

    register(
        name, schema, launcher, fake=fake, setup_context=_save_nothing, backward=refuse,
        arguments=arguments,
    )  # fmt: skip


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass
